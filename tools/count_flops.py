#!/usr/bin/env python
"""Sizes → parameters, MACs and FLOPs, by formula, beside DiT's and the papers' figures. See `--help`."""

from diffussm.commands.count_flops import main
from diffussm.errors import run_command

if __name__ == "__main__":
    run_command(main)
