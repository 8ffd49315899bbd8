"""Long work in a thread: a stream of what it says, a Stop that is never waited for long, and fair turns on a device."""

from __future__ import annotations

import contextlib
import contextvars
import os
import queue
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from fmclip.errors import Stopped

Put: TypeAlias = Callable[[Any], None]
"""Puts a value into a stream."""

_POLL_SECONDS = 0.05
_PATIENCE_SECONDS = 0.3  # turns change at every step: a wait that is shorter is not worth a word


class StopSignal:
    """Set by the visitor, read by the fit, in this process or another: a file lies there while the fit may go on."""

    def __init__(self) -> None:
        descriptor, name = tempfile.mkstemp(prefix="fmclip-fit-")
        os.close(descriptor)
        self._file = Path(name)
        self._at: float | None = None

    def set(self) -> None:
        """Ask the fit to end."""
        self._at = self._at or time.monotonic()
        self._file.unlink(missing_ok=True)

    def is_set(self) -> bool:
        """Whether the fit should end."""
        if self._at is None and not self._file.exists():
            self._at = time.monotonic()
        return self._at is not None

    def is_overdue(self, grace: float) -> bool:
        """Whether the fit should have ended `grace` seconds ago."""
        return self.is_set() and self._at is not None and time.monotonic() - self._at > grace


class Ended:
    """Whether work should end: the visitor pressed Stop, or nobody listens any more."""

    def __init__(self, stop: StopSignal) -> None:
        self._stop = stop
        self._left = False

    def set(self) -> None:
        """Nobody listens any more."""
        self._left = True

    def is_set(self) -> bool:
        """Whether the work should end."""
        return self._left or self._stop.is_set()


@dataclass(frozen=True)
class Waiting:
    """Somebody else's work is running on the device: this one waits for its first turn, or takes turns with it.

    Attributes:
        place: Its place in the line, from 1 on, before its first turn; 0 after that.
        count: How many are in the line, this one included; 1 once it is alone again.
    """

    place: int
    count: int


def stream(work: Callable[[Put, Ended], None], stop: StopSignal, grace: float) -> Iterator[Any]:
    """Run work in a thread of its own, and give what it puts; after a Stop it is not waited for longer than `grace`.

    Args:
        work: Gets a function that puts a value into the stream, and whether it should end; may raise `Stopped`.
        stop: Ends the stream.
        grace: Seconds after the Stop in which the work may still put something. What lies there by then is given.

    Yields:
        What the work puts.

    Raises:
        Exception: What the work raised.
    """
    values: queue.SimpleQueue[Any] = queue.SimpleQueue()
    ended, over = Ended(stop), object()

    def run() -> None:
        try:
            work(values.put, ended)
            values.put(over)
        except Stopped:
            values.put(over)
        except Exception as error:  # raised again in the thread that listens
            values.put(error)

    context = contextvars.copy_context()  # a host that lends its GPU finds there who asks
    threading.Thread(target=context.run, args=(run,), name="fit", daemon=True).start()
    try:
        while True:
            is_overdue = stop.is_overdue(grace)
            try:
                value = values.get(timeout=0 if is_overdue else _POLL_SECONDS)
            except queue.Empty:
                if is_overdue:
                    return
                continue
            if value is over:
                return
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        ended.set()  # also when the caller closes the stream: nobody is listening any more


class Turns:
    """Who may compute on a device: the first in the line, who goes to its end after each step."""

    def __init__(self) -> None:
        self._line: deque[object] = deque()
        self._moved = threading.Condition()

    @contextlib.contextmanager
    def taken(self, put: Put, ended: Ended) -> Iterator[Callable[[], None]]:
        """Wait for the first turn; gives a function that lets the others have theirs and waits for the next.

        Raises:
            Stopped: The work should end.
        """
        me = object()
        with self._moved:
            self._line.append(me)
        try:
            self._wait(me, ended, put)
            yield partial(self._hand_over, me, ended, put, [1])
        finally:
            with self._moved:
                self._line.remove(me)
                self._moved.notify_all()

    def _hand_over(self, me: object, ended: Ended, put: Put, told: list[int]) -> None:
        with self._moved:
            count = len(self._line)
            if count != told[0]:
                told[0] = count
                put(Waiting(0, count))
            if count == 1:
                return
            self._line.remove(me)
            self._line.append(me)
            self._moved.notify_all()
        self._wait(me, ended)

    def _wait(self, me: object, ended: Ended, put: Put | None = None) -> None:
        since, told = time.monotonic(), (0, 0)
        with self._moved:
            while self._line[0] is not me:
                if ended.is_set():
                    raise Stopped
                here = self._line.index(me) + 1, len(self._line)
                if put is not None and here != told and time.monotonic() - since > _PATIENCE_SECONDS:
                    put(Waiting(*here))
                    told = here
                self._moved.wait(timeout=_POLL_SECONDS)
