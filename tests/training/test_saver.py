"""Checkpoints are complete or invisible, whatever dies, fails or is replaced while they are saved."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from training.saving import files, make_saver, name, names, save

from diffussm.data.store import LocalStore
from diffussm.errors import UserError
from diffussm.training import checkpoint, saver
from diffussm.training.checkpoint import Checkpoint

pytestmark = pytest.mark.unit


@pytest.fixture
def soon(monkeypatch):
    """The next try comes soon."""
    monkeypatch.setattr(saver, "RETRY_SECONDS", 0.05)


def wait_until(holds) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_newest_are_kept(store, cluster):
    save(store, cluster, 1, 2, 3, 4)
    assert names(store) == [name(3), name(4)]
    assert bytes(store.read("latest")) == f"{name(4)}\n".encode()
    assert files(store) == {"latest", "owner"} | {
        f"{name(n)}/{file}" for n in (3, 4) for file in ("manifest.json", "meta.json", "rank-00000-x.safetensors")
    }


def test_milestones_and_the_best_are_kept(store, cluster):
    losses = {10: 9.0, 20: 1.0, 30: 5.0, 40: 4.0, 50: 3.0, 60: 2.0, 70: float("nan")}
    finite = [loss if loss == loss else None for loss in losses.values()]
    save(store, cluster, *losses, metrics=finite, keep=1, every=25, best="loss/total")
    # 30, 50: the first past 25 and 50; 20: the best; 70: the newest
    assert names(store) == [name(20), name(30), name(50), name(70)]
    assert bytes(store.read("best")) == f"{name(20)}\n".encode()


class Killed(BaseException):
    pass


class Mortal(LocalStore):
    """A folder whose process dies at its n-th change."""

    left = 10**9

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed

    def put(self, *arguments, **keywords):
        self._count()
        result = super().put(*arguments, **keywords)
        self._count()  # and right after it
        return result

    def swap(self, *arguments):
        self._count()
        return super().swap(*arguments)

    def delete_all(self, prefix, first=None):
        self._count()
        if first:
            self.delete(first)
        self._count()
        return super().delete_all(prefix, first)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_death_at_any_moment_leaves_a_whole_checkpoint_and_no_litter_after_the_next(tmp_path, cluster):
    deaths = 0
    for moment in range(100):
        store = Mortal(tmp_path / str(moment))
        made = make_saver(store, cluster, keep=1)
        save(store, cluster, 1, make=made)
        store.left = moment
        save(store, cluster, 2, make=made)  # the thread that saves dies: nothing is published after that moment
        died = store.left < 0
        deaths += died
        survivor = LocalStore(tmp_path / str(moment))
        found = checkpoint.find(survivor)
        assert found.name in (name(1), name(2))
        for published in checkpoint.complete(survivor):
            published.verify()
        save(survivor, cluster, 2, keep=1)
        assert names(survivor) == [name(2)]
        assert files(survivor) == {"latest", "owner"} | {
            f"{name(2)}/{file}" for file in ("manifest.json", "meta.json", "rank-00000-x.safetensors")
        }
        if not died:
            break
    assert deaths >= 8


def test_another_process_takes_over_and_the_first_publishes_no_more(store, cluster, soon):
    first = make_saver(store, cluster)
    save(store, cluster, 1, make=first)
    second = make_saver(store, cluster)
    with pytest.raises(UserError, match="another process has begun to save"):
        save(store, cluster, 2, make=first)
    assert names(store) == [name(1)]
    save(store, cluster, 2, make=second)
    assert names(store) == [name(1), name(2)]
    with pytest.raises(UserError, match="another process has begun to save"):
        save(store, cluster, 2, make=first)  # which leaves the other's of that name alone
    Checkpoint(store, name(2)).verify()


def test_an_earlier_attempt_of_a_job_takes_nothing_back(store, cluster, monkeypatch):
    """SLURM has started the job anew elsewhere; the node that was cut off wakes up while it starts."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second = make_saver(store, cluster)
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    with pytest.raises(UserError, match="another process has begun to save"):
        make_saver(store, cluster)
    save(store, cluster, 1, make=second)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    third = make_saver(store, cluster)
    save(store, cluster, 2, make=third)
    assert names(store) == [name(1), name(2)]


def test_what_a_replaced_process_still_writes_is_in_no_checkpoint(store, cluster):
    """It was in the middle of its file when it lost the disk, and gets it back when the other has published."""
    first = make_saver(store, cluster)
    second = make_saver(store, cluster)
    save(store, cluster, 1, make=second)
    first.write(name(1), b"of an older time")
    Checkpoint(store, name(1)).verify()
    assert len(list(Path(str(store)).glob("*/rank-00000-*.safetensors"))) == 2
    save(store, cluster, 2, 3, make=second)  # which removes the first, and all that is there
    assert files(store) == {"latest", "owner"} | {
        f"{name(n)}/{file}" for n in (2, 3) for file in ("manifest.json", "meta.json", "rank-00000-x.safetensors")
    }


class Delayed(LocalStore):
    """A folder where the first writing of an object whose name ends in ``end`` takes as long as ``meanwhile`` does."""

    end, meanwhile = "nothing", staticmethod(lambda: None)

    def put(self, name, *arguments, **keywords):
        if name.endswith(self.end):
            self.end = "nothing"
            self.meanwhile()
        return super().put(name, *arguments, **keywords)


@pytest.mark.parametrize("end", ["safetensors", "meta.json", "manifest.json", "latest"])
def test_a_write_that_arrives_when_another_has_published_destroys_nothing(tmp_path, cluster, end):
    """The network was cut in the middle of a save, and meanwhile the job has gone on elsewhere, past that save."""
    store, healthy = Delayed(tmp_path), LocalStore(tmp_path)
    first = make_saver(store, cluster, keep=3)
    save(store, cluster, 1, make=first)
    others = []

    def go_on() -> None:
        second = make_saver(healthy, cluster, keep=3)
        save(healthy, cluster, 2, 3, make=second)
        others.append({found.name: found.manifest for found in checkpoint.complete(healthy)})

    store.end, store.meanwhile = end, go_on
    with pytest.raises(UserError, match="another process has begun to save"):
        save(store, cluster, 2, make=first)
        save(store, cluster, 4, make=first)  # where the first save had only its pointer left to write
    assert {found.name: found.manifest for found in checkpoint.complete(healthy)} == others[0]
    for found in checkpoint.complete(healthy):
        found.verify()
    assert names(healthy) == [name(1), name(2), name(3)] and first.lost


def test_who_was_replaced_learns_it_without_a_save(store, cluster, monkeypatch):
    first = make_saver(store, cluster)
    first.look()
    assert first.lost == ""
    with monkeypatch.context() as trouble:
        trouble.setattr(LocalStore, "read", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        first.look()
    assert first.lost == ""  # trouble tells nothing
    make_saver(store, cluster)
    first.look()
    assert "another process has begun to save" in first.lost


class Flaky(LocalStore):
    """A folder where changes of objects whose names have ``part`` in them fail as often as told."""

    times, part, failed = 0, "", 0

    def then(self) -> None:
        """What happens after a failure."""

    def _change(self, name: str) -> None:
        if self.times > 0 and self.part in name:
            self.times, self.failed = self.times - 1, self.failed + 1
            self.then()
            raise OSError(28, "No space left on device", name)

    def put(self, name, *arguments, **keywords):
        self._change(name)
        return super().put(name, *arguments, **keywords)

    def swap(self, name, *arguments):
        self._change(name)
        return super().swap(name, *arguments)

    def exists(self, name):
        self._change(name)
        return super().exists(name)


@pytest.mark.parametrize("part", ["rank-", "meta.json", "manifest.json", "owner", "latest"])
def test_what_fails_for_a_while_is_tried_again(tmp_path, cluster, soon, capsys, part):
    store = Flaky(tmp_path)
    made = make_saver(store, cluster)
    save(store, cluster, 1, make=made)
    store.times, store.part = 3, part
    save(store, cluster, 2, make=made, wait=False)  # training goes on
    wait_until(lambda: bytes(store.read("latest")) == f"{name(2)}\n".encode())
    assert made.settle() == "" and names(store) == [name(1), name(2)]
    Checkpoint(store, name(2)).verify()
    told = capsys.readouterr().err
    assert told.count("warning: rank 0 on here: checkpoint images-000000000002 cannot be written: ") == 3
    assert "No space left on device: trying again in 0.05 s; training goes on until the next checkpoint" in told


@pytest.mark.parametrize("part", ["rank-", "meta.json", "manifest.json", "owner", "latest"])
def test_what_fails_twice_ends_the_run_and_leaves_the_one_before(tmp_path, cluster, soon, part):
    store = Flaky(tmp_path)
    made = make_saver(store, cluster)
    save(store, cluster, 1, make=made)
    before = files(store)
    store.times, store.part = 10**9, part
    save(store, cluster, 2, make=made, wait=False)
    wait_until(lambda: store.failed)
    with pytest.raises(UserError, match=r"images-000000000003 cannot be written: .*: No space left on device"):
        save(store, cluster, 3, make=made, wait=False)
    assert files(store) == before and checkpoint.find(store).name == name(1)


def test_a_score_is_of_its_checkpoint_and_one_that_fails_is_left_out(tmp_path, cluster, capsys):
    store = LocalStore(tmp_path)
    made = make_saver(store, cluster, keep=9, best="fid/x")

    def fails() -> dict[str, float]:
        raise OSError(28, "No space left on device")

    for seen, score in ((1, lambda: {"fid/x": 7.0}), (2, lambda: {"fid/x": 5.0}), (3, fails), (4, None)):
        save(store, cluster, seen, make=made, metrics=[0.1], score=score)
    found = {c.name: c.meta["metrics"] for c in checkpoint.complete(store)}
    assert found == {
        name(1): {"loss/total": 0.1, "fid/x": 7.0},
        name(2): {"loss/total": 0.1, "fid/x": 5.0},
        name(3): {"loss/total": 0.1},
        name(4): {"loss/total": 0.1},
    }
    assert bytes(store.read("best")) == f"{name(2)}\n".encode()
    assert "checkpoint images-000000000003 has no score: [Errno 28] No space left on device" in capsys.readouterr().err


def test_what_failed_is_made_up_for_by_the_next(tmp_path, cluster, capsys):
    store = Flaky(tmp_path)
    made = make_saver(store, cluster)
    store.times, store.part = 1, "rank-"
    save(store, cluster, 1, make=made, wait=False)
    wait_until(lambda: store.failed)
    save(store, cluster, 2, make=made, wait=False)  # does not wait out the ten seconds
    assert names(store) == [name(2)]


def test_who_was_replaced_while_a_publication_failed_publishes_no_more(tmp_path, cluster, soon):
    """As a network is cut off and comes back."""
    store = Flaky(tmp_path)
    first = make_saver(store, cluster)
    store.then = lambda: save(LocalStore(tmp_path), cluster, 2)
    store.times, store.part = 1, "meta.json"
    with pytest.raises(UserError, match="another process has begun to save"):
        save(store, cluster, 2, make=first)
    assert names(store) == [name(2)]
    Checkpoint(store, name(2)).verify()


def test_what_cannot_be_removed_does_not_undo_the_new_one(tmp_path, cluster, monkeypatch, capsys):
    store = LocalStore(tmp_path)
    made = make_saver(store, cluster, keep=1)
    save(store, cluster, 1, make=made)

    def refuse(prefix, first=None):
        store.delete(first)
        raise OSError(39, "Directory not empty", prefix)

    with monkeypatch.context() as patch:
        patch.setattr(store, "delete_all", refuse)
        save(store, cluster, 2, make=made)
    assert checkpoint.find(store).name == name(2)
    assert "checkpoints before images-000000000002 cannot be removed: images-000000000001/" in capsys.readouterr().err
    make_saver(store, cluster)
    assert not any(file.startswith(name(1)) for file in files(store))


def test_a_rotten_one_does_not_keep_others_from_being_saved(store, cluster):
    made = make_saver(store, cluster, keep=1, every=1, best="loss/total")
    save(store, cluster, 1, make=made, metrics=[1.0])
    (Path(str(store)) / name(1) / "meta.json").write_text("[" * 100_000)
    save(store, cluster, 2, make=made, metrics=[2.0])
    assert bytes(store.read("best")) == f"{name(2)}\n".encode()
    assert names(store) == [name(1), name(2)]


def test_an_error_of_our_own_is_no_success(store, cluster, monkeypatch):
    made = make_saver(store, cluster)
    monkeypatch.setattr(made, "publish", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="images-000000000001 was not saved: division by zero"):
        save(store, cluster, 1, make=made)
