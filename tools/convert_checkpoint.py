#!/usr/bin/env python
"""A checkpoint → a .safetensors file or a pipeline of diffusers. See `--help`."""

from diffussm.commands.convert_checkpoint import main
from diffussm.errors import run_command

if __name__ == "__main__":
    run_command(main)
