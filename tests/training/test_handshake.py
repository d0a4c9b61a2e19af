"""The start-up check names what differs, and on which rank and host."""

import pytest

from diffussm.training.handshake import code_hash, disagreement

pytestmark = pytest.mark.unit


def ranks(count: int, **odd: dict[str, str]) -> list[dict[str, str]]:
    """Ranks of hosts with two each, alike but for ``odd`` {"rank3": {fact: value}}."""
    alike = [
        {"host": f"node{n // 2}", "device": f"GPU-{n}", "code": "abc", "world size": str(count), "configuration": "c0"}
        for n in range(count)
    ]
    for name, facts in odd.items():
        alike[int(name[4:])] |= facts
    return alike


def test_ranks_of_one_mind():
    assert disagreement(ranks(4)) == ""
    assert disagreement(ranks(1)) == ""
    on_cpus = [rank | {"device": "cpu"} for rank in ranks(4)]
    assert disagreement(on_cpus) == ""


@pytest.mark.parametrize("fact", ["code", "world size", "configuration"])
def test_the_odd_one_is_named(fact):
    line = disagreement(ranks(8, rank5={fact: "odd"}))
    assert f"do not agree on {fact}: rank 5 on node2 has odd, the others have" in line
    assert "\n" not in line


def test_most_are_right_even_where_rank_0_is_odd():
    assert "rank 0 on node0 has old, the others have abc" in disagreement(ranks(4, rank0={"code": "old"}))


def test_of_many_differences_the_first_is_told():
    """By each rank the same: it may explain the others."""
    line = disagreement(ranks(4, rank1={"code": "old", "world size": "2", "configuration": "c1"}))
    assert "do not agree on code" in line


def test_many_are_counted():
    line = disagreement(ranks(16, **{f"rank{n}": {"code": "old"} for n in range(6)}))
    assert "rank 3 on node1 has old and 2 more ranks differ" in line and "rank 4" not in line


def test_two_ranks_on_one_gpu():
    line = disagreement(ranks(4, rank3={"device": "GPU-2"}))
    assert "ranks 2 and 3 on node1 both use GPU GPU-2" in line
    assert disagreement(ranks(4, rank3={"device": "GPU-0"})) == ""  # of another host


def test_the_code_has_one_hash():
    assert code_hash() == code_hash() and len(code_hash()) == 12
