"""Sets of images: sample files, folders of image files, encoded data sets, pipes; and what they refuse."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffussm.autoencoders.pixel import PixelCodec
from diffussm.data.encode import encode
from diffussm.data.sources.base import ArrayImages
from diffussm.data.store import open_store
from diffussm.errors import UserError
from diffussm.evaluation.images import NpzImages, open_images, random_subset, read_stream

pytestmark = pytest.mark.unit


@pytest.fixture
def data_set(tmp_path: Path, images: np.ndarray) -> Path:
    return encoded(tmp_path / "data", images)


def encoded(path: Path, images: np.ndarray) -> Path:
    source = ArrayImages("test", ["all"], images, np.zeros(len(images), np.int64))
    encode(source, PixelCodec(*images.shape[1:]), open_store(path), samples_per_shard=40)
    return path


def whole(path: Path | str, limit: int | None = None) -> np.ndarray:
    found = open_images(path, limit)
    return found.read(range(len(found)))


def as_set(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_sample_file_is_read_in_order(save, tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "samples.npz"
    save(path, images, labels=np.arange(90))
    np.testing.assert_array_equal(whole(path), images)
    np.testing.assert_array_equal(whole(path, 90), images)
    np.testing.assert_array_equal(open_images(path).read([5, 88, 3]), images[[5, 88, 3]])


def test_a_sample_file_is_not_in_memory(tmp_path: Path, images: np.ndarray) -> None:
    np.savez(tmp_path / "samples.npz", images)
    assert isinstance(NpzImages(tmp_path / "samples.npz")._images, np.memmap)


def test_an_array_in_fortran_order(tmp_path: Path, images: np.ndarray) -> None:
    np.savez(tmp_path / "samples.npz", np.asfortranarray(images))
    np.testing.assert_array_equal(whole(tmp_path / "samples.npz"), images)


def test_damage_in_the_midst_of_a_sample_file(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "samples.npz"
    np.savez(path, images)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"samples.npz: arr_0 is damaged"):
        open_images(path, 10).check()


def test_a_sample_file_that_is_shorter_than_it_says(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "samples.npz"
    buffer = io.BytesIO()
    np.save(buffer, images)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue()[:-5000])
    with pytest.raises(UserError, match=r"samples.npz: arr_0 is damaged"):
        open_images(path)


def test_an_array_that_says_it_is_longer_than_its_entry(tmp_path: Path, images: np.ndarray) -> None:
    """What lies behind it in the file would be taken for images."""
    path, arrays = tmp_path / "samples.npz", []
    for array in (images[:5], images):
        buffer = io.BytesIO()
        np.save(buffer, array)
        arrays.append(buffer.getvalue())
    short = arrays[1][:128] + arrays[0][128:]  # its header says 90
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", short)
        archive.writestr("other.npy", arrays[1])
    with pytest.raises(UserError, match=r"samples\.npz: arr_0 is damaged"):
        open_images(path)


@pytest.mark.parametrize("shape", ["(-1, 20, 24, 3)", f"({2**62}, 20, 24, 3)", "(90, 20, 24, " + "1" * 400 + ")"])
def test_shapes_that_cannot_be(shape: str, tmp_path: Path) -> None:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    with zipfile.ZipFile(tmp_path / "samples.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0" * 999)
    with pytest.raises(UserError, match=r"samples\.npz: arr_0 is damaged"):
        open_images(tmp_path / "samples.npz")


def test_a_member_without_the_ending(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "samples.npz", "w") as archive:
        archive.writestr("arr_0", b"hello")
    with pytest.raises(UserError, match=r"samples\.npz has no arr_0, only nothing"):
        open_images(tmp_path / "samples.npz")


def test_several_processes_do_not_each_unpack_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "samples.npz", np.zeros((9, 8, 8, 3), np.uint8))
    monkeypatch.setattr("diffussm.evaluation.images.LARGEST_COPY", 9 * 8 * 8 * 3)
    assert len(open_images(tmp_path / "samples.npz")) == 9
    with pytest.raises(UserError, match=r"samples\.npz: arr_0 is compressed.*numpy\.savez"):
        open_images(tmp_path / "samples.npz", alone=False)


def test_an_encoded_data_set_gives_its_very_images(data_set: Path, images: np.ndarray) -> None:
    found = whole(data_set)
    assert found.shape == images.shape
    assert as_set(found) == as_set(images)
    assert as_set(whole(f"file://{data_set}")) == as_set(images)


def test_grey_ones_of_an_encoded_data_set_become_rgb(tmp_path: Path, images: np.ndarray) -> None:
    grey = images[..., :1]
    assert as_set(whole(encoded(tmp_path / "grey", grey))) == as_set(grey.repeat(3, axis=3))


def test_a_subset_is_random_but_always_the_same(data_set: Path, images: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", images)
    for path in (data_set, tmp_path / "samples.npz"):
        found = whole(path, 30)
        assert len(as_set(found)) == 30 and as_set(found) < as_set(images)
        assert as_set(found) != as_set(whole(path)[:30])
        np.testing.assert_array_equal(found, whole(path, 30))


def test_a_subset_is_spread_over_the_whole() -> None:
    chosen = random_subset(10_000, 1000)
    assert len(set(chosen.tolist())) == 1000
    assert np.histogram(chosen, 10, (0, 10_000))[0].min() > 60  # 100 expected, standard deviation 9
    assert chosen[:4].tolist() == random_subset(10_000, 4).tolist()


@pytest.fixture
def folder(tmp_path: Path, images: np.ndarray) -> Path:
    """Six image files, two of them in a sub-folder."""
    path = tmp_path / "folder"
    (path / "more").mkdir(parents=True)
    for number, name in enumerate(("b.png", "a.bmp", "c.PNG", "d.tiff", "more/e.png", "more/f.png")):
        Image.fromarray(images[number]).save(path / name)
    (path / "notes.txt").write_text("no image")
    return path


def test_a_folder_of_image_files(folder: Path, images: np.ndarray) -> None:
    np.testing.assert_array_equal(whole(folder), images[[1, 0, 2, 3, 4, 5]])  # in the order of their names


def test_a_folder_of_any_images_is_cropped_as_for_encoding(folder: Path, images: np.ndarray) -> None:
    Image.fromarray(images[6, :, :, 0]).save(folder / "grey.png")
    Image.fromarray(images[7].repeat(2, axis=0)).convert("RGBA").save(folder / "large.png")
    found = open_images(folder, size=10)
    made = found.read(range(len(found)))
    assert made.shape == (8, 10, 10, 3)
    # as ADM does: 20×24 by averages to 10×12, of which the middle
    halved = images[0].reshape(10, 2, 12, 2, 3).mean((1, 3))[:, 1:11]
    assert np.abs(made[1] - halved).max() <= 1
    np.savez(folder / "samples.npz", images)  # stays as it is
    assert open_images(folder / "samples.npz", size=10).read([0]).shape == (1, 20, 24, 3)


BAD_FILES = {
    "of another size": (lambda path, image: Image.fromarray(image[:10]).save(path), "z.png is 24×10 and not 24×20"),
    "grey": (lambda path, image: Image.fromarray(image[..., 0]).save(path), r"z.png is grey \(L\), not RGB.*--size"),
    "grey and transparent": (lambda p, image: Image.fromarray(image).convert("LA").save(p), r"is transparent \(LA\)"),
    "transparent": (lambda p, image: Image.fromarray(image).convert("RGBA").save(p), r"is transparent \(RGBA\)"),
    "transparent by one colour": (lambda p, i: Image.fromarray(i).save(p, transparency=(1, 2, 3)), "is transparent"),
    "of a palette": (lambda p, image: Image.fromarray(image).convert("P").save(p), r"is coloured \(P\), not RGB"),
    "deep": (lambda path, image: save_deep(path, image), "z.png has 16 bits a channel"),
    "no image": (lambda path, image: path.write_bytes(b"hello"), "z.png cannot be decoded"),
    "torn": (lambda path, image: tear(path, image), "z.png cannot be decoded"),
}


def save_deep(path: Path, image: np.ndarray) -> None:
    """PNG, 16 bits a channel, which Pillow does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image.astype(np.uint16) * 257)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def tear(path: Path, image: np.ndarray) -> None:
    Image.fromarray(image).save(path)
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_folder_refuses_images_that_are_unlike(case: str, folder: Path, images: np.ndarray) -> None:
    save, message = BAD_FILES[case]
    save(folder / "z.png", images[0])
    with pytest.raises(UserError, match=message):
        whole(folder)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither images .* nor an encoded data set"):
        open_images(tmp_path)


def test_a_pipe_of_arrays(images: np.ndarray) -> None:
    pipe = io.BytesIO()
    for part in (images[:7], images[7:8], np.asfortranarray(images[8:])):
        np.save(pipe, part)
    pipe.seek(0)
    np.testing.assert_array_equal(np.concatenate(list(read_stream(pipe, "stdin"))), images)


@pytest.mark.parametrize("kind", ["text", "torn", "pickled", "float", "grey"])
def test_a_pipe_of_something_else(kind: str, images: np.ndarray) -> None:
    pipe = io.BytesIO()
    if kind == "text":
        pipe.write(b"hello")
    else:
        changed = {"pickled": np.array([{}], object), "float": images / 255, "grey": images[..., :1]}.get(kind, images)
        np.save(pipe, changed)
    pipe = io.BytesIO(pipe.getvalue()[:-1] if kind == "torn" else pipe.getvalue())
    with pytest.raises(UserError, match=r"^stdin: .*(numpy.save|uint8 \[n, height, width, 3\])"):
        list(read_stream(pipe, "stdin"))
