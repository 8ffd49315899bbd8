"""Who is on the page: each visitor's session and scans, kept in this process and never shared."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from fmclip.errors import FmclipError
from fmclip.page.uploads import delete
from fmclip.scans import Scan
from fmclip.session import Finding, Session

MAX_VISITORS = 32
IDLE_SECONDS = 3600.0


@dataclass(eq=False)
class Visitor:
    """What one visitor sees.

    Attributes:
        session: Their adapter.
        references: Normal scans.
        queries: Scans to be mapped; the running adaptation looks at this very list.
        findings: What is known about the queries, in their order.
        truths: What is known of example queries, by digest.
        selected: The query shown in detail; None for the worst.
        threshold: Threshold chosen by hand; None for the calibrated one.
        opacity: Opacity of the overlay.
        has_example: Whether the scans are those of an example case.
        download: The adapter as a file, for the download button.
        seen: When the visitor last did something.
    """

    session: Session
    references: list[Scan] = field(default_factory=list)
    queries: list[Scan] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    truths: dict[str, str] = field(default_factory=dict)
    selected: Scan | None = None
    threshold: float | None = None
    opacity: float = 0.5
    has_example: bool = False
    download: str | None = None
    seen: float = field(default_factory=time.monotonic)

    def close(self) -> None:
        """Stop what runs and let go of everything."""
        self.session.close()
        delete(self.download)


class Visitors:
    """Visitors by their token; those idle for long leave first when it gets full.

    Args:
        new_session: Makes a session.
        capacity: Visitors at a time.
        idle_seconds: A visitor who did nothing for so long is forgotten.
    """

    def __init__(
        self, new_session: Callable[[], Session], capacity: int = MAX_VISITORS, idle_seconds: float = IDLE_SECONDS
    ) -> None:
        self._new_session = new_session
        self._capacity = capacity
        self._idle_seconds = idle_seconds
        self._visitors: OrderedDict[str, Visitor] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._visitors)

    def get(self, token: str) -> Visitor:
        """Find a visitor, or welcome a new one.

        Raises:
            FmclipError: Everybody is busy and there is no room.
        """
        with self._lock:
            visitor = self._visitors.get(token)
            if visitor is None:
                self._make_room()
                visitor = self._visitors[token] = Visitor(self._new_session())
            visitor.seen = time.monotonic()
            self._visitors.move_to_end(token)
            return visitor

    def is_adapting(self, token: str) -> bool:
        """Whether a visitor's fit is running; nobody is welcomed by asking."""
        visitor = self._visitors.get(token)
        return visitor is not None and visitor.session.is_adapting

    def leave(self, token: str) -> None:
        """Forget a visitor."""
        with self._lock:
            visitor = self._visitors.pop(token, None)
        if visitor is not None:
            visitor.close()

    def _make_room(self) -> None:
        now = time.monotonic()
        idle = [token for token, visitor in self._visitors.items() if not visitor.session.is_adapting]
        gone = [token for token in idle if now - self._visitors[token].seen > self._idle_seconds]
        if not gone and len(self._visitors) >= self._capacity:
            gone = idle[:1]  # the one who did nothing for the longest time
        for token in gone:
            self._visitors.pop(token).close()
        if len(self._visitors) >= self._capacity:
            raise FmclipError("The page is full: all visitors are adapting right now. Try again in a few minutes.")
