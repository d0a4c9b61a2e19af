#!/usr/bin/env python
"""A configuration and a number of GPUs → memory, time and cost of the run. See `--help`."""

from diffussm.commands.plan_run import main
from diffussm.errors import run_command

if __name__ == "__main__":
    run_command(main)
