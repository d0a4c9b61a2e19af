"""One process of tools/sample.py for test_sampling.py, with parts so small that a few images make many."""

from __future__ import annotations

from diffussm import sample_parts
from diffussm.commands import sample
from diffussm.errors import run_command

PART = 16

if __name__ == "__main__":
    sample_parts.PART = PART
    run_command(sample.main)
