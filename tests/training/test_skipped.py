"""Steps that were not taken: which images are named, what a resume forgets, and when it is too many."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from diffussm.data.order import SampleOrder
from diffussm.errors import UserError
from diffussm.training.skipped import Skipped

pytestmark = pytest.mark.unit

BATCH = 8


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    """One rank, with its group."""
    place = tmp_path_factory.mktemp("rendezvous") / "store"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield SimpleNamespace(is_main=True, world_size=1, control=dist.new_group(backend="gloo"))
    dist.destroy_process_group()


@pytest.fixture
def order() -> SampleOrder:
    return SampleOrder([64], BATCH, 0)


@pytest.fixture
def skipped(tmp_path, cluster, order):
    reader = SimpleNamespace(keys=lambda ids: [f"image {number}" for number in np.asarray(ids).tolist()])

    def make(images: int = 0, most: int = 2, state: dict[str, int] | None = None) -> Skipped:
        return Skipped(tmp_path, images, state or {}, most, cluster, order, reader, slice(0, BATCH))

    return make


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def finite(*bad: int) -> torch.Tensor:
    return torch.tensor([number not in bad for number in range(BATCH)])


def test_the_images_to_blame_are_named(skipped, tmp_path, order, capsys):
    ids = order.step_ids(2)
    skipped().one(2 * BATCH, finite(1, 5))
    keys = [f"image {ids[1]}", f"image {ids[5]}"]
    assert lines(tmp_path) == [{"images": 16, "cause": "loss", "keys": keys}]
    assert capsys.readouterr().err == (
        f"warning: the step after 16 images is skipped, its loss is not finite: {', '.join(keys)}\n"
    )


def test_of_a_gradient_all_are(skipped, tmp_path, order, capsys):
    """Where each image's loss is finite, none can be told from the others."""
    skipped().one(0, finite())
    (line,) = lines(tmp_path)
    assert line["cause"] == "gradient" and line["keys"] == [f"image {number}" for number in order.step_ids(0)]
    assert f", ... (8 images: {tmp_path / 'skipped.jsonl'})" in capsys.readouterr().err


def test_too_many_in_a_row_end_the_run_with_advice(skipped):
    made = skipped(most=2)
    for step in (0, 1):
        made.one(step * BATCH, finite(0))
    made.none()
    for step in (3, 4):
        made.one(step * BATCH, finite(0))
    with pytest.raises(UserError, match=r"3 steps in a row had a loss .* lower train.lr or train.clip") as error:
        made.one(5 * BATCH, finite(0))
    assert "\n" not in str(error.value)
    assert made.state() == {"total": 5, "in_a_row": 3}


def test_a_resume_forgets_what_it_will_meet_again(skipped, tmp_path):
    made = skipped(most=9)
    for step in range(4):
        made.one(step * BATCH, finite(0))
    with open(tmp_path / "skipped.jsonl", "a") as file:
        file.write('{"images": 32, "ca')  # killed while it wrote
    again = skipped(images=2 * BATCH, most=9, state={"total": 2, "in_a_row": 2})
    assert [line["images"] for line in lines(tmp_path)] == [0, 8]
    again.one(2 * BATCH, finite(0))
    assert [line["images"] for line in lines(tmp_path)] == [0, 8, 16]
    assert again.state() == {"total": 3, "in_a_row": 3}
