from __future__ import annotations

import errno
import io
import multiprocessing
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest
from PIL import Image

from diffussm.data.sources import open_source
from diffussm.data.sources.base import BadImage, ImageSource, Item
from diffussm.data.store import LocalStore
from diffussm.errors import UserError

pytestmark = pytest.mark.unit


def picture(shade: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 16), (shade, 0, 255 - shade)).save(file, kind, lossless=True)
    return file.getvalue()


def items(source: ImageSource, samples_per_shard: int = 4, seed: int = 0) -> list[list[Item]]:
    return [list(part()) for part in source.parts(samples_per_shard, seed)]


def shades(parts: list[list[Item]]) -> list[tuple[str, int, int]]:
    """Name, label and shade of each item."""
    return [(item.name, item.label, int(item.load()[0, 0, 0])) for part in parts for item in part]


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Three classes of 3 images each; and what lies about."""
    files = {f"n0{c}/{c}_{i}.{'JPEG' if i else 'png'}": picture(10 * c + i) for c in (2, 0, 1) for i in range(3)}
    return write(tmp_path / "imagenet", files | {"n00/.hidden.png": b"", ".cache/x.png": b"", "n01/notes.txt": b"?"})


def test_a_sub_folder_is_a_class(imagenet: Path) -> None:
    source = open_source("folder", str(imagenet), size=16)
    assert source.class_names == ["n00", "n01", "n02"] and source.count == 9
    parts = items(source)
    assert [len(part) for part in parts] == [4, 4, 1]
    found = shades(parts)
    expected = [(f"n0{c}/{c}_{i}.{'JPEG' if i else 'png'}", c, 10 * c + i) for c in range(3) for i in range(3)]
    assert sorted(found) == sorted(expected) != found
    assert shades(items(source)) == found != shades(items(source, seed=1))
    assert parts[0][0].load().shape == (16, 16, 3)


def test_a_folder_without_classes_and_one_with_both(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", {f"{i}.png": picture(i) for i in range(5)})
    source = open_source("folder", str(plain), size=16)
    assert source.class_names == [] and {item.label for part in items(source) for item in part} == {0}
    write(plain, {"class/6.png": picture(6)})
    with pytest.raises(UserError, match=r"holds classes, such as class, and images beside them: move 0\.png"):
        open_source("folder", str(plain))
    with pytest.raises(UserError, match="holds no images"):
        open_source("folder", str(write(tmp_path / "empty", {"a/readme.txt": b"x"})))
    with pytest.raises(UserError, match="is not a folder"):
        open_source("folder", str(tmp_path / "nowhere"))


def test_fingerprints_change_with_what_comes_out(imagenet: Path) -> None:
    def fingerprint(**options: object) -> str:
        return open_source("folder", str(imagenet), **{"size": 16, **options}).fingerprint()

    first = fingerprint()
    assert first == fingerprint() and len({first, fingerprint(size=8), fingerprint(resize="box")}) == 3
    (imagenet / "n00/0_0.png").rename(imagenet / "n01/0_0.png")
    assert fingerprint() != first


def test_a_broken_file_is_a_bad_image_when_it_is_loaded(imagenet: Path) -> None:
    (imagenet / "n01/1_2.JPEG").write_bytes(b"not an image")
    loads = {item.name: item.load for part in items(open_source("folder", str(imagenet), size=16)) for item in part}
    loads.pop("n01/1_0.png")()
    with pytest.raises(BadImage, match="cannot identify image file"):
        loads["n01/1_2.JPEG"]()


def test_a_link_to_nothing_is_a_bad_image_too(imagenet: Path) -> None:
    (imagenet / "n01/1_9.png").symlink_to("nowhere.png")
    source = open_source("folder", str(imagenet), size=16)
    loads = {item.name: item.load for part in items(source) for item in part}
    assert source.count == 10
    with pytest.raises(BadImage, match="it is a link to a file that is not there"):
        loads["n01/1_9.png"]()


def test_links_to_folders_are_followed_unless_they_go_round_in_circles(imagenet: Path, tmp_path: Path) -> None:
    write(tmp_path / "more", {"x/0.png": picture(7), "x/deep/1.png": picture(8)})
    (imagenet / "n03").symlink_to(tmp_path / "more/x")
    (imagenet / "n04").symlink_to(tmp_path / "more/x")  # twice is no circle
    source = open_source("folder", str(imagenet), size=16)
    assert source.class_names == ["n00", "n01", "n02", "n03", "n04"] and source.count == 13
    link = tmp_path / "more/x/deep/back"
    for target, where in ((imagenet, "n0[34]/deep/back"), (link.parent, "n0[34]/deep/back"), (tmp_path, ".*")):
        link.symlink_to(target)
        with pytest.raises(UserError, match=rf"imagenet/{where} is a link to a folder that it lies in: remove it"):
            open_source("folder", str(imagenet), size=16)
        link.unlink()


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(imagenet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(folder: Path | str) -> object:
        if str(folder).endswith("n01"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OSError, match=r"Input/output error: '.*/n01'"):
        open_source("folder", str(imagenet), size=16)


@pytest.mark.parametrize("kind", ["lsun", "webdataset"])
def test_a_source_of_which_an_image_is_mended_is_the_same_with_another_version(kind: str, lsun: Path, tars: Path):
    def look() -> tuple[str, list[list[tuple[str, int | str]]]]:
        source = open_source(kind, str(lsun if kind == "lsun" else tars), size=16, classes=4)
        return source.fingerprint(), [list(files()) for files in source.files(4, 0)]

    fingerprint, files = look()
    assert [len(part) for part in files] == ([4, 4, 2] if kind == "lsun" else [1, 1, 1])
    if kind == "lsun":
        assert [[name for name, _ in part] for part in files] == [
            [item.name for item in part] for part in items(open_source(kind, str(lsun), size=16))
        ]
        mend = multiprocessing.get_context("spawn").Process(target=put_into_lmdb, args=(lsun, 3, b"mended"))
        mend.start()
        mend.join()
    else:
        make_tar(tars / "in-001.tar", [("x.cls", b"1"), ("x.png", picture(1))])
    again, now = look()
    assert again == fingerprint
    changed = [
        (old, new)
        for part, after in zip(files, now, strict=True)
        for old, new in zip(part, after, strict=True)
        if old != new
    ]
    ((old, new),) = changed
    assert old[0] == new[0] == (f"{3:040x}" if kind == "lsun" else f"{tars}/in-001.tar")
    assert kind == "webdataset" or new[1] == len(b"mended")


def put_into_lmdb(path: Path, number: int, content: bytes) -> None:
    with lmdb.open(str(path), map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
        transaction.put(f"{number:040x}".encode(), content)


@pytest.fixture
def lsun(tmp_path: Path) -> Path:
    path = tmp_path / "church_lmdb"
    with lmdb.open(str(path), map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
        for i in range(10):
            transaction.put(f"{i:040x}".encode(), picture(i, "WEBP" if i % 2 else "PNG"))
    return path


def test_lsun_from_its_lmdb(lsun: Path) -> None:
    source = open_source("lsun", str(lsun), size=16, resize="box")
    assert source.count == 10 and source.class_names == []
    found = shades(items(source))
    assert sorted(name for name, _, _ in found) == [f"{i:040x}" for i in range(10)]
    assert all(label == 0 and abs(shade - int(name, 16)) <= 2 for name, label, shade in found)
    child = os.fork()  # processes of a launcher that forks open their own
    if child == 0:
        os._exit(0 if shades(items(source)) == found else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    again = open_source("lsun", str(lsun), size=16, resize="box")
    assert again.fingerprint() == source.fingerprint() != open_source("lsun", str(lsun), size=16).fingerprint()


def test_lsun_as_its_tool_exports_it(tmp_path: Path) -> None:
    root = write(tmp_path / "church", {f"{i % 2}/{i % 3}/{i:040x}.webp": picture(i, "WEBP") for i in range(10)})
    source = open_source("lsun", str(root), size=16, resize="box")
    assert source.count == 10 and source.class_names == []
    assert {label for _, label, _ in shades(items(source))} == {0}


def test_an_lmdb_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be opened as an LMDB"):
        open_source("lsun", str(write(tmp_path / "broken", {"data.mdb": b"x" * 9000})))


def make_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    for shard in range(3):
        members = []
        for i in range(4):
            key = f"a/{shard}{i}"
            label = ("cls", b"%d" % i) if shard else ("json", b'{"label": %d, "x": "y"}' % i)
            members += [
                (f"{key}.{label[0]}", label[1]),
                (f"{key}.JPG", picture(10 * shard + i)),
                (f"{key}.txt", b"caption"),
            ]
        make_tar(tmp_path / f"tars/in-{shard:03d}.tar", [*members, ("__meta__/a.json", b"{}")])
    return tmp_path / "tars"


@pytest.mark.parametrize("urls", ["{}", "{}/in-*.tar", "{}/in-{{000..002}}.tar", "file://{}"])
def test_tars_in_their_own_order_one_a_shard(tars: Path, urls: str) -> None:
    source = open_source("webdataset", urls.format(tars), size=16, classes=4)
    assert source.count is None and source.class_names == ["0", "1", "2", "3"]
    parts = items(source)
    assert [[item.label for item in part] for part in parts] == [[0, 1, 2, 3]] * 3
    assert [shade for _, _, shade in shades(parts)] == [10 * shard + i for shard in range(3) for i in range(4)]
    assert parts[1][2].name.endswith("in-001.tar: a/12")
    assert shades(items(source)) == shades(parts)


def test_a_pattern_of_tars_lists_no_more_of_a_bucket_than_it_must(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, list_all = [], LocalStore.list
    monkeypatch.setattr(LocalStore, "list", lambda self, prefix="": asked.append(prefix) or list_all(self, prefix))
    for pattern, found in (("in-00[01].tar", 2), ("in-*", 3), ("*.tar", 3)):
        name = pattern if pattern.endswith(".tar") else f"{pattern}.tar"
        assert len(open_source("webdataset", f"{tars}/{name}", classes=0).parts(1, 0)) == found
    assert asked == ["in-00", "in-", ""]


def test_labels_of_tars_are_taken_or_left_by_intention(tars: Path) -> None:
    source = open_source("webdataset", str(tars), size=16, classes=0)
    assert source.class_names == [] and {item.label for part in items(source) for item in part} == {0}
    with pytest.raises(UserError, match="a/00 has a label: give --classes N, or --classes 0"):
        items(open_source("webdataset", str(tars), size=16))
    with pytest.raises(UserError, match="a/03 has label 3, not one of 0 to 2"):
        items(open_source("webdataset", str(tars), size=16, classes=3))
    make_tar(tars / "in-000.tar", [("x.cls", b"one"), ("x.png", picture(1))])
    with pytest.raises(UserError, match="x: its label is not a number"):
        items(open_source("webdataset", str(tars), size=16, classes=4))


def read_one(path: Path) -> list[list[Item]]:
    return items(open_source("webdataset", str(path), size=16, classes=0))


def cut(position: Callable[[tarfile.TarInfo], int]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with tarfile.open(path) as tar:
            end = position(tar.getmembers()[7])
        path.write_bytes(path.read_bytes()[:end])

    return damage


def zero_a_header(path: Path) -> None:
    with tarfile.open(path) as tar:
        start = tar.getmembers()[7].offset
    content = bytearray(path.read_bytes())
    content[start : start + 512] = bytes(512)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [cut(lambda m: m.offset), cut(lambda m: m.offset_data), cut(lambda m: m.offset_data + 50), zero_a_header],
    ids=["at a member's boundary", "after a header", "in a member", "a zeroed header"],
)
def test_a_torn_tar_is_an_error_and_never_fewer_images(tars: Path, damage: Callable[[Path], None]) -> None:
    path = tars / "in-001.tar"
    assert len(read_one(path)[0]) == 4
    damage(path)
    with pytest.raises(UserError, match=r"in-001\.tar is damaged after byte \d+"):
        read_one(path)


def test_a_tar_that_cannot_be_read_is_one_line(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    source = open_source("webdataset", str(tars), size=16, classes=4)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(UserError, match=r"in-000\.tar cannot be read: Input/output error: mend that and run"):
        items(source)


@pytest.mark.parametrize("name", ["/etc/x.png", "../x.png", "a/../../x.png"])
def test_members_that_point_outside_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="is not a file inside the tar"):
        read_one(make_tar(tmp_path / "x.tar", [(name, picture(1))]))


def test_links_are_refused_and_pickles_never_read(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = make_tar(tmp_path / "x.tar", [("x.png", picture(3)), ("x.pyd", pickle.dumps(Bomb())), ("x.pth", b"?")])
    assert shades(read_one(path))[0][2] == 3 and not (tmp_path / "exploded").exists()
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("x.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(UserError, match=r"'x\.png' is not a file inside the tar"):
        read_one(path)


def test_a_sample_without_an_image_and_no_tars_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"y has no image .*, only txt"):
        read_one(make_tar(tmp_path / "x.tar", [("x.png", picture(1)), ("y.txt", b"")]))
    with pytest.raises(UserError, match="there are no tars"):
        open_source("webdataset", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="there is no such tar"):
        open_source("webdataset", str(tmp_path / "nowhere.tar"))
