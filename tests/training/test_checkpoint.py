"""Checkpoints are complete or invisible, nothing torn or foreign is loaded, and any cut of the parameters is read."""

from __future__ import annotations

import json
import re
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torch.distributed as dist

from diffussm.config import Config, to_dict
from diffussm.data.store import LocalStore, open_store
from diffussm.errors import UserError
from diffussm.models.diffussm import DiffuSSM, ModelConfig
from diffussm.training import checkpoint, saver
from diffussm.training.checkpoint import Checkpoint
from diffussm.training.partition import Fragment
from diffussm.training.tensor_file import pack, read_header

pytestmark = pytest.mark.unit

SIZE = ModelConfig("custom", 16, 1, 2, 4)


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    """One rank, with its groups."""
    place = tmp_path_factory.mktemp("rendezvous") / "store"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    groups = {"control": dist.new_group(backend="gloo"), "saving": dist.new_group(backend="gloo")}
    yield SimpleNamespace(rank=0, world_size=1, is_main=True, host="here", from_main=lambda f: f(), **groups)
    dist.destroy_process_group()


def model(seed: int = 0) -> DiffuSSM:
    torch.manual_seed(seed)
    return DiffuSSM(SIZE, channels=4, num_classes=3)


def partition(network: DiffuSSM) -> SimpleNamespace:
    """All of a network on one rank."""
    fragments = [
        Fragment(name, "dense", 0, p.numel(), number, 0) for number, (name, p) in enumerate(network.named_parameters())
    ]
    return SimpleNamespace(
        masters=list(network.parameters()),
        fragments=fragments,
        shapes={name: p.shape for name, p in network.named_parameters()},
    )


def make_saver(store, cluster, keep=2, every=0, best=None):
    def surplus(there):
        return checkpoint.surplus(there, keep, every, best)

    return saver.Saver(store, cluster, partition(model()), surplus, best)


def save(store, cluster, *images, metrics=None, make=None, wait=True, **keep) -> DiffuSSM:
    """Checkpoints by one rank, whose average is the weights times 2."""
    network = model()
    made = make or make_saver(store, cluster, **keep)
    for number, seen in enumerate(images):
        meta = {
            "format": checkpoint.FORMAT, "images": seen, "config": to_dict(Config(model=SIZE)), "channels": 4,
            "num_classes": 3, "ema_images": [40.0], "metrics": {"loss/total": metrics[number]} if metrics else {},
        }  # fmt: skip
        weights = [p.detach() for p in network.parameters()]
        kinds = {"weight": weights, "exp_avg": weights, "exp_avg_sq": weights, "ema-40": [2 * p for p in weights]}
        made.save(meta, kinds, wait)
    return network


def names(store) -> list[str]:
    return [found.name for found in reversed(checkpoint.complete(store))]


def name(images: int) -> str:
    return f"images-{images:012d}"


@pytest.fixture
def store(tmp_path) -> LocalStore:
    return LocalStore(tmp_path / "checkpoints")


def files(store) -> set[str]:
    root = Path(str(store))
    there = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} - {".owner.lock"}
    return {re.sub(r"rank-00000-[0-9a-f]{8}\.", "rank-00000-x.", file) for file in there}


def whole_path(place: Path) -> Path:
    """``place``, with the writer's name for "x"."""
    (found,) = place.parent.glob(place.name.replace("-x.", "-*."))
    return found


def test_round_trip(store, cluster):
    network = save(store, cluster, 640)
    found = checkpoint.find(store)
    loaded = checkpoint.load_model(found)
    assert found.meta["images"] == 640 and not loaded.training
    for a, b in zip(network.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(2 * a, b)
    weights = checkpoint.load_model(found, "weight")
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), weights.parameters(), strict=True))
    with pytest.raises(UserError, match="no weights ema-7, but weight"):
        checkpoint.load_model(found, "ema-7")


def test_nothing_saved_is_nothing_found(store):
    assert checkpoint.find(store) is None


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_parameters_are_read_however_ranks_cut_them(store, ranks):
    """A file a rank, each with an uneven piece of every parameter: whole tensors, and any part of one."""
    torch.manual_seed(0)
    truth = {"a": torch.randn(7, 11), "b": torch.randn(3), "empty": torch.randn(0)}
    pieces: dict[str, list] = {}
    for rank in range(ranks):
        content, mine = {}, []
        for key, tensor in truth.items():
            start, end = rank * tensor.numel() // ranks, (rank + 1) * tensor.numel() // ranks
            if start < end:
                content[f"weight:{key}"] = tensor.flatten()[start:end]
                mine.append((key, start, end - start))
        store.put(f"c/{checkpoint.rank_file(rank, 'x')}", pack(content))
        pieces[checkpoint.rank_file(rank, "x")] = mine
    table = {file: {"size": store.stat(f"c/{file}").size, "sha256": ""} for file in pieces}
    manifest = {
        "format": checkpoint.FORMAT,
        "files": table | {"meta.json": {"size": 2, "sha256": ""}},
        "pieces": pieces,
        "shapes": {key: list(tensor.shape) for key, tensor in truth.items()},
    }
    store.put("c/manifest.json", json.dumps(manifest).encode())
    found = Checkpoint(store, "c")
    read = found.tensors("weight")
    assert all(torch.equal(read[key], tensor) for key, tensor in truth.items())
    part = torch.empty(40)
    found.fill([("weight", "a", 20, part)])
    assert torch.equal(part, truth["a"].flatten()[20:60])
    with pytest.raises(UserError, match="holds 17 of 20 elements of a"):
        found.fill([("weight", "a", 60, torch.empty(20))])
    with pytest.raises(UserError, match="no fp32 tensor exp_avg:a"):
        found.fill([("exp_avg", "a", 0, torch.empty(7))])


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


@pytest.fixture
def soon(monkeypatch):
    """The next try comes soon."""
    monkeypatch.setattr(saver, "RETRY_SECONDS", 0.05)


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


def wait_until(holds) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("file", ["rank-00000-x.safetensors", "meta.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "altered"])
def test_a_torn_one_is_passed_over_and_named(store, cluster, capsys, file, damage):
    save(store, cluster, 1, 2)
    victim = whole_path(Path(str(store)) / name(2) / file)
    content = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    elif damage == "cut":
        victim.write_bytes(content[:-10])
    else:
        victim.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    assert checkpoint.find(LocalStore(Path(str(store)))).name == name(1)
    if (damage, file) != ("missing", "manifest.json"):  # which is no checkpoint at all
        assert name(2) in capsys.readouterr().err
    with pytest.raises(UserError, match=name(2)):
        Checkpoint.at(victim.parent).verify()


def test_the_weights_of_another_model_are_refused(store, cluster):
    save(store, cluster, 1)
    found = checkpoint.find(store)
    found.meta["config"]["model"]["depth"] = 2
    with pytest.raises(UserError, match="do not fit the model"):
        checkpoint.load_model(found)


@pytest.mark.parametrize("hostile", ["../latest", "a/b", "/etc/passwd", ".."])
def test_a_manifest_cannot_point_out_of_its_folder(store, cluster, hostile):
    save(store, cluster, 1)
    place = Path(str(store)) / name(1) / "manifest.json"
    manifest = json.loads(place.read_text())
    manifest["files"][hostile] = {"size": 1, "sha256": ""}
    place.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="does not list the files"):
        Checkpoint.at(place.parent).verify()


HOSTILE = {
    "a piece beyond its parameter": lambda table, piece: piece.__setitem__(2, piece[2] + 1),
    "a piece before it": lambda table, piece: piece.__setitem__(1, -1),
    "a piece twice": lambda table, piece: next(iter(table["pieces"].values())).append(list(piece)),
    "a hole": lambda table, piece: piece.__setitem__(1, 1),
    "a piece of nothing known": lambda table, piece: piece.__setitem__(0, "unknown"),
    "a piece of a file that is not listed": lambda table, piece: table["pieces"].update(other=[]),
    "a shape of text": lambda table, piece: table["shapes"].__setitem__(piece[0], ["many"]),
    "a negative size": lambda table, piece: table["files"]["meta.json"].__setitem__("size", -5),
    "a size of another type": lambda table, piece: table["files"]["meta.json"].__setitem__("size", 5.0),
    "no pieces": lambda table, piece: table.pop("pieces"),
    "a list": lambda table, piece: table.__setitem__("files", []),
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_is_refused(store, cluster, hostile):
    save(store, cluster, 1)
    place = Path(str(store)) / name(1) / "manifest.json"
    table = json.loads(place.read_text())
    hostile(table, next(iter(table["pieces"].values()))[0])
    place.write_text(json.dumps(table))
    with pytest.raises(UserError, match=f"{name(1)} is torn"):
        Checkpoint.at(place.parent).verify()


def test_a_manifest_that_says_more_than_its_files_hold_is_refused(store, cluster):
    save(store, cluster, 1)
    place = Path(str(store)) / name(1) / "manifest.json"
    table = json.loads(place.read_text())
    piece = next(iter(table["pieces"].values()))[0]
    piece[2] += 1000
    table["shapes"][piece[0]] = [piece[2]]
    place.write_text(json.dumps(table))
    with pytest.raises(UserError, match="has less of weight:"):
        Checkpoint.at(place.parent).tensors("weight")


@pytest.mark.parametrize("file", ["rank-00000-x.safetensors", "meta.json", "manifest.json"])
def test_no_flipped_bit_goes_unnoticed(store, cluster, file):
    save(store, cluster, 1)
    victim = whole_path(Path(str(store)) / name(1) / file)
    content = victim.read_bytes()
    for place in range(0, len(content) - 1, max(1, len(content) // 500)):  # the last byte is an end of line
        victim.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match=name(1)):
            Checkpoint.at(victim.parent).verify()


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="torn"):
        Checkpoint.at(tmp_path).verify()
    (tmp_path / "meta.json").write_text('{"format": "other/9"}')
    with pytest.raises(UserError, match="other/9"):
        _ = Checkpoint.at(tmp_path).meta


def test_files_are_those_of_the_safetensors_library(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b:c": torch.randn(4)[::2], "none": torch.empty(0)}
    (tmp_path / "ours").write_bytes(pack(tensors))
    theirs = safetensors.torch.load_file(tmp_path / "ours")
    assert all(torch.equal(theirs[key], tensor) for key, tensor in tensors.items())
    safetensors.torch.save_file({"x": torch.randn(2, 3).bfloat16()}, tmp_path / "theirs")
    store = open_store(tmp_path)
    entry = read_header(lambda start, n: store.read("theirs", start, n), store.stat("theirs").size, "theirs")["x"]
    assert (entry.dtype, entry.shape, entry.end) == (torch.bfloat16, (2, 3), store.stat("theirs").size)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[" * 100_000,
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9999]}}',
        b'{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
        b'{"x": {"dtype": "OBJECT", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"x": 1}',
    ],
)
def test_hostile_headers_are_refused(header):
    content = struct.pack("<Q", len(header)) + header + bytes(8)
    for hostile in (content, struct.pack("<Q", 2**62) + content[8:], content[:4]):
        with pytest.raises(UserError, match="x is not a safetensors file"):
            read_header(lambda start, n, hostile=hostile: hostile[start : start + n], len(hostile), "x")
