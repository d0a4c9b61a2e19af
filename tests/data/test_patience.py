"""How long requests to S3 pause between tries, by a clock of the test's own."""

from __future__ import annotations

import pytest

from diffussm.data import s3_requests
from diffussm.data.s3_requests import FIRST_PAUSE, LONGEST_PAUSE, Patience
from diffussm.errors import UserError

pytestmark = pytest.mark.unit


class Clock:
    """Time passes only in ``sleep``."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(s3_requests, "time", clock)
    monkeypatch.setattr(s3_requests, "_say", lambda line: None)
    return clock


def pauses(clock: Clock, patience: Patience, tries: int) -> list[float]:
    before = len(clock.pauses)
    for _ in range(tries):
        patience.wait("the server answered 503 SlowDown")
    return clock.pauses[before:]


def test_pauses_double_up_to_a_limit_and_are_jittered(clock: Clock) -> None:
    everyone = [pauses(clock, Patience("s3://b/a", 1000), 12) for _ in range(50)]
    for number, of_try in enumerate(zip(*everyone, strict=True)):
        whole = min(FIRST_PAUSE * 2**number, LONGEST_PAUSE)
        assert all(whole / 2 <= pause <= whole for pause in of_try)
        assert len(set(of_try)) > 40 and max(of_try) - min(of_try) > whole / 4  # they do not come back all at once


def test_pauses_are_short_again_once_bytes_have_arrived(clock: Clock) -> None:
    patience = Patience("s3://b/a", 1000)
    assert pauses(clock, patience, 8)[-1] >= LONGEST_PAUSE / 2
    patience.progress()
    assert pauses(clock, patience, 1)[0] <= FIRST_PAUSE


def test_the_last_try_is_at_the_deadline_and_no_later(clock: Clock) -> None:
    begin = clock.now
    with pytest.raises(UserError, match="s3://b/a: the server answered 503 SlowDown: given up at try"):
        pauses(clock, Patience("s3://b/a", 120), 1000)
    assert clock.now - begin == pytest.approx(120)
