"""Real processes are asked to stop by real signals, while they work and while they hang."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from diffussm.errors import EXIT_STOPPED
from diffussm.training.preemption import SIGNALS, StopRequest

pytestmark = pytest.mark.unit

QUIET_FORKS = "-Wignore::DeprecationWarning"  # from Python 3.12 on, a fork beside threads warns

LOOP = """
    import time
    from diffussm.errors import Stopped, run_command
    from diffussm.training import preemption
    from diffussm.training.preemption import StopRequest

    preemption.REPEAT_SECONDS = 0.4

    def main():
        with StopRequest({max_hours}, "rank 3 on node5") as stop:
            print("ready", flush=True)
            while not stop.requested:
                time.sleep(0.01)
            time.sleep({saving})
            print("saved", flush=True)
            raise Stopped("stopped: " + stop.reason)

    run_command(main)
"""
DEADLOCK = """
    import ctypes
    from diffussm.training import preemption

    preemption.REPEAT_SECONDS = 0.4
    mutex = ctypes.create_string_buffer(64)
    lock = ctypes.CDLL(None).pthread_mutex_lock  # unlike sleep, no signal wakes it
    with preemption.StopRequest(0, "rank 3 on node5") as stop:
        lock(mutex)
        print("ready", flush=True)
        lock(mutex)
"""


@pytest.fixture
def start():
    """Starts a script, as rank 0 unless told otherwise, that has come to where it prints "ready"."""
    processes = []

    def start(script: str, rank: int = 0, **values: object) -> subprocess.Popen[str]:
        script = textwrap.dedent(script.format(**values) if values else script)
        process = subprocess.Popen(
            [sys.executable, QUIET_FORKS, "-c", script], env=os.environ | {"RANK": str(rank)},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        processes.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=5)
    return process.returncode, out, error


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_lets_it_save_and_stop(start, number):
    process = start(LOOP, max_hours=0, saving=0)
    process.send_signal(number)
    announced = f"rank 3 on node5: {number.name}: finishes the step, saves and exits; a second signal exits at once\n"
    assert end(process) == (EXIT_STOPPED, "saved\n", f"{announced}stopped: {number.name}\n")


def test_of_many_ranks_one_says_that_it_stopped(start):
    process = start(LOOP, rank=3, max_hours=0, saving=0)
    process.send_signal(signal.SIGTERM)
    code, _, error = end(process)
    assert code == EXIT_STOPPED and "stopped:" not in error


def test_what_a_launcher_passes_on_is_the_same_request(start):
    process = start(LOOP, max_hours=0, saving=0.3)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("rank 3 on node5: SIGINT")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.02)
    assert end(process) == (EXIT_STOPPED, "saved\n", "stopped: SIGINT\n")


@pytest.mark.parametrize("script", [LOOP.format(max_hours=0, saving=60), DEADLOCK], ids=["saves", "hangs in C"])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_exits_at_once(start, script, second):
    process = start(script)
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("rank 3 on node5: SIGTERM")
    time.sleep(0.5)
    process.send_signal(second)
    asked = time.monotonic()
    assert end(process)[:2] == (128 + second, "")
    assert time.monotonic() - asked < 1


def test_the_time_limit_stops_like_a_signal(start):
    process = start(LOOP, max_hours=0.3 / 3600, saving=0)
    limit = f"the time limit of {0.3 / 3600:g} h (train.max_hours)"
    assert end(process) == (EXIT_STOPPED, "saved\n", f"stopped: {limit}\n")


def test_a_request_has_a_reason():
    assert (StopRequest(0, "this").requested, StopRequest(2, "this").reason) == (False, "")
    past = StopRequest(2, "this")
    past._deadline -= 2 * 3600
    assert past.requested and past.reason == "the time limit of 2 h (train.max_hours)"


def test_afterwards_everything_is_as_before():
    def handler(number, frame):
        pass

    before = [signal.signal(signal.SIGUSR1, handler), *map(signal.getsignal, SIGNALS[:2])]
    descriptors = len(os.listdir("/dev/fd"))
    try:
        with StopRequest(0, "this"):
            assert signal.getsignal(signal.SIGUSR1) is not handler
        assert signal.getsignal(signal.SIGUSR1) is handler
        assert [*map(signal.getsignal, SIGNALS[:2])] == before[1:]
        assert signal.set_wakeup_fd(-1) == -1
        assert len(os.listdir("/dev/fd")) == descriptors
    finally:
        signal.signal(signal.SIGUSR1, before[0])


def test_children_are_ended_as_usual_and_that_is_no_request_to_the_parent(start):
    process = start("""
        import os, signal, subprocess, time
        from diffussm.training.preemption import StopRequest

        with StopRequest(0, "this") as stop:
            children = [subprocess.Popen(["sleep", "60"]).pid, os.fork()]
            if children[1] == 0:
                time.sleep(60)
                os._exit(0)
            time.sleep(0.1)
            for child in children:
                os.kill(child, signal.SIGTERM)
            statuses = [os.waitpid(child, 0)[1] for child in children]
            assert [os.WTERMSIG(status) for status in statuses] == [signal.SIGTERM] * 2
            time.sleep(0.1)
            assert not stop.requested
            if (leaves := os.fork()) == 0:
                raise SystemExit  # through the context, which is the parent's
            assert os.waitpid(leaves, 0)[1] == 0
            print("ready", flush=True)
            while not stop.requested:
                time.sleep(0.01)
    """)
    process.send_signal(signal.SIGTERM)
    code, out, error = end(process)
    assert (code, out) == (0, "") and error.startswith("this: SIGTERM")
