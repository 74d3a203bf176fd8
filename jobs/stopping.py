"""The signals of the command line: one owner, from the first line of the process to its last.

SIGINT, SIGTERM and SIGHUP are blocked in every thread, and one thread waits for them. So there is no handler that a
library could replace, as Ray's C++ does when it starts and again when it ends. What the first signal does depends:

- While modules are imported nothing is held, and the process ends at once.
- While a command runs, `Stopped` is raised in the main thread as soon as that leaves nothing half done, and again only
  when the command has not ended long after: some code of others loses it.
- Later ones are answered with a line, and those after the command with nothing: its exit code is known.

Only `begin` changes the process. Python code that uses the library keeps its own handlers.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from enum import Enum, auto
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from prismaquant_ray.interruption import may_interrupt, uninterrupted

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

T = TypeVar("T")
#: The last line of a command that was stopped.
STOPPED = "stopped; the same command continues"
_AGAIN = "stopping: what is open is being closed; this signal changes nothing"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Wakes the main thread.
_WAKE = signal.SIGUSR1
# Seconds until a stop that had to wait is tried again, and for which closing is left alone once it was raised.
_PAUSE, _CLOSING = 0.05, 10.0


class Stopped(KeyboardInterrupt):
    """A signal stops the command; `exit_code` is the one that a shell gives a process that it ended."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class _Phase(Enum):
    STARTING = auto()
    RUNNING = auto()
    OVER = auto()


class Signals:
    """What the process does on a signal. There is one, `SIGNALS`."""

    def __init__(self) -> None:
        self._phase = _Phase.STARTING
        self._number: int | None = None
        self._due = 0.0
        # Between asking for the phase and acting on it nothing must begin.
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Take the signals over, for good; first of all, while there is one thread only."""
        # Who ignores one, as nohup does for what it starts, wants it ignored.
        watched = {number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
        signal.pthread_sigmask(signal.SIG_BLOCK, watched)
        signal.signal(_WAKE, self._raise)
        sys.unraisablehook = self._lost
        # Ray ends its processes by SIGTERM. Ctrl-C and a closed terminal reach them, too, but are the driver's.
        os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM}))
        threading.Thread(target=self._watch, args=(watched,), name="signals", daemon=True).start()

    def run(self, command: Callable[[], T]) -> T:
        """The command's result. Stopped is raised inside it only: neither before nor afterwards.

        Raises:
            Stopped: by a signal; its cause is what closing ran into, if anything.
        """
        self._enter(_Phase.RUNNING)
        try:
            return command()
        except (Exception, KeyboardInterrupt) as error:
            if self._number is None:
                raise
            # Ray raises another KeyboardInterrupt in its place, and code in C whatever it likes.
            raise Stopped(self._number) from (error if isinstance(error, Exception) else None)
        finally:
            self._enter(_Phase.OVER)

    @uninterrupted
    def _enter(self, phase: _Phase) -> None:
        with self._lock:
            self._phase = phase

    def _watch(self, watched: set[signal.Signals]) -> None:
        while True:
            self._receive(signal.sigwait(watched))

    def _receive(self, number: int) -> None:
        with self._lock:
            if self._phase is _Phase.STARTING:
                os.write(2, f"{STOPPED}\n".encode())
                os._exit(128 + number)
            elif self._phase is _Phase.RUNNING and self._number is None:
                self._number = number
                threading.Thread(target=self._insist, name="stop", daemon=True).start()
            elif self._phase is _Phase.RUNNING:
                # Not through sys.stderr, which the main thread may be writing to.
                os.write(2, f"{_AGAIN}\n".encode())

    def _insist(self) -> None:
        """Wake the main thread, also out of a system call, while a stop is due."""
        main = threading.main_thread().ident
        assert main is not None
        while self._phase is _Phase.RUNNING:
            if time.monotonic() >= self._due:
                signal.pthread_kill(main, _WAKE)
            time.sleep(_PAUSE)

    def _raise(self, _: int, frame: FrameType | None) -> None:
        """In the main thread, where it was woken."""
        due = self._phase is _Phase.RUNNING and time.monotonic() >= self._due
        if due and self._number is not None and may_interrupt(frame):
            self._due = time.monotonic() + _CLOSING
            raise Stopped(self._number)

    def _lost(self, event: UnraisableHookArgs) -> None:
        """A stop that was raised where no exception can pass, as in a collector's callback, is due again."""
        if isinstance(event.exc_value, Stopped):
            self._due = 0.0
        else:
            sys.__unraisablehook__(event)


SIGNALS = Signals()
