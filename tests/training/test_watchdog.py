"""Real processes hang, with and without the GIL, are suspended, or are merely slow."""

import faulthandler
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from diffussm.errors import EXIT_HUNG
from diffussm.training.watchdog import Watchdog

pytestmark = pytest.mark.unit

QUIET_FORKS = "-Wignore::DeprecationWarning"  # from Python 3.12 on, a fork beside threads warns

LIMIT = 0.6  # seconds
HEADER = (
    f'rank 3 on node5: no progress for {LIMIT / 60:g} min in "step 12": stacks of all threads follow; '
    "then this process ends (train.hang_minutes)\n"
)


def start(body: str) -> subprocess.Popen[str]:
    """A watched process that is in step 12, which is ``body``."""
    script = f"""
        import ctypes, os, sys, threading, time
        from diffussm.training.watchdog import Watchdog

        with Watchdog({LIMIT} / 60, "rank 3 on node5") as dog:
            dog.beat("step 12")
            print("ready", flush=True)
            {body}
        print("done")
    """
    process = subprocess.Popen(
        [sys.executable, QUIET_FORKS, "-c", textwrap.dedent(script)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, error = process.communicate(timeout=10)
    finally:
        process.kill()
    return process.returncode, out, error


@pytest.mark.parametrize(
    "hang",
    [
        "lock = threading.Lock(); lock.acquire(); lock.acquire()",
        "ctypes.CDLL(None).sleep(1000)",
        "while True: pass",
    ],
)
def test_a_hang_ends_with_the_stacks_of_all_threads(hang):
    since = time.monotonic()
    code, out, error = end(start(hang))
    assert (code, out) == (EXIT_HUNG, "")
    assert error.startswith(HEADER)
    assert error.count('File "<string>", line') == 1 and "watchdog.py" in error
    assert LIMIT < time.monotonic() - since < LIMIT + 2


def test_a_hang_that_holds_the_gil_ends_too():
    since = time.monotonic()
    lock = "ctypes.PyDLL(None).pthread_mutex_lock"  # unlike sleep, no signal wakes it
    code, out, error = end(start(f"mutex = ctypes.create_string_buffer(64); {lock}(mutex); {lock}(mutex)"))
    assert (code, out) == (-signal.SIGALRM, "")
    assert 'File "<string>", line 8 in <module>' in error
    assert time.monotonic() - since < 2 * LIMIT + 2


def test_beats_keep_it_alive():
    assert end(start("for i in range(30): time.sleep(0.05); dog.beat(f'step {i}')")) == (0, "done\n", "")


def test_a_forked_child_exits_as_usual():
    body = (
        "time.sleep(0.1); child = os.fork(); child or sys.exit(); status = os.waitpid(child, 0)[1]; assert not status"
    )
    assert end(start(body)) == (0, "done\n", "")


@pytest.mark.parametrize("suspended", [0.9 * LIMIT, 2.5 * LIMIT])
def test_suspension_is_no_hang(suspended):
    process = start("sys.stdin.readline(); time.sleep(0.4)")
    time.sleep(0.1)
    process.send_signal(signal.SIGSTOP)
    time.sleep(suspended)
    process.send_signal(signal.SIGCONT)
    assert end(process)[:2] == (0, "done\n")


def test_what_hangs_after_a_suspension_ends():
    process = start("time.sleep(1000)")
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5 * LIMIT)
    process.send_signal(signal.SIGCONT)
    since = time.monotonic()
    code, _, error = end(process)
    assert code == EXIT_HUNG and HEADER in error
    assert LIMIT < time.monotonic() - since < LIMIT + 2


def test_afterwards_everything_is_as_before():
    threads, enabled, handler = threading.active_count(), faulthandler.is_enabled(), signal.getsignal(signal.SIGALRM)
    with Watchdog(1, "this"):
        time.sleep(0.05)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 50
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert (threading.active_count(), faulthandler.is_enabled()) == (threads, enabled)
    assert signal.getsignal(signal.SIGALRM) == handler
    caught = re.search(r"SigCgt:\s*(\w+)", Path("/proc/self/status").read_text())[1]
    assert not int(caught, 16) >> (signal.SIGALRM - 1) & 1


def test_no_limit_is_no_watchdog():
    threads = threading.active_count()
    with Watchdog(0, "this") as dog:
        dog.beat("step 1")
        assert threading.active_count() == threads
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
