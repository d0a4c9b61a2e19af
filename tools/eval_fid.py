#!/usr/bin/env python
"""Samples and real images → FID, sFID, IS, precision, recall. See `--help`."""

from diffussm.commands.eval_fid import main
from diffussm.errors import run_command

if __name__ == "__main__":
    run_command(main)
