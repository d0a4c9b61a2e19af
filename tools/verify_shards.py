#!/usr/bin/env python
"""Latent shards → is each sample as it was encoded; a contact sheet. See `--help`."""

from diffussm.commands.verify_shards import main
from diffussm.errors import run_command

if __name__ == "__main__":
    run_command(main)
