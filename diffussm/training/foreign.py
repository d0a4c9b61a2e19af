"""What a folder or a file is that is not this package's: told by names alone. Nothing is loaded, nothing unpickled."""

from __future__ import annotations

import functools
import io
import json
import pickletools
import zipfile
from collections.abc import Iterable
from pathlib import Path

from diffussm.data.store import Store, open_store
from diffussm.errors import UserError
from diffussm.training.checkpoint import MANIFEST, META
from diffussm.training.tensor_file import read_names

WANTED = "convert_checkpoint takes a run of diffussm, or one of its checkpoints"
OURS = "weights of DiffuSSM, converted already: train.init_from and diffusers take them as they are"
DEEPSPEED = (
    "a checkpoint of DeepSpeed's own, made of pickles, which are never unpickled here: where you trust it, run the "
    "zero_to_fp32.py that DeepSpeed left beside it with --safe_serialization; train.init_from takes the .safetensors "
    "if it is of a DiffuSSM"
)
UNKNOWN = f"a file of another program: {WANTED}"
TENSORS = {  # what has a tensor, or a key, of that name
    "blocks.0.ssm.log_A_real": OURS,
    "ds_version": DEEPSPEED,
    "blocks.0.adaLN_modulation.1.weight": f"a DiT or SiT checkpoint, which is another network: {WANTED}",
    "transformer_blocks.0.attn1.to_q.weight": f"a transformer of diffusers, such as DiT: {WANTED}",
    "model.diffusion_model.input_blocks.0.0.weight": f"a latent diffusion model with a UNet: {WANTED}",
    "input_blocks.0.0.weight": f"a UNet of ADM's kind: {WANTED}",
    "down_blocks.0.resnets.0.conv1.weight": f"a UNet of diffusers: {WANTED}",
    "encoder.down_blocks.0.resnets.0.conv1.weight": f"an autoencoder of diffusers: {WANTED}",
}
WRAPPERS = ("", "module.", "_orig_mod.", "model.")  # put before names by DataParallel, torch.compile, Lightning
OF_DEEPSPEED = (  # files of which one is in each of its folders
    "zero_to_fp32.py", "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
)  # fmt: skip
OF_RUNS = (MANIFEST, META, "config.yaml", "latest")  # one is in a run, its checkpoints and each of them
WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
HEAD_BYTES = 4 << 20  # of a pickle: names of parameters come before optimizers


def refuse_foreign(source: str) -> None:
    """Raise UserError where a path or URL is something well known that is not a run of diffussm or its checkpoint."""
    parent, slash, name = source.rstrip("/").rpartition("/")
    if name not in ("", ".", "..") and (store := open_store(parent or slash or ".")).exists(name):
        what = _file(store, name)
    else:
        what = _folder(open_store(source))
    if what:
        raise UserError(f"{source} is {what}")


def _file(store: Store, name: str) -> str:
    if name.endswith(".safetensors"):
        read = functools.partial(store.read, name)
        names: Iterable[str] = read_names(read, store.stat(name).size, f"{store}/{name}")
    else:
        names = _strings(store, name)
    known = (what for tensor, what in TENSORS.items() if any(f"{wrapper}{tensor}" in names for wrapper in WRAPPERS))
    return next(known, UNKNOWN)


def _strings(store: Store, name: str) -> set[str]:
    """Those in the head of what torch has saved, up to what is no pickle. It is read, not run."""
    found = set()
    try:
        pickled = _head(store, name)
        while True:  # before 1.6 torch wrote several, one after another
            for _, argument, _ in pickletools.genops(pickled):
                if type(argument) is str:
                    found.add(argument)
    except UserError:
        raise  # the store's
    except Exception:  # at the end, or sooner: zipfile and pickletools raise what they like
        return found


def _head(store: Store, name: str) -> io.BytesIO:
    file = _Ranges(store, name)
    if not zipfile.is_zipfile(file):
        return io.BytesIO(store.read(name, 0, HEAD_BYTES))
    with zipfile.ZipFile(file) as archive:
        pickled = next(entry for entry in archive.namelist() if entry.endswith("data.pkl"))
        with archive.open(pickled) as entry:
            return io.BytesIO(entry.read(HEAD_BYTES))


class _Ranges(io.RawIOBase):
    """An object of a store as a file that is read here and there."""

    def __init__(self, store: Store, name: str) -> None:
        self.read_range, self.size, self.at = functools.partial(store.read, name), store.stat(name).size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        if self.at < 0:
            raise OSError("before the file's start")  # as zipfile expects it
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: memoryview) -> int:
        data = self.read_range(self.at, max(0, min(len(buffer), self.size - self.at)))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def _folder(store: Store) -> str:
    for table in ("model_index.json", "config.json"):
        if store.exists(table):
            try:
                kind = json.loads(bytes(store.read(table)))["_class_name"]
            except (ValueError, TypeError, KeyError):
                continue
            if kind in ("DiffuSSMPipeline", "DiffuSSMModel"):
                return OURS
            return f"a {kind if isinstance(kind, str) else kind[-1]} of diffusers: {WANTED}"
    if any(map(store.exists, OF_DEEPSPEED)):
        return DEEPSPEED
    if store.exists("latest") and bytes(store.read("latest")).startswith(b"global_step"):
        return DEEPSPEED
    if not any(map(store.exists, OF_RUNS)):
        for name in filter(store.exists, _weights_in(store)):
            what = _file(store, name)
            return "" if what == UNKNOWN else f"a folder with {name}, {what}"
    return ""


def _weights_in(store: Store) -> list[str]:
    """Names of files of weights at the top, or in checkpoints/. On a disk the folders further down are not walked."""
    if "://" in str(store):
        names = list(store.list())
    else:
        root = Path(str(store))
        names = [path.relative_to(root).as_posix() for at in ("*", "checkpoints/*") for path in root.glob(at)]
    return sorted(name for name in names if name.endswith(WEIGHTS) and "/" not in name.removeprefix("checkpoints/"))
