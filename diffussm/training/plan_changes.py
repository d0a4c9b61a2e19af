"""What to change in a run that does not fit its GPUs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from diffussm.training.plan import Plan


def smallest_change(plan: Plan, limit: int) -> Plan | None:
    """The plan that fits into ``limit`` bytes a rank and costs the least speed; None if none does.

    From the cheapest to the dearest, and each only with what comes before it: smaller micro-batches (the same
    computation in smaller matrix products), activation checkpointing (a third more computation), the next ZeRO stages
    (more communication), more ranks.
    """
    return next((other for other in _changes(plan) if other.peak() <= limit), None)


def describe_change(plan: Plan, other: Plan) -> str:
    """What to set to make one plan the other."""
    train, ranks = plan.config.train, other.ranks
    changes = {
        "train.micro_batch": (train.micro_batch or train.global_batch // ranks, other.micro_batch),
        "train.activation_checkpointing": (plan.checkpointing, other.checkpointing),
        "--zero": (plan.zero_stage, other.zero_stage),
        "--gpus": (plan.ranks, ranks),
    }
    return ", ".join(f"{name} {str(new).lower()}" for name, (old, new) in changes.items() if new != old)


def least_memory(plan: Plan) -> Plan:
    """The plan of all that :func:`smallest_change` tries which takes the least memory."""
    return min(_changes(plan), key=Plan.peak)


def _changes(plan: Plan) -> Iterator[Plan]:
    batch = plan.config.train.global_batch
    doublings = itertools.takewhile(lambda ranks: batch % ranks == 0, (plan.ranks << n for n in itertools.count()))
    checkpointings = [True] if plan.checkpointing else [False, True]
    for ranks, stage, checkpointing in itertools.product(doublings, range(plan.zero_stage, 4), checkpointings):
        share = batch // ranks
        most = min(plan.micro_batch, share)
        for micro_batch in (size for size in range(most, 0, -1) if share % size == 0):
            yield plan.with_changes(ranks, stage, micro_batch=micro_batch, activation_checkpointing=checkpointing)
