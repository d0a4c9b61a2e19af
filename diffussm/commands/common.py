"""What the command lines share."""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any

from diffussm.errors import UserError
from diffussm.files import write_json


class Parser(argparse.ArgumentParser):
    """``argparse`` with one line on bad input (exit code 2), defaults in the help, and examples kept as written."""

    def __init__(self, description: str, example: str) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        if not self.prog.endswith(".py"):  # a console command, not the door in tools/
            example = re.sub(r"python tools/\w+\.py", self.prog, example)
            example = re.sub(r"tools/\w+\.py", f"--no-python {self.prog}", example)  # torchrun's
        self.epilog = f"example:\n  {example}"

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message} (see {self.prog} --help)")

    def add_source_argument(self) -> None:
        """Where weights come from: what ``sample_request.find_checkpoint`` takes."""
        text = "a run's folder, a checkpoint, or checkpoints in S3 (default: newest in runs/)"
        self.add_argument("source", nargs="?", help=text)

    def add_json_option(self) -> None:
        self.add_argument("--json", metavar="FILE", help="also write the figures as JSON to FILE ('-': to stdout)")


def emit_json(target: str | None, value: Any) -> None:
    """Write ``value`` where ``--json`` asked: nowhere, to stdout, or atomically to a file."""
    if target == "-":
        json.dump(value, sys.stdout, indent=1)
        print()
    elif target:
        write_json(target, value)


def latent_shape(text: str) -> tuple[int, ...]:
    """The type of an argument such as 4x32x32: channels, height and width."""
    if not re.fullmatch(r"[1-9]\d{0,5}([x×][1-9]\d{0,5}){2}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not channels, height and width such as 4x32x32")
    return tuple(int(number) for number in re.split("[x×]", text))
