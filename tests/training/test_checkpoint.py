"""Nothing torn or foreign is loaded, and any cut of the parameters is read."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from training.saving import name, save, whole_path

from diffussm.data.store import LocalStore, open_store
from diffussm.errors import UserError
from diffussm.training import checkpoint
from diffussm.training.checkpoint import Checkpoint
from diffussm.training.tensor_file import pack, read_header

pytestmark = pytest.mark.unit


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
