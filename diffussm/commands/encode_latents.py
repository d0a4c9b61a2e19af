"""Encode images into latent shards: `tools/encode_latents.py`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from diffussm.autoencoders.codec import Codec
from diffussm.autoencoders.kl import AutoencoderKLCodec
from diffussm.autoencoders.pixel import PixelCodec
from diffussm.commands.common import Parser, emit_json
from diffussm.commands.figures import data_figures, print_data_figures
from diffussm.data.encode import SAMPLES_PER_SHARD, encode
from diffussm.data.index import INDEX_NAME, Index
from diffussm.data.normalisation import RUN, Statistics, spread_ids
from diffussm.data.prepare import raw_folder
from diffussm.data.reader import SampleReader
from diffussm.data.records import RECORD_PREFIX
from diffussm.data.sources import SOURCES, SPLITS, open_source
from diffussm.data.store import Store, open_store
from diffussm.training.cluster import choose_device
from diffussm.training.workers import join

NOT_FOR = {  # options that make no sense there
    "fashion-mnist": ("input", "classes"),
    "webdataset": ("split", "raw", "samples_per_shard"),  # each tar makes one shard
}
CODECS = ("pixel", "autoencoder-kl")
AUTOENCODER = "stabilityai/sd-vae-ft-ema"
EXAMPLES = """\
python tools/encode_latents.py --source fashion-mnist --codec pixel --out data/fashion32
  python tools/encode_latents.py --source folder --input imagenet/train --size 256 --flip --out s3://bucket/imagenet256
  torchrun --nproc-per-node 8 tools/encode_latents.py --source lsun --input church_lmdb --resize box --out data/church
  mpirun -np 8 --bind-to none python tools/encode_latents.py --source webdataset --input s3://bucket/in --out data/x"""


def main() -> None:
    arguments = parse_arguments()
    splits = [arguments.split] if arguments.split or arguments.source != "fashion-mnist" else SPLITS
    reports = []
    with join() as workers:
        for split in splits:
            store = open_store(arguments.out if len(splits) == 1 else f"{arguments.out}/{split}")
            source = open_source(
                arguments.source, arguments.input, split=split, size=arguments.size, resize=arguments.resize,
                raw=arguments.raw, classes=arguments.classes,
            )  # fmt: skip
            codec = open_codec(arguments, workers.local_rank)
            begun, start = store.exists(INDEX_NAME) or store.list(RECORD_PREFIX), time.perf_counter()
            index = encode(
                source, codec, store, arguments.samples_per_shard, arguments.seed,
                flip=arguments.flip, on_bad_image=arguments.on_bad_image, workers=workers, share=arguments.share,
            )  # fmt: skip
            if workers.rank == 0 and index is None:
                print(f"{store}: this share is finished; whoever finishes the last one makes the index")
            elif workers.rank == 0:
                seconds = time.perf_counter() - start
                reports.append(describe(store, index))
                reports[-1]["images_per_second"] = None if begun else len(index) / seconds
                if arguments.json != "-":
                    print_data_figures(reports[-1])
    if reports:
        emit_json(arguments.json, reports)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "Encode images into tar shards of latents with an index, by any number of processes. "
        "What was interrupted is run again, by as many as you like, and goes on.",
        EXAMPLES,
    )
    add = parser.add_argument
    add("--source", required=True, choices=SOURCES, help="what the images are")
    add("--input", metavar="PATH", help="where they are: a folder, an LMDB, tars, or s3://bucket/prefix of tars")
    add("--split", choices=SPLITS, help="of fashion-mnist: one split, into OUT (default: each, into OUT/SPLIT)")
    add("--classes", type=int, metavar="N", help="of webdataset: how many classes its labels name")
    add("--size", type=int, default=256, metavar="PIXELS", help="side of the square images (default: %(default)s)")
    add("--resize", default="adm", choices=("adm", "box", "lanczos"), help="how they come to it (default: %(default)s)")
    add("--codec", choices=CODECS, help="what encodes them (default: pixel for fashion-mnist, else autoencoder-kl)")
    add("--autoencoder", default=AUTOENCODER, metavar="ID", help="hub id or folder (default: %(default)s)")
    add("--dtype", default="float16", choices=("float16", "float32"), help="its latents are kept in (default: float16)")
    add("--flip", action="store_true", help="also encode the mirror of each image: twice the samples")
    add("--on-bad-image", default="stop", choices=("stop", "skip"), help="skip: leave it out, list it (default: stop)")
    add("--out", required=True, help="folder or s3://bucket/prefix for the shards and the index")
    add("--samples-per-shard", type=int, metavar="N", help="(default: 4096; of webdataset: what each tar has)")
    add("--share", type=share, default=(0, 1), metavar="I/N", help="only every N-th shard, from the I-th (0 to N - 1)")
    add("--seed", type=int, default=0, metavar="N", help="of the samples' order (default: 0)")
    add("--raw", type=Path, metavar="FOLDER", help="of fashion-mnist: where its files are (default: beside OUT)")
    parser.add_json_option()
    arguments = parser.parse_args()
    for name in NOT_FOR.get(arguments.source, ("split", "raw", "classes")):
        if getattr(arguments, name) is not None:
            parser.error(f"--{name.replace('_', '-')} does not go with --source {arguments.source}")
    if arguments.samples_per_shard is None:
        arguments.samples_per_shard = SAMPLES_PER_SHARD
    for option, value in (("--size", arguments.size), ("--samples-per-shard", arguments.samples_per_shard)):
        if value < 1:
            parser.error(f"{option} must be at least 1")
    if not 0 <= arguments.seed < 2**63:
        parser.error("--seed must be from 0 to 2^63 - 1")
    if arguments.source == "fashion-mnist":
        beside = "data/x" if "://" in arguments.out else arguments.out
        arguments.raw = arguments.raw or raw_folder(beside, arguments.source)
    arguments.codec = arguments.codec or CODECS[arguments.source != "fashion-mnist"]
    return arguments


def share(text: str) -> tuple[int, int]:
    """The type of --share."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1, such as 0/16")
    return int(index), int(count)


def open_codec(arguments: argparse.Namespace, local_rank: int) -> Codec:
    """The codec for images of the source, on this process's GPU where there is one."""
    if arguments.codec == "pixel" and arguments.source == "fashion-mnist":
        return PixelCodec(28, 28, 1)
    if arguments.codec == "pixel":
        return PixelCodec(arguments.size, arguments.size, 3, size=arguments.size + arguments.size % 2)
    device = choose_device(local_rank)
    return AutoencoderKLCodec.open(arguments.autoencoder, arguments.size, arguments.dtype, str(device))


def describe(store: Store, index: Index) -> dict[str, Any]:
    """The data set's figures; latents are read back for them, and so checked."""
    reader, ids, statistics = SampleReader(store, index), spread_ids(len(index)), None
    for start in range(0, len(ids), RUN):  # all at once may be gigabytes
        of_run = Statistics.of(reader.read(ids[start : start + RUN])[0], index.latent_shape[0])
        statistics = statistics + of_run if statistics else of_run
    return data_figures(store, index, statistics)
