"""How a command ends: the exceptions that say so, and its exit codes.

0        done
1        a failure of our own, with a traceback
2        bad input: one line says what to mend
70       EXIT_HUNG: no progress for train.hang_minutes; the stacks of all threads are on stderr
75       EXIT_STOPPED: stopped on request with everything saved; the same command goes on
128 + n  a second signal n, while the request of the first was being carried out: nothing more is saved
-14      SIGALRM: hung in C code that kept the interpreter's lock, so that nothing could exit with 70

Launchers end the other ranks when one has ended, and some then tell how those were ended. So 2 and 75 are also written
into the file that DIFFUSSM_EXIT_FILE names, if it does.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

EXIT_HUNG = 70  # EX_SOFTWARE of sysexits.h
EXIT_STOPPED = 75  # EX_TEMPFAIL
WAIT_FOR_RANK_0 = 10  # seconds; launchers look at their ranks more often than that
PEER_LOST = ("closed by peer", "reset by peer", "Broken pipe")


class UserError(Exception):
    """Bad input. Its message is one line that names the thing and the way out; commands exit with code 2 on it."""


class Stopped(Exception):
    """Stopped on request with everything saved. Its message is one line; commands exit with EXIT_STOPPED on it."""


@contextlib.contextmanager
def needs(what: str, extra: str) -> Iterator[None]:
    """Around the import of an optional package: where it is missing, UserError says what needs it and how to have it.

    with needs("--plot", "plot"):
        from matplotlib.figure import Figure
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise UserError(f"{what} needs {package}: pip install 'diffussm[{extra}]'") from error


def fail(message: str) -> NoReturn:
    """Print ``error: message`` on one line to stderr and exit with code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    _leave_code(2)
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
        rank = _rank()
        if rank != "0":
            time.sleep(WAIT_FOR_RANK_0)
        fail(str(error) if rank == "0" else f"rank {rank}: {error}")
    except Stopped as stopped:
        if _rank() == "0":
            print(stopped, file=sys.stderr, flush=True)
        _leave_code(EXIT_STOPPED)
        sys.exit(EXIT_STOPPED)
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


def _rank() -> str:
    """This process's number, before anything has asked the launcher."""
    step = "SLURM_PROCID" if os.environ.get("SLURM_STEP_ID", "batch").isdigit() else "RANK"  # not of a batch shell
    names = "RANK", step, "OMPI_COMM_WORLD_RANK"
    return next((os.environ[name] for name in names if name in os.environ), "0")


def _leave_code(code: int) -> None:
    if path := os.environ.get("DIFFUSSM_EXIT_FILE"):
        with contextlib.suppress(OSError), open(path, "w") as file:
            file.write(f"{code}\n")
