"""Being asked to stop, by a signal or by the time limit: the training loop finishes its step, saves and exits.

A signal counts at once, even while the main thread is inside a call that does not return, such as a collective whose
peer is gone. Handlers written in Python would wait for its end; so the interpreter's handler in C writes the signal's
number into a socket, and a thread reads it there.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import threading
import time

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # a launcher's, Ctrl-C's, SLURM's --signal=USR1
REPEAT_SECONDS = 3  # Ctrl-C comes twice: from the terminal, and from the launcher, which passes it on


class StopRequest:
    """Whether this process is asked to stop: `with StopRequest(...) as stop: while not stop.requested: train_step()`.

    Inside the context SIGTERM, SIGINT and SIGUSR1 no longer end the process. The first asks it to stop, and says so on
    stderr. One that comes later than REPEAT_SECONDS after the first ends it at once, with exit code 128 + its number.
    To be entered and left by the main thread. Processes forked inside have the handlers of before.

    Args:
        max_hours: from now, after which stopping is requested; 0: no limit.
        describe: this process, for messages: "rank 3 on node5".
    """

    def __init__(self, max_hours: float, describe: str) -> None:
        self._max_hours, self._describe = max_hours, describe
        self._deadline = time.monotonic() + max_hours * 3600 if max_hours else math.inf
        self._signal = ""
        self._undo = contextlib.ExitStack()

    @property
    def requested(self) -> bool:
        """Cheap enough to ask at each step. Ranks differ by a step or so: they have to agree."""
        return bool(self.reason)

    @property
    def reason(self) -> str:
        """What asks to stop: "SIGTERM", "the time limit of 2 h (train.max_hours)"; empty while nothing does."""
        if self._signal or time.monotonic() < self._deadline:
            return self._signal
        return f"the time limit of {self._max_hours:g} h (train.max_hours)"

    def __enter__(self) -> StopRequest:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._listener = threading.Thread(target=self._listen, name="stop request", daemon=True)
        self._listener.start()
        before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._undo.callback(signal.set_wakeup_fd, before)
        for number in SIGNALS:
            handler = signal.signal(number, lambda *_: None)
            self._undo.callback(signal.signal, number, handler or signal.SIG_DFL)  # None: not Python's
        os.register_at_fork(after_in_child=self._undo.close)  # a signal to the child is not one to this process
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()
        if self._listener.is_alive():  # in a forked child it is not, and the connection is the parent's
            self._writer.shutdown(socket.SHUT_WR)  # close() would not end the listener while children hold copies
            self._listener.join()
        self._writer.close()
        self._reader.close()

    def _listen(self) -> None:
        since = math.inf
        while received := self._reader.recv(1):
            number = received[0]
            if number not in SIGNALS:  # another part of the program handles it
                continue
            if not self._signal:
                since, self._signal = time.monotonic(), signal.Signals(number).name
                self._announce()
            elif time.monotonic() - since > REPEAT_SECONDS:
                os._exit(128 + number)

    def _announce(self) -> None:
        line = f"{self._describe}: {self._signal}: finishes the step, saves and exits; a second signal exits at once\n"
        with contextlib.suppress(OSError):  # the terminal may be gone, which is often why the signal came
            os.write(2, line.encode())  # in one piece: other ranks write there too
