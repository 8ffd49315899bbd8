"""Where in a tower features are taken."""

from __future__ import annotations

from typing import TypeAlias

from fmclip.towers.ahead import Ahead
from fmclip.towers.smaller import Smaller
from fmclip.towers.taps import Tap

Place: TypeAlias = int | Tap | Ahead | Smaller
"""One of the tower's own intermediate features, a tap, a block behind one of them, or any of these seen smaller."""


def index_of(place: Place) -> int:
    """How far the tower must run: the place's own or the next of its intermediate features."""
    if isinstance(place, Smaller):
        return index_of(place.of)
    return place if isinstance(place, int) else place.index


def says_only_where(place: Place) -> bool:
    """Whether features of a place are asked where a scan deviates and not whether it does; none of these is trained."""
    return isinstance(place, (Ahead, Smaller))
