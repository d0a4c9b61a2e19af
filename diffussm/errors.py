"""The one exception for what a user can mend, and how a command reports it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

WAIT_FOR_RANK_0 = 10  # seconds; launchers look at their ranks more often than that
PEER_LOST = ("closed by peer", "reset by peer", "Broken pipe")


class UserError(Exception):
    """Bad input. Its message is one line that names the thing and the way out; commands exit with code 2 on it."""


def fail(message: str) -> NoReturn:
    """Print ``error: message`` on one line to stderr and exit with code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def run_command(main: Callable[[], None]) -> None:
    """Run a command's ``main``; a :class:`UserError` ends it with one line on stderr and exit code 2.

    Of many ranks that meet the same bad input one says so: the others wait for the launcher to end them, and speak up,
    with their number, only if it does not.
    """
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(WAIT_FOR_RANK_0)
        fail(str(error) if rank == "0" else f"rank {rank}: {error}")
    except RuntimeError as error:
        if any(sign in str(error) for sign in PEER_LOST):
            time.sleep(
                WAIT_FOR_RANK_0
            )  # another rank has ended, and has said why: its exit code is to be the launcher's
        raise
    except BrokenPipeError:  # `tool | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}")
