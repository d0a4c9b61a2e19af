"""What a folder or a file is that is not this package's: told by names alone. Nothing is loaded, nothing unpickled."""

from __future__ import annotations

import functools
import json
import pickletools
import zipfile
from collections.abc import Iterable

from diffussm.data.store import Store, open_store
from diffussm.errors import UserError
from diffussm.training.tensor_file import read_header

WANTED = "convert_checkpoint takes a run of diffussm, or one of its checkpoints"
OURS = "weights of DiffuSSM, converted already: train.init_from and diffusers take them as they are"
DEEPSPEED = (
    "a checkpoint of DeepSpeed's own, made of pickles, which are never unpickled here: where you trust it, run the "
    "zero_to_fp32.py that DeepSpeed left beside it with --safe_serialization; train.init_from takes the .safetensors "
    "if it is of a DiffuSSM"
)
TENSORS = {  # what has tensors, or keys, that end so; the first that fits
    "blocks.0.ssm.log_A_real": OURS,
    "ds_version": DEEPSPEED,
    "blocks.0.attn.qkv.weight": f"a DiT checkpoint, which is another network: {WANTED}",
    "transformer_blocks.0.attn1.to_q.weight": f"a transformer of diffusers, such as DiT: {WANTED}",
    "model.diffusion_model.input_blocks.0.0.weight": f"a latent diffusion model with a UNet: {WANTED}",
    "input_blocks.0.0.weight": f"a UNet of ADM's kind: {WANTED}",
    "down_blocks.0.resnets.0.conv1.weight": f"a UNet or an autoencoder of diffusers: {WANTED}",
}
OF_DEEPSPEED = (  # files of which one is in each of its folders
    "zero_to_fp32.py", "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
)  # fmt: skip
PICKLES = (".pt", ".pth", ".ckpt", ".bin")


def refuse_foreign(source: str) -> None:
    """Raise UserError where a path or URL is something well known that is not a run of diffussm or its checkpoint."""
    parent, slash, name = source.rstrip("/").rpartition("/")
    if name.endswith((".safetensors", *PICKLES)) and (store := open_store(parent or slash or ".")).exists(name):
        what = _file(store, name)
    else:
        what = _folder(open_store(source))
    if what:
        raise UserError(f"{source} is {what}")


def _file(store: Store, name: str) -> str:
    if name.endswith(".safetensors"):
        names: Iterable[str] = read_header(functools.partial(store.read, name), store.stat(name).size, name)
    else:
        names = _strings(f"{store}/{name}")
    for end, what in TENSORS.items():
        if any(name == end or name.endswith(f".{end}") for name in names):
            return what
    return f"a file of another program: {WANTED}"


def _strings(path: str) -> set[str]:
    """Those in the pickle of a file that torch has saved: it is read, not run."""
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            return {argument for _, argument, _ in pickletools.genops(archive.read(pickled)) if type(argument) is str}
    except (OSError, ValueError, zipfile.BadZipFile):
        return set()


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
    return ""
