"""Who is on the page: each visitor's session and scans, kept in this process and never shared."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from fmclip.contrastive.index import Index
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
        marked: Reference scans that are selected to be removed.
        suspects: Reference scans that the checks would leave out: copies, flat ones, outliers.
        queries: Scans to be mapped; the running adaptation looks at this very list.
        findings: What the adapter in use says about the queries, in their order.
        next_reference: Number of the next reference scan that is uploaded; a number is never given twice.
        next_query: The same for query scans.
        windows: Name of the window that a scan was read with, for scans from files that need one.
        truths: What is known of example queries, by digest.
        selected: The query shown in detail; None for the worst.
        threshold: Threshold chosen by hand; None for the calibrated one.
        opacity: Opacity of the overlay.
        has_example: Whether the scans are those of an example case.
        index: Reports to search in, if the visitor brought some.
        download: The adapter as a file, for the download button.
        seen: When the visitor last did something.
    """

    session: Session
    references: list[Scan] = field(default_factory=list)
    marked: set[Scan] = field(default_factory=set)
    suspects: list[Scan] = field(default_factory=list)
    queries: list[Scan] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    next_reference: int = 1
    next_query: int = 1
    windows: MutableMapping[Scan, str] = field(default_factory=WeakKeyDictionary)
    truths: dict[str, str] = field(default_factory=dict)
    selected: Scan | None = None
    threshold: float | None = None
    opacity: float = 0.5
    has_example: bool = False
    index: Index | None = None
    download: str | None = None
    seen: float = field(default_factory=time.monotonic)

    @property
    def window(self) -> str | None:
        """Name of the window that the reference scans were read with; None if none of them needed one."""
        return next((self.windows[scan] for scan in self.references if scan in self.windows), None)

    def drop_references(self) -> None:
        """Let go of all reference scans; numbers start again."""
        self.references, self.suspects, self.next_reference, self.has_example = [], [], 1, False
        self.marked.clear()

    def drop_queries(self) -> None:
        """Let go of all query scans; numbers start again."""
        self.queries[:], self.findings, self.truths, self.selected, self.next_query = [], [], {}, None, 1

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
        self._lock = threading.Lock()  # held for looking up only: sessions are made and closed outside of it

    def __len__(self) -> int:
        return len(self._visitors)

    def get(self, token: str) -> Visitor:
        """Find a visitor, or welcome a new one.

        Raises:
            FmclipError: Everybody is busy and there is no room.
        """
        visitor = self._find(token)
        if visitor is None:
            newcomer = Visitor(self._new_session())
            with self._lock:
                gone = self._make_room() if token not in self._visitors else []
                visitor = self._visitors.setdefault(token, newcomer)
            if gone:
                threading.Thread(target=_close_all, args=(gone,), daemon=True).start()
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

    def _find(self, token: str) -> Visitor | None:
        with self._lock:
            visitor = self._visitors.get(token)
            if visitor is not None:
                visitor.seen = time.monotonic()
                self._visitors.move_to_end(token)
            return visitor

    def _make_room(self) -> list[Visitor]:
        """Take out those who have to go; the caller closes them once the lock is free."""
        now = time.monotonic()
        idle = [token for token, visitor in self._visitors.items() if not visitor.session.is_adapting]
        gone = [token for token in idle if now - self._visitors[token].seen > self._idle_seconds]
        if not gone and len(self._visitors) >= self._capacity:
            gone = idle[:1]  # the one who did nothing for the longest time
        if len(self._visitors) - len(gone) >= self._capacity:
            raise FmclipError("The page is full: all visitors are adapting right now. Try again in a few minutes.")
        return [self._visitors.pop(token) for token in gone]


def _close_all(visitors: list[Visitor]) -> None:
    for visitor in visitors:
        visitor.close()
