"""How a command ends: the exceptions that say so, and its exit codes.

0        done
1        a failure of our own, with a traceback
2        bad input: one line says what to mend
70       EXIT_HUNG: no progress for train.hang_minutes; the stacks of all threads are on stderr
75       EXIT_STOPPED: stopped on request with everything saved; the same command goes on
128 + n  a second signal n, while the request of the first was being carried out: nothing more is saved
-14      SIGALRM: hung in C code that kept the interpreter's lock, so that nothing could exit with 70
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

EXIT_HUNG = 70  # EX_SOFTWARE of sysexits.h
EXIT_STOPPED = 75  # EX_TEMPFAIL
WAIT_FOR_RANK_0 = 10  # seconds; launchers look at their ranks more often than that
PEER_LOST = ("closed by peer", "reset by peer", "Broken pipe")


class UserError(Exception):
    """Bad input. Its message is one line that names the thing and the way out; commands exit with code 2 on it."""


class Stopped(Exception):
    """Stopped on request with everything saved. Its message is one line; commands exit with EXIT_STOPPED on it."""


def fail(message: str) -> NoReturn:
    """Print ``error: message`` on one line to stderr and exit with code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def run_command(main: Callable[[], None]) -> None:
    """Run a command's ``main``; a :class:`UserError` ends it with one line on stderr and exit code 2.

    :class:`Stopped` ends it with one line of rank 0's and exit code 75.

    Of many ranks that meet the same bad input one says so: the others wait for the launcher to end them, and speak up,
    with their number, only if it does not.
    """
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            _wait_for_the_launcher(2)
        fail(str(error) if rank == "0" else f"rank {rank}: {error}")
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr, flush=True)
        sys.exit(EXIT_STOPPED)
    except RuntimeError as error:
        if any(sign in str(error) for sign in PEER_LOST):
            _wait_for_the_launcher(1)  # another rank has ended, and has said why
        raise
    except BrokenPipeError:  # `tool | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}")


def _wait_for_the_launcher(code: int) -> None:
    """Until it ends this process, or long enough: the rank that has said why ends first. Ended, it has that exit code,
    which is to be no greater than the other's: srun returns the greatest."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    time.sleep(WAIT_FOR_RANK_0)
