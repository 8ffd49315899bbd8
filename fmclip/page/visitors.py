"""Who is on the page: each visitor's session and scans, kept in this process and never shared."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from hmac import compare_digest
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from fmclip.colours import COLOURS
from fmclip.errors import FmclipError
from fmclip.page.explaining import Why
from fmclip.page.uploads import delete
from fmclip.scans import Scan
from fmclip.session import Finding, Session

if TYPE_CHECKING:
    from fmclip.contrastive.index import Index
    from fmclip.detectors import SyntheticExample
    from fmclip.regions import NormalRegion
    from fmclip.self_check import SelfCheck

MAX_VISITORS = 32
IDLE_SECONDS = 3600.0
DEFAULT_METHOD = "fusionmedclip"
DEFAULT_PRESET = "fast"


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
        method: Name of the detector to adapt with.
        preset: How long to train.
        variants: Variants of the method that are chosen, see `settings.variants_of`.
        checks: Synthetic self-checks of the last training.
        examples: Synthetic anomalies that it learned from, as shown.
        abnormals: Abnormal scans, for methods that can use them.
        abnormal_masks: What the person has painted on them: bool [H, W].
        painted: The abnormal scan that is open in the editor.
        next_abnormal: Number of the next abnormal scan.
        windows: Name of the window that a scan was read with, for scans from files that need one.
        embeddings: What the tower sees in a reference scan, once it was asked.
        truths: What is known of example queries, by digest.
        selected: The query shown in detail; None for the worst.
        threshold: Threshold chosen by hand; None for the calibrated one.
        opacity: Opacity of the overlay.
        colours: Name of the colour map.
        why: The last spot that was asked about.
        regions: Parts of queries that the next adaptation gets as normal; those in use are the session's.
        in_editor: The query that lies in the editor.
        has_example: Whether the scans are those of an example case.
        index: Reports to search in, if the visitor brought some.
        download: The adapter as a file, for the download button.
        exports: Files of the report and of everything, by kind, once they were asked for.
        records: Records of the synthetic anomalies as a file, likewise.
        seen: When the visitor last did something.
        adapter_name: What they call their adapter.
        scan_type: What they last adapted to.
        key: Known to their browser's tab alone; finds them again after a reload. Empty if the tab was given none.
        is_away: Whether the page was closed or reloaded, and they have not come back yet.
        is_closed: Whether all that they had was let go of.
    """

    session: Session
    references: list[Scan] = field(default_factory=list)
    marked: set[Scan] = field(default_factory=set)
    suspects: list[Scan] = field(default_factory=list)
    queries: list[Scan] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    next_reference: int = 1
    next_query: int = 1
    method: str = DEFAULT_METHOD
    preset: str = DEFAULT_PRESET
    variants: list[str] = field(default_factory=list)
    checks: list[SelfCheck] = field(default_factory=list)
    examples: tuple[SyntheticExample, ...] = ()
    abnormals: list[Scan] = field(default_factory=list)
    abnormal_masks: dict[Scan, np.ndarray] = field(default_factory=dict)
    painted: Scan | None = None
    next_abnormal: int = 1
    windows: MutableMapping[Scan, str] = field(default_factory=WeakKeyDictionary)
    embeddings: MutableMapping[Scan, np.ndarray] = field(default_factory=WeakKeyDictionary)
    truths: dict[str, str] = field(default_factory=dict)
    selected: Scan | None = None
    threshold: float | None = None
    opacity: float = 0.5
    colours: str = COLOURS
    why: Why | None = None
    regions: list[NormalRegion] = field(default_factory=list)
    in_editor: Scan | None = None
    has_example: bool = False
    index: Index | None = None
    download: str | None = None
    exports: dict[str, str] = field(default_factory=dict)
    records: str | None = None
    seen: float = field(default_factory=time.monotonic)
    adapter_name: str = ""
    scan_type: str = ""
    key: str = ""
    is_away: bool = False
    is_closed: bool = False

    @property
    def window(self) -> str | None:
        """Name of the window that the reference scans were read with; None if none of them needed one."""
        return next((self.windows[scan] for scan in self.references if scan in self.windows), None)

    def drop_references(self) -> None:
        """Let go of all reference scans; numbers start again."""
        self.references, self.suspects, self.next_reference, self.has_example = [], [], 1, False
        self.marked.clear()
        self.regions.clear()

    def drop_queries(self) -> None:
        """Let go of all query scans; numbers start again."""
        self.queries[:], self.findings, self.truths, self.selected, self.next_query = [], [], {}, None, 1
        self.why, self.in_editor = None, None

    def drop_abnormals(self) -> None:
        """Let go of all abnormal scans and their masks; numbers start again."""
        self.abnormals, self.painted, self.next_abnormal = [], None, 1
        self.abnormal_masks.clear()

    def close(self) -> None:
        """Stop what runs and let go of everything, files that are still being written included."""
        self.is_closed = True
        self.session.close()
        self.drop_references()
        self.drop_queries()
        self.drop_abnormals()
        for file in (self.download, self.records, *self.exports.values()):
            delete(file)

    @contextlib.contextmanager
    def writing(self, file: Path) -> Iterator[None]:
        """Write a file of theirs, and take note of it: half a file goes again, and one that comes after `close` too."""
        try:
            yield
        except BaseException:
            delete(file)
            raise
        if self.is_closed:
            delete(file)


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

    def welcome(self, token: str, key: str) -> tuple[Visitor, bool]:
        """Find a visitor again by the key that their tab has kept; a stranger becomes a new visitor with a new key.

        Args:
            token: Of the page that was opened just now.
            key: What the tab has kept; "" for nothing.

        Returns:
            The visitor, and whether they were here before.
        """
        with self._lock:
            former = next((old for old, one in self._visitors.items() if key and _same(one.key, key)), None)
            if former is not None:  # also while the old page has not been missed yet: its `leave` finds nobody
                visitor = self._visitors.pop(former)
                stranger = self._visitors.pop(token, None)
                self._visitors[token] = visitor
        if former is None:
            visitor, stranger = self.get(token), None
            visitor.key = visitor.key or secrets.token_urlsafe(32)
        if stranger is not None:
            stranger.close()
        visitor.is_away, visitor.seen = False, time.monotonic()
        return visitor, former is not None

    def leave(self, token: str) -> None:
        """A page was closed or reloaded: what runs ends. Who has a key may come back, who has none is forgotten."""
        with self._lock:
            visitor = self._visitors.get(token)
            if visitor is not None and not visitor.key:
                del self._visitors[token]
        if visitor is None:
            return
        if not visitor.key:
            visitor.close()
            return
        visitor.is_away, visitor.seen = True, time.monotonic()
        visitor.session.stop()
        timer = threading.Timer(self._idle_seconds + 1, self.forget_idle)
        timer.daemon = True
        timer.start()

    def forget(self, token: str) -> None:
        """Let go of all that a visitor has, now."""
        with self._lock:
            visitor = self._visitors.pop(token, None)
        if visitor is not None:
            visitor.close()

    def forget_idle(self) -> None:
        """Let go of those who did nothing for too long."""
        with self._lock:
            gone = self._idle()
            visitors = [self._visitors.pop(token) for token in gone]
        _close_all(visitors)

    def _find(self, token: str) -> Visitor | None:
        with self._lock:
            visitor = self._visitors.get(token)
            if visitor is not None:
                visitor.seen = time.monotonic()
                self._visitors.move_to_end(token)
            return visitor

    def _make_room(self) -> list[Visitor]:
        """Take out those who have to go; the caller closes them once the lock is free."""
        gone = self._idle()
        if not gone and len(self._visitors) >= self._capacity:
            resting = [token for token, visitor in self._visitors.items() if not visitor.session.is_adapting]
            away = [token for token in resting if self._visitors[token].is_away]
            gone = (away or resting)[:1]  # the one who left, or did nothing, for the longest time
        if len(self._visitors) - len(gone) >= self._capacity:
            raise FmclipError("The page is full: all visitors are adapting right now. Try again in a few minutes.")
        return [self._visitors.pop(token) for token in gone]

    def _idle(self) -> list[str]:
        """Tokens of those who did nothing for too long; the lock is held."""
        now = time.monotonic()
        resting = ((token, visitor) for token, visitor in self._visitors.items() if not visitor.session.is_adapting)
        return [token for token, visitor in resting if now - visitor.seen > self._idle_seconds]


def _same(key: str, other: str) -> bool:
    """Whether two keys are equal, in a time that tells nothing about where they differ."""
    return compare_digest(key.encode(), other.encode("utf-8", "replace"))


def _close_all(visitors: list[Visitor]) -> None:
    for visitor in visitors:
        visitor.close()
