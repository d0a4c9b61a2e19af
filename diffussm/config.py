"""A run's configuration: typed dataclasses, YAML in, dotted overrides, every check before work begins.

--config fashion32              one of diffussm/configs/, or a path to a YAML file
--train.lr 2e-4                 overrides one key of it
--deepspeed zero2               DeepSpeed's own: one of ds_configs/, or a path to a JSON file
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import jsonargparse
import yaml

from diffussm.errors import UserError
from diffussm.models.diffussm import ModelConfig
from diffussm.ops.s4d import Backend

CONFIGS = Path(__file__).parent / "configs"
DEFAULT = "fashion32"
PACKED = Path(__file__).parent / "ds_configs"  # where a wheel has them; a checkout has them beside the package
DS_CONFIGS = PACKED if PACKED.is_dir() else Path(__file__).parent.parent / "ds_configs"


@dataclass
class DiffusionConfig:
    """The forward process and its labels.

    Attributes:
        steps: T, timesteps of the linear schedule.
        label_drop: probability that a training image loses its class, for classifier-free guidance.
    """

    steps: int = 1000
    label_drop: float = 0.1


@dataclass
class DataConfig:
    """The latents.

    Attributes:
        path: folder or s3:// URL of the training shards and their index.
        cache: folder of a local disk where a node keeps the shards that it has fetched; null: none.
        cache_gib: what that folder may hold, GiB.
        autoencoder: hub id or folder of the weights that decode samples; null: where the data set was encoded from.
        reference: what samples are scored against: a data set that was encoded without loss, an .npz or a folder of
            images, or the file that `tools/eval_fid.py --write-reference` makes of them.
        prepare: a data set that is fetched and encoded when ``path`` has no index yet: fashion-mnist.
    """

    path: str = "data/imagenet256/train"
    cache: str | None = None
    cache_gib: float = 100.0
    autoencoder: str | None = None
    reference: str | None = None
    prepare: str | None = None


@dataclass
class SampleConfig:
    """How the pictures that training draws, and by default `tools/sample.py`, are made.

    Attributes:
        sampler: ancestral, ddim or dpm++, which is DPM-Solver++ 2M.
        steps: of the respaced schedule.
        guidance: scale of classifier-free guidance; 1 is none.
        grid: images of a training grid, spread over the classes.
    """

    sampler: Literal["ancestral", "ddim", "dpm++"] = "ancestral"
    steps: int = 250
    guidance: float = 1.0
    grid: int = 16


@dataclass
class ScoreConfig:
    """FID of the averaged weights while training, against data.reference; into the log as fid/EXTRACTOR.

    Attributes:
        every_images: between two scores; each is followed by a checkpoint; 0: none.
        images: drawn for a score, spread over the classes. The fewer, the higher the figure comes out: it tells the
            scores of a run apart, and is not to be published.
        extractor: whose features are compared.
        inception_weights: file of the weights of inception-2015; null: they are downloaded once.
        sampler: ancestral, ddim or dpm++.
        steps: of the respaced schedule.
        guidance: scale of classifier-free guidance; 1 is none.
        batch: images at once, of a rank.
    """

    every_images: int = 0
    images: int = 1000
    extractor: Literal["efficientnet-lite0", "inception-2015"] = "efficientnet-lite0"
    inception_weights: str | None = None
    sampler: Literal["ancestral", "ddim", "dpm++"] = "dpm++"
    steps: int = 25
    guidance: float = 1.0
    batch: int = 32

    @property
    def metric(self) -> str:
        """The figure's name in the log."""
        return f"fid/{self.extractor}"


@dataclass
class TrainConfig:
    """The optimisation. All intervals are in images seen; the defaults are the paper's.

    Attributes:
        seed: of the weights, the order of the data and every draw.
        total_images: where the run ends.
        global_batch: images an optimizer step, over all ranks and accumulated micro-batches.
        micro_batch: images a rank and forward pass; null: as many as need no accumulation.
        activation_checkpointing: keep only each block's input for the backward pass, which computes the rest again: far
            less memory for a third more computation.
        precision: bf16 is autocast over fp32 weights; auto takes it where the hardware multiplies bf16, else fp32.
        ssm_backend: fft or chunked; auto times both on the run's shapes at its start, and the run keeps the faster.
        lr: learning rate of the dense weights.
        ssm_lr: learning rate of the state space parameters; null: the same.
        betas: of AdamW.
        weight_decay: of the dense weights; the state space parameters have none.
        clip: largest norm of the gradient; 0: no clipping.
        warmup_images: the learning rate rises linearly over them.
        decay_images: the learning rate falls linearly to 0 over the last of them; 0: constant.
        ema_images: length of the weights' moving average, or several; the first is drawn from. Decay 0.9999 at 256
            images a step is 2.56e6.
        log_images: between two records of the log.
        checkpoint_images: between two checkpoints.
        sample_images: between two grids of samples; 0: none.
        checkpoints: folder or s3:// URL of the checkpoints; null: checkpoints/ in the run's folder.
        keep_checkpoints: how many of the newest to keep.
        keep_every_images: keep, too, the first past each multiple of so many; 0: none.
        keep_best: keep, too, the one with the least value of this scalar of the log, such as loss/total or
            fid/efficientnet-lite0; null: none.
        resume: auto goes on from the run's newest complete checkpoint; none needs a new run; else the path or s3:// URL
            of a checkpoint, for a new run.
        init_from: path or s3:// URL that a new run takes its first weights from, whatever resolution they were trained
            at: a checkpoint, of which the first average counts; a converted pipeline; a .safetensors file; or what
            torch.load reads with weights_only.
        compile: backend of torch.compile, such as inductor; null: none.
        max_hours: after them the run saves and stops, as at SIGTERM; 0: no limit.
        hang_minutes: without progress, after which every rank shows where it hangs and ends; 0: never.
        max_skipped: steps in a row whose loss or gradient is not finite, which are skipped, before the run stops.
    """

    seed: int = 0
    total_images: int = 660_000_000
    global_batch: int = 256
    micro_batch: int | None = None
    activation_checkpointing: bool = False
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    ssm_backend: Backend = "auto"
    lr: float = 1e-4
    ssm_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup_images: int = 0
    decay_images: int = 0
    ema_images: float | list[float] = 2.56e6
    log_images: int = 25_600
    checkpoint_images: int = 1_280_000
    sample_images: int = 1_280_000
    checkpoints: str | None = None
    keep_checkpoints: int = 2
    keep_every_images: int = 0
    keep_best: str | None = None
    resume: str = "auto"
    init_from: str | None = None
    compile: str | None = None
    max_hours: float = 0.0
    hang_minutes: float = 30.0
    max_skipped: int = 10

    @property
    def ema_lengths(self) -> list[float]:
        """``ema_images`` as a list."""
        return list(self.ema_images) if isinstance(self.ema_images, list) else [self.ema_images]


@dataclass
class Config:
    """Everything that a run is made from.

    Attributes:
        run_dir: folder of the run: config.yaml, log.jsonl, tensorboard/, checkpoints/, samples/, scores.json.
    """

    run_dir: str = "runs/default"
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def check(self) -> None:
        """Raise UserError, naming the key and a value that would do, on what cannot be trained."""
        self.model.resolved()
        train = self.train
        for key, ok, want in (
            ("data.cache_gib", self.data.cache_gib > 0, "positive"),
            ("diffusion.steps", self.diffusion.steps >= 2, "at least 2, usually 1000"),
            ("diffusion.label_drop", 0 <= self.diffusion.label_drop < 1, "in [0, 1), usually 0.1"),
            ("sample.steps", 1 <= self.sample.steps <= self.diffusion.steps, f"in 1..{self.diffusion.steps}"),
            ("sample.grid", self.sample.grid >= 1, "at least 1"),
            ("score.every_images", self.score.every_images >= 0, "≥ 0; 0 scores nothing"),
            ("score.images", self.score.images >= 2, "at least 2, usually 1000"),
            ("score.steps", 1 <= self.score.steps <= self.diffusion.steps, f"in 1..{self.diffusion.steps}"),
            ("score.batch", self.score.batch >= 1, "at least 1"),
            ("train.seed", 0 <= train.seed < 2**63, "in 0..2**63 - 1"),
            (
                "train.total_images",
                train.total_images >= train.global_batch,
                f"≥ train.global_batch {train.global_batch}",
            ),
            ("train.global_batch", train.global_batch >= 1, "at least 1"),
            ("train.micro_batch", train.micro_batch is None or train.micro_batch >= 1, "at least 1, or null"),
            ("train.lr", train.lr > 0, "positive"),
            ("train.ssm_lr", train.ssm_lr is None or train.ssm_lr > 0, "positive, or null"),
            ("train.betas", all(0 <= beta < 1 for beta in train.betas), "in [0, 1), usually 0.9 and 0.999"),
            ("train.weight_decay", train.weight_decay >= 0, "≥ 0"),
            ("train.clip", train.clip >= 0, "≥ 0"),
            ("train.warmup_images", train.warmup_images >= 0, "≥ 0"),
            ("train.decay_images", 0 <= train.decay_images <= train.total_images, "in 0..train.total_images"),
            (
                "train.ema_images",
                len({round(n) for n in train.ema_lengths if n >= 1}) == len(train.ema_lengths) > 0,
                "at least 1, and each another",
            ),
            ("train.log_images", train.log_images >= 1, "at least 1"),
            ("train.checkpoint_images", train.checkpoint_images >= 1, "at least 1"),
            ("train.sample_images", train.sample_images >= 0, "≥ 0; 0 draws no samples"),
            ("train.keep_checkpoints", train.keep_checkpoints >= 1, "at least 1"),
            ("train.keep_every_images", train.keep_every_images >= 0, "≥ 0; 0 keeps none beside the newest"),
            ("train.max_hours", train.max_hours >= 0, "≥ 0; 0 is no limit"),
            ("train.hang_minutes", train.hang_minutes >= 0, "≥ 0; 0 never ends a run that hangs"),
            ("train.max_skipped", train.max_skipped >= 0, "≥ 0"),
        ):
            if not ok:
                section, name = key.split(".")
                raise UserError(f"{key} {getattr(getattr(self, section), name)} must be {want}")
        if self.score.every_images and self.data.reference is None:
            raise UserError("score.every_images needs data.reference, what samples are compared with")
        scored = [self.score.metric] if self.score.every_images else []
        if str(train.keep_best).startswith("fid/") and train.keep_best not in scored:
            way_out = f"say {scored[0]}" if scored else "set score.every_images"
            raise UserError(f"train.keep_best {train.keep_best} is not computed: {way_out}")

    def to_yaml(self) -> str:
        return yaml.safe_dump(to_dict(self), sort_keys=False)


@dataclass
class Launch:
    """What the command line says beside the configuration: the path of DeepSpeed's own config."""

    deepspeed: str
    config: Config


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON types."""
    return json.loads(json.dumps(asdict(config)))


def from_dict(values: dict[str, Any], cls: type = Config) -> Any:
    """The inverse of :func:`to_dict`, for what a checkpoint or a run's folder holds."""
    hints = get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    if unknown := set(values) - known:
        raise UserError(f"{cls.__name__} has no key {', '.join(sorted(unknown))}: made by another version of diffussm?")
    return cls(**{k: from_dict(v, hints[k]) if is_dataclass(hints[k]) else v for k, v in values.items()})


def parse(arguments: Sequence[str]) -> Launch:
    """Parse the command line of training. Raises UserError, in one line, on anything that is not understood."""
    parser = jsonargparse.ArgumentParser(
        description="Train DiffuSSM. example: deepspeed --module diffussm.train --config fashion32 --train.lr 1e-3",
        exit_on_error=False,
        default_env=False,
    )
    parser.add_argument("--config", action="config", help=f"a name ({', '.join(config_names())}) or a YAML file")
    ds_names = sorted(path.stem for path in DS_CONFIGS.glob("*.json"))
    parser.add_argument("--deepspeed", default="zero2", help=f"a name ({', '.join(ds_names)}) or a JSON file")
    parser.add_argument("--local_rank", type=int, help="set by launchers; the environment's LOCAL_RANK counts")
    parser.add_class_arguments(Config)
    try:
        namespace = parser.parse_args(_resolve_config(list(arguments)))
        config = parser.instantiate(namespace)
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise UserError(_one_line(str(error))) from None
    config = Config(**{f.name: config[f.name] for f in fields(Config)})
    config.train.betas = tuple(config.train.betas)
    config.check()
    named = namespace.deepspeed in ds_names
    return Launch(str(DS_CONFIGS / f"{namespace.deepspeed}.json") if named else namespace.deepspeed, config)


def config_names() -> list[str]:
    """The configurations that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def _resolve_config(arguments: list[str]) -> list[str]:
    """The arguments with `--config NAME` as a path, first, and the default where none is given."""
    value = DEFAULT
    rest = []
    iterator = iter(arguments)
    for argument in iterator:
        if argument == "--config":
            value = next(iterator, "")
        elif argument.startswith("--config="):
            value = argument.split("=", 1)[1]
        else:
            rest.append(argument)
    path = CONFIGS / f"{value}.yaml" if value in config_names() else Path(value)
    if not path.is_file():
        raise UserError(f"--config {value!r} is neither a file nor one of {', '.join(config_names())}")
    _check_file(path)
    return ["--config", os.fspath(path), *rest]


def _check_file(path: Path) -> None:
    """Raise UserError unless a YAML file is a mapping of known keys; their values are the parser's to judge."""
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {_one_line(str(error))}") from None
    for key, value in values.items() if isinstance(values, dict) else [("", values)]:
        section = any(known.startswith(f"{key}.") for known in known_keys())
        if not key or (section and not isinstance(value, dict)):
            raise UserError(f"{path}: {key or 'the file'} is not a mapping of keys to values")
        for name in [f"{key}.{name}" for name in value] if section else [key]:
            if name not in known_keys():
                raise UserError(f"{path}: {_unknown(name)}")


def _one_line(message: str) -> str:
    """jsonargparse's message in one line."""
    message = " ".join(message.split())
    unknown = re.search(r"unrecognized arguments: -*([\w.]+)", message)
    return _unknown(unknown.group(1)) if unknown else message


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, known_keys(), n=1)
    return f"unknown config key {key}: " + (f"did you mean {near[0]}?" if near else "the --help of training lists them")


def known_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    keys = []
    hints = get_type_hints(cls)
    for f in fields(cls):
        keys += known_keys(hints[f.name], f"{prefix}{f.name}.") if is_dataclass(hints[f.name]) else [prefix + f.name]
    return keys
