#!/usr/bin/env python
"""Images → latent shards and their index. See `--help`."""

from diffussm.commands.encode_latents import main
from diffussm.errors import run_command

if __name__ == "__main__":
    run_command(main)
