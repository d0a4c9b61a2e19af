"""The extractors of features, by name."""

from __future__ import annotations

from pathlib import Path

import torch

from diffussm.errors import UserError
from diffussm.evaluation.efficientnet import EfficientNetLite0
from diffussm.evaluation.features import Extractor
from diffussm.evaluation.inception import Inception2015, load_weights

EXTRACTORS = EfficientNetLite0.name, Inception2015.name


def make_extractor(
    name: str | None = None,
    inception_weights: str | Path | None = None,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Extractor:
    """An extractor with its trained weights.

    Args:
        name: one of :data:`EXTRACTORS`; by default Inception if its weights are given, else EfficientNet-Lite0.
        inception_weights: the file of Inception's; by default they are downloaded.
        device: where it computes.

    Raises:
        UserError: there is none of that name, it is not installed, or its weights cannot be had.
    """
    name = name or (Inception2015.name if inception_weights else EfficientNetLite0.name)
    if inception_weights and name != Inception2015.name:
        raise UserError(f"--inception-weights are not those of the extractor {name}")
    if name == EfficientNetLite0.name:
        return EfficientNetLite0(device)
    if name == Inception2015.name:
        return Inception2015(load_weights(inception_weights), device)
    raise UserError(f"unknown extractor {name!r}: this version has {', '.join(EXTRACTORS)}")
