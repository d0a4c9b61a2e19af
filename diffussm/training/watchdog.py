"""A rank that makes no progress shows where it hangs, and ends: then the launcher ends the others, and may start anew.

When one rank hangs, the others hang in their collectives, and each shows where.

A thread looks at the last beat. It cannot do so while C code that hangs holds the interpreter's lock (the GIL). For
that case it winds up an alarm of the system's, which needs no interpreter, and winds it up again as long as it runs.

Neither may end a process that was suspended, which takes time but is no hang. The thread notices that it woke up late,
and counts anew. The alarm has to ring twice: what rang while the process was suspended rings once when it goes on,
and the thread has until the second time to wind it up again.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time

from diffussm.errors import EXIT_HUNG

POLL_SECONDS = 5
STDERR = 2  # of the process, whatever sys.stderr is


class Watchdog:
    """Ends this process when no beat comes: `with Watchdog(30, "rank 3 on node5") as dog: dog.beat("step 12"); ...`.

    It prints the stacks of all threads to stderr and exits with code EXIT_HUNG; where the GIL is held, the process dies
    of SIGALRM (Linux only). To be entered and left by the main thread.

    Args:
        minutes: without a beat, after which the process ends; 0: it never does.
        describe: this process, for messages: "rank 3 on node5".
    """

    def __init__(self, minutes: float, describe: str) -> None:
        self._minutes, self._describe = minutes, describe
        self._seconds = minutes * 60
        self._poll = min(POLL_SECONDS, self._seconds / 4)
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str) -> None:
        """There is progress; what begins now is called ``doing``, such as "step 12". Cheap."""
        self._last = doing, time.monotonic()

    def __enter__(self) -> Watchdog:
        if self._minutes:
            self.beat("the start")
            os.register_at_fork(before=faulthandler.cancel_dump_traceback_later)  # else a forked child cannot exit
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._minutes:
            self._left.set()
            self._thread.join()
            _stop_alarm()

    def _watch(self) -> None:
        counted_from = woke = time.monotonic()
        _wind_alarm(self._seconds, grace=4 * self._poll)
        while not self._left.wait(self._poll):
            _wind_alarm(self._seconds, grace=4 * self._poll)
            now = time.monotonic()
            if now - woke > 2 * self._poll:  # suspended meanwhile
                counted_from = now
            woke = now
            doing, since = self._last
            if now - max(since, counted_from) > self._seconds:
                self._end(doing)

    def _end(self, doing: str) -> None:
        header = (
            f'{self._describe}: no progress for {self._minutes:g} min in "{doing}": stacks of all threads follow; '
            "then this process ends (train.hang_minutes)\n"
        )
        try:  # in one piece: other ranks write there at the same time
            with tempfile.TemporaryFile() as text, open(STDERR, "wb", closefd=False) as stderr:
                text.write(header.encode())
                text.flush()
                faulthandler.dump_traceback(text, all_threads=True)
                text.seek(0)
                stderr.write(text.read())
        except OSError:  # a full disk
            faulthandler.dump_traceback(STDERR, all_threads=True)
        os._exit(EXIT_HUNG)


def _wind_alarm(seconds: float, grace: float) -> None:
    """In so many seconds print all stacks, and end the process ``grace`` seconds later, unless wound up again."""
    faulthandler.dump_traceback_later(seconds, file=STDERR)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        signal.setitimer(signal.ITIMER_REAL, seconds, grace)
        libc.sysv_signal(signal.SIGALRM, libc.abs)  # the first one does nothing, and brings back the default: to die


def _stop_alarm() -> None:
    faulthandler.cancel_dump_traceback_later()
    if sys.platform == "linux":
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGALRM) or signal.SIG_DFL)
