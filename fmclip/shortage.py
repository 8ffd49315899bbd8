"""When memory is too small: fits go on on the processor, answers come in halves, and the rest is said in words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from fmclip.background import Put
from fmclip.errors import DeviceShortage, FmclipError, is_out_of_device_memory, is_out_of_memory
from fmclip.process import free_memory

if TYPE_CHECKING:
    from fmclip.detectors import Detector, Prediction
    from fmclip.scans import Scan
    from fmclip.towers import Tower

T = TypeVar("T")

ON_CPU = (
    "The graphics card ran out of memory: adapting begins again on the processor. It takes longer, and the result may "
    "differ a little from the card's: dropout draws other numbers there, and sums are rounded in another way."
)
_TOO_SMALL = (
    "The memory ran out. Wait for other visitors to finish, use fewer scans or the preset 'fast', or start the page on "
    "the CPU."
)


def fit_where_it_fits(fit: Callable[[Tower], T], tower: Tower, on_cpu: Callable[[], Tower] | None, put: Put) -> T:
    """Fit, and where the tower's GPU has too little memory, fit again on the processor.

    Args:
        fit: Learns with a tower.
        tower: The one to begin with.
        on_cpu: Gives the same tower on the processor; None where the fit must not go on there.
        put: Hears of the change.

    Returns:
        What `fit` returned.

    Raises:
        DeviceShortage: The GPU has too little memory, and there is no `on_cpu`.
    """
    from fmclip.detectors import Notice

    try:
        return fit(tower)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_device_memory(error) or not is_on_gpu(tower):  # the host's own memory is no larger there
            raise
        if on_cpu is None:
            raise DeviceShortage(_TOO_SMALL) from error
    free_memory()
    put(Notice(ON_CPU))
    return fit(on_cpu())


def predict_where_it_fits(detector: Detector, scans: Sequence[Scan]) -> list[Prediction]:
    """Map scans together, or where the memory is too small for that, in halves; no answer depends on it."""
    try:
        return detector.predict(scans)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or len(scans) == 1:
            raise
    free_memory()
    middle = len(scans) // 2
    return [*predict_where_it_fits(detector, scans[:middle]), *predict_where_it_fits(detector, scans[middle:])]


def is_on_gpu(tower: Tower) -> bool:
    """Whether there is a processor to fall back to."""
    return tower.device.type != "cpu"


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turn a device that is out of memory into an error that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise FmclipError(_TOO_SMALL) from error
