"""Where in a tower features are taken."""

from __future__ import annotations

from typing import TypeAlias

from fmclip.towers.ahead import Ahead
from fmclip.towers.smaller import PlainPlace, Smaller

Place: TypeAlias = PlainPlace | Smaller
"""One of the tower's own intermediate features, a tap, a block behind one of them, or any of these seen smaller."""


def index_of(place: Place) -> int:
    """How far the tower must run: the place's own or the next of its intermediate features."""
    place = plain(place)
    return place if isinstance(place, int) else place.index


def plain(place: Place) -> PlainPlace:
    """The place within the look, whichever look it is."""
    return place.of if isinstance(place, Smaller) else place


def says_only_where(place: Place) -> bool:
    """Whether features of a place say where a scan deviates and not whether it does; nothing is trained for these."""
    return isinstance(place, (Ahead, Smaller))
