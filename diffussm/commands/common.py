"""What the command lines share."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from diffussm.errors import fail
from diffussm.files import write_json


class Parser(argparse.ArgumentParser):
    """``argparse`` with one line on bad input (exit code 2), defaults in the help, and examples kept as written."""

    def __init__(self, description: str, example: str) -> None:
        super().__init__(
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> None:  # type: ignore[override]
        fail(f"{message} (see {self.prog} --help)")

    def add_json_option(self) -> None:
        self.add_argument("--json", metavar="FILE", help="also write the figures as JSON to FILE ('-': to stdout)")


def emit_json(target: str | None, value: Any) -> None:
    """Write ``value`` where ``--json`` asked: nowhere, to stdout, or atomically to a file."""
    if target == "-":
        json.dump(value, sys.stdout, indent=1)
        print()
    elif target:
        write_json(target, value)
