"""What a run will take, by formula: memory by part and moment, computation, reading, checkpoints. Nothing is run.

Memory is what torch's tensors hold on one rank. Beside them a GPU needs room for its CUDA context, NCCL's buffers and
what the allocator leaves unused: keep a tenth free.

Symbols: P parameters · D width · M hourglass ratio · N state size · L = H·W positions, J = L/M · B images of a
micro-batch. The bytes of DeepSpeed 0.19 are those of its source and of its tensors in a running engine, under
ds_configs/ and fp32 parameters (torch_autocast).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from diffussm.config import Config
from diffussm.data.order import WINDOW_BYTES
from diffussm.errors import UserError
from diffussm.models.diffussm import ModelConfig
from diffussm.models.macs import forward_macs, parameter_counts
from diffussm.ops.fft import block_shape
from diffussm.ops.kernel import split_length
from diffussm.training.engine import split_batch

BF16, FP32, FP64, COMPLEX64, COMPLEX128 = 2, 4, 8, 8, 16  # bytes
REDUCE_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in elements
LIVE_PARAMETERS = 1_000_000_000  # its stage3_max_live_parameters

PARTS = (
    "parameters",  # fp32; at stage 3 this rank's, and between forward and backward those gathered
    "bf16 weights",  # autocast's copies
    "gradients",
    "communication",  # buckets of gradients under way
    "optimizer",  # fp32 masters, Adam's two moments; in its step a temporary
    "EMA",
    "activations",  # saved for the backward pass
    "kernel workspace",  # temporaries of the long convolution
)


@dataclass(frozen=True)
class Plan:
    """A run on paper.

    Attributes:
        config: checked.
        latent_shape: [C, H, W].
        num_classes: 0: unconditional.
        ranks: GPUs.
        zero_stage: 0 to 3.
        device: of the ranks. On a CPU, memory that is allocated and never touched takes none: DeepSpeed's buckets.

    Raises:
        UserError: the global batch does not divide among the ranks, or the hourglass ratio not the positions.
    """

    config: Config
    latent_shape: tuple[int, int, int]
    num_classes: int
    ranks: int
    zero_stage: int
    device: Literal["cuda", "cpu"] = "cuda"

    def __post_init__(self) -> None:
        split_batch(self.config.train, self.ranks)
        if self.length % self.model.hourglass:
            _, height, width = self.latent_shape
            raise UserError(
                f"model.hourglass {self.model.hourglass} does not divide {height}×{width} positions: 1 does"
            )

    @property
    def model(self) -> ModelConfig:
        return self.config.model.resolved()

    @property
    def length(self) -> int:
        """L."""
        return math.prod(self.latent_shape[1:])

    @property
    def micro_batch(self) -> int:
        return split_batch(self.config.train, self.ranks)[0]

    @property
    def accumulation(self) -> int:
        """Micro-batches a rank and step."""
        return split_batch(self.config.train, self.ranks)[1]

    @property
    def parameters(self) -> int:
        return sum(self._counts().values())

    @property
    def bf16(self) -> bool:
        """Whether autocast is on; ``auto`` counts as yes."""
        return self.config.train.precision != "fp32"

    @property
    def checkpointing(self) -> bool:
        return self.config.train.activation_checkpointing

    def with_changes(self, ranks: int | None = None, zero_stage: int | None = None, **train: object) -> Plan:
        """The same run with other ranks, another stage, or other values of the configuration's ``train``."""
        config = replace(self.config, train=replace(self.config.train, **train))
        stage = self.zero_stage if zero_stage is None else zero_stage
        return replace(self, config=config, ranks=ranks or self.ranks, zero_stage=stage)

    # Memory

    def peak(self) -> int:
        """Bytes of a rank at the worst moment."""
        return max(sum(parts.values()) for parts in self.memory().values())

    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes of a rank: {moment of a step: {part: bytes}}, every moment with all of :data:`PARTS`."""
        P, stage = self.parameters, self.zero_stage
        share = math.ceil(P / self.ranks) if stage else P  # of the optimizer's state
        always = {
            "parameters": FP32 * (share if stage == 3 else P),
            "gradients": FP32 * share if stage == 3 else 0,  # of this rank's parameters, allocated once
            "communication": self._buckets() if stage == 3 else 0,
            "optimizer": FP32 * share * (2 if stage == 0 else 3),
            "EMA": FP32 * share * self._averages,
        }
        accumulated = 0 if self.accumulation == 1 or stage == 3 else FP32 * (share if stage == 2 else P)
        return {
            moment: {part: always.get(part, 0) + now.get(part, 0) for part in PARTS}
            for moment, now in {
                "forward ends": {"gradients": accumulated} | self._forward_ends(),
                "backward begins": {"gradients": accumulated} | self._backward_begins(),
                "backward ends": self._backward_ends(share),
                "optimizer step": self._optimizer_step(share),
                **({"checkpoint": self._checkpoint(share)} if self.device == "cpu" else {}),
            }.items()
        }

    def _forward_ends(self) -> dict[str, int]:
        """Autocast has kept a bf16 copy of every weight it met."""
        return {
            "parameters": self._gathered(),
            "bf16 weights": BF16 * self._dense() if self.bf16 else 0,
            "activations": self.activations(),
            "kernel workspace": self.kernel_workspace(),
        }

    def _backward_begins(self) -> dict[str, int]:
        """In the last block, before it has freed anything; with checkpointing, once it is computed again."""
        copied = self._dense()  # stage 3 makes the copies of each layer anew
        if self.checkpointing:
            copied = self._dense_of_ends() + (copied - self._dense_of_ends()) // self.model.depth
        again = sum(self.block_activations().values()) - self._head() if self.checkpointing else 0
        gradients = 3 * self._unit() * self._itemsize()  # of activations, at most at a time
        return {
            "parameters": self._gathered(),
            "bf16 weights": BF16 * copied if self.bf16 and self.zero_stage < 3 else 0,
            "communication": self._buckets() if self.zero_stage in (1, 2) and self.device == "cuda" else 0,
            "activations": self.activations() + again + gradients,
            "kernel workspace": self.kernel_workspace(),
        }

    def _backward_ends(self, share: int) -> dict[str, int]:
        """The last bucket is reduced: flattened, which stage 3 does twice, and cast to the dtype that it travels in."""
        P, stage = self.parameters, self.zero_stage
        bucket = min(P, REDUCE_BUCKET)
        if stage == 3:
            return {"communication": 2 * self._itemsize() * bucket}
        flat = FP32 * bucket if self.ranks > 1 or stage == 0 else 0
        if stage == 0:
            return {"gradients": FP32 * P, "communication": flat}
        return {
            "gradients": FP32 * share if P > REDUCE_BUCKET else 0,  # what earlier buckets have left
            "communication": self._buckets() + flat + (BF16 * bucket if self.bf16 else 0),
        }

    def _optimizer_step(self, share: int) -> dict[str, int]:
        """ZeRO flattens the gradients; Adam's denominator is a temporary, on a CPU two, of one parameter at stage 0."""
        denominator = FP32 * share
        if self.device == "cpu":
            denominator = 2 * denominator if self.zero_stage else 0
        flattened = {0: 1, 1: 2, 2: 2, 3: 1}[self.zero_stage]
        return {"gradients": FP32 * share * flattened, "optimizer": denominator}

    def _checkpoint(self, share: int) -> dict[str, int]:
        """What is written in the background is a copy in the host's memory, which on a CPU is the rank's."""
        state = FP32 * share
        return {"parameters": state, "optimizer": 2 * state, "EMA": self._averages * state}

    def _buckets(self) -> int:
        """Stages 1 and 2: two fp32 buckets, of which one is filled while the other travels, for each dtype that they
        travel in. Stage 3: one of each dtype. On a CPU only what gradients have been written to."""
        if self.device == "cpu":
            return FP32 * min(self.parameters, REDUCE_BUCKET)
        if self.zero_stage == 3:
            return REDUCE_BUCKET * (FP32 + BF16 * self.bf16)
        return REDUCE_BUCKET * 2 * FP32 * (1 + self.bf16)

    def _gathered(self) -> int:
        """Stage 3 releases no parameter before its backward pass while they are fewer than DeepSpeed's limit."""
        return FP32 * min(self.parameters, LIVE_PARAMETERS) if self.zero_stage == 3 and self.ranks > 1 else 0

    def _dense(self) -> int:
        """Parameters that autocast copies: all but the state space's and the embedding of the classes."""
        return self.parameters - self._counts()["SSM kernel"] - self._embedding()

    def _dense_of_ends(self) -> int:
        """Those of them that are in no block."""
        counts, D = self._counts(), self.model.width
        return counts["ends"] + counts["conditioning"] - self._embedding() + 2 * (D + 1) * D  # the final modulation's

    def _counts(self) -> dict[str, int]:
        return parameter_counts(self.model, self.latent_shape[0], self.num_classes)

    def _embedding(self) -> int:
        return (self.num_classes + 1) * self.model.width if self.num_classes else 0

    def activations(self) -> int:
        """Bytes that the forward pass saves: all of every block, or with checkpointing the blocks' inputs; the ends."""
        block = self._itemsize() * self._unit() if self.checkpointing else sum(self.block_activations().values())
        fold = self._itemsize() * self.model.hourglass * self._unit()  # its input
        return fold + self.model.depth * block + self._head()

    def _head(self) -> int:
        """Bytes that the layers after the blocks save: unfold's input; the tokens, normalised, modulated."""
        M = self.model.hourglass
        return (self._itemsize() * (1 + M) + self._norm_itemsize() * 2 * M) * self._unit()

    def block_activations(self) -> dict[str, int]:
        """Bytes that one block saves for its backward pass, by what they are, in the order of its forward."""
        D, M = self.model.width, self.model.hourglass
        each, norm = self._itemsize() * self._unit(), self._norm_itemsize() * self._unit()
        return {
            "input": norm,
            "normalised": norm,
            "modulated": 2 * each if self._norm_itemsize() > self._itemsize() else each,  # cast anew for W0 and W1
            "W0": 2 * each,  # before and after GELU
            "W_up": 2 * M * each,  # likewise; the latter is the SSM's input
            "SSM": M * each,
            "W_down": 4 * each,
            "W2": 4 * each,
            "W1": 4 * each,
            "gated": 2 * each,
            "W3": each,
            "W_down times mix": self._itemsize() * 2 * D**2,  # which no image adds to
        }

    def kernel_workspace(self) -> int:
        """Bytes that the backward of the long convolution takes for a block of channels and images, at most.

        By FFT: five signals or spectra an image, and what the kernel and its gradient are made from. The chunked
        backend takes up to four times its own BLOCK_BYTES, which on a GPU is less.
        """
        D, state = self.model.width, self.model.state
        channels, images, points = block_shape(D, self.micro_batch, self.length, self.device)
        signal = points * FP32
        stride, _ = split_length(self.length)
        tables = channels * state * stride * COMPLEX64  # of powers: N/2 pairs, two directions
        modes = D * state * (3 * FP64 + 7 * COMPLEX128)  # of the discretization, for its gradient
        return modes + 5 * channels * images * signal + 5 * tables + 6 * channels * signal

    @property
    def _averages(self) -> int:
        return len(self.config.train.ema_lengths)

    def _unit(self) -> int:
        """B·J·D: elements of the residual stream."""
        return self.micro_batch * self.length // self.model.hourglass * self.model.width

    def _itemsize(self) -> int:
        return BF16 if self.bf16 else FP32

    def _norm_itemsize(self) -> int:
        """CUDA's autocast runs LayerNorm, and the modulation after it, in fp32; a CPU's in bf16."""
        return FP32 if self.device == "cuda" else self._itemsize()

    def checkpoint_bytes(self) -> int:
        """Of one checkpoint, of all ranks: weights, Adam's moments, the averages."""
        return FP32 * self.parameters * (3 + self._averages)

    # Speed

    def macs_per_step(self) -> int:
        """MACs of a global batch: a forward pass, a backward of twice that, and with checkpointing another forward.

        Without the kernels' generation, once a micro-batch: 2 % of one image's forward at XL.
        """
        return (4 if self.checkpointing else 3) * self._forward_macs() * self.config.train.global_batch

    def images_per_second(self, gpu_flops: float, mfu: float) -> float:
        """Of all ranks, at an MFU as the trainer logs it: three forward passes an image, 2 FLOPs a MAC."""
        return self.ranks * gpu_flops * mfu / (3 * 2 * self._forward_macs())

    def _forward_macs(self) -> int:
        return sum(forward_macs(self.model, self.latent_shape[0], self.length).values())

    def figures(self, gpu_flops: float, mfu: float, images: int, sample_bytes: int) -> dict[str, Any]:
        """All of the plan as JSON types, in bytes, seconds and counts, for a run to ``images`` seen.

        Args:
            gpu_flops: peak of a GPU, FLOP/s.
            mfu: share of it that is reached, in which what is computed again counts as nothing.
            images: where the run ends.
            sample_bytes: of one image's stored moments.
        """
        rate = self.images_per_second(gpu_flops, mfu)
        global_batch = self.config.train.global_batch
        return {
            "model": asdict(self.model),
            "parameters": self.parameters,
            "latent": list(self.latent_shape),
            "classes": self.num_classes,
            "gpus": self.ranks,
            "zero_stage": self.zero_stage,
            "global_batch": global_batch,
            "micro_batch": self.micro_batch,
            "accumulation": self.accumulation,
            "precision": "bf16" if self.bf16 else "fp32",
            "activation_checkpointing": self.checkpointing,
            "memory": {moment: parts | {"total": sum(parts.values())} for moment, parts in self.memory().items()},
            "peak": self.peak(),
            "activations": {
                name: {"bytes": other.activations(), "peak": other.peak()}
                for name, value in (("without checkpointing", False), ("with checkpointing", True))
                for other in [self.with_changes(activation_checkpointing=value)]
            },
            "macs_per_step": self.macs_per_step(),
            "gpu_flops": gpu_flops,
            "mfu": mfu,
            "images_per_second": rate,
            "bytes_read_per_second": rate * sample_bytes,
            "stream_bytes": 2 * 2 * WINDOW_BYTES * global_batch // self.ranks,  # two windows, of up to twice that
            "checkpoint_bytes": self.checkpoint_bytes(),
            "images": images,
            "steps": math.ceil(images / global_batch),
            "days": images / rate / 86_400,
            "gpu_hours": self.ranks * images / rate / 3_600,
        }
