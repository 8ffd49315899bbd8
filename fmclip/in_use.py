"""What a session answers with: one value, so that a query never sees half of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fmclip.calibration import Calibration
    from fmclip.learning import Adapter
    from fmclip.regions import NormalRegion
    from fmclip.scans import Scan


@dataclass(frozen=True, eq=False)
class InUse:
    """An adapter, and what it was made of as far as that is at hand.

    Attributes:
        adapter: What was learned.
        calibration: Threshold and reference scores.
        references: The scans that it was learned from; () for one from a file, which holds no pictures.
        regions: Regions that the session's person called normal and that it takes into account.
        regions_from_file: How many others it holds from the file that it came from.
    """

    adapter: Adapter
    calibration: Calibration
    references: tuple[Scan, ...] = ()
    regions: tuple[NormalRegion, ...] = ()
    regions_from_file: int = 0
