#!/usr/bin/env python
"""A trained model → samples.npz and a picture. See `--help`."""

from diffussm.commands.sample import main
from diffussm.errors import run_command

if __name__ == "__main__":
    run_command(main)
