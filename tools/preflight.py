#!/usr/bin/env python
"""The nodes of a run, checked before it starts: devices, links, data, clocks, disks, memory. See `--help`."""

from diffussm.commands.preflight import main
from diffussm.errors import run_command

if __name__ == "__main__":
    run_command(main)
