"""Names of intensity windows, as a person types them and as an adapter file keeps them."""

import math

from fmclip.errors import FmclipError
from fmclip.scans.intensity import CT_WINDOWS

AS_STORED = "as stored"
"""The file's own window, or a robust range where it has none."""
_WIDEST = 1e6


def parse_window(text: str) -> tuple[float, float] | None:
    """Read a window as a person writes it.

    Args:
        text: A name out of `CT_WINDOWS` or `AS_STORED` ("soft-tissue" is "soft tissue"), or "centre,width".

    Returns:
        (centre, width) in the file's units, for `read_scan(window=...)`; None for `AS_STORED`.

    Raises:
        FmclipError: It is neither.
    """
    name = text.strip().lower().replace("-", " ")
    if name == AS_STORED:
        return None
    if name in CT_WINDOWS:
        return CT_WINDOWS[name]
    try:
        centre, width = map(float, text.split(","))
    except ValueError:
        centre = width = math.nan
    if not (abs(centre) <= _WIDEST and 0 < width <= _WIDEST):  # also False for NaN
        names = ", ".join(known.replace(" ", "-") for known in (*CT_WINDOWS, AS_STORED))
        raise FmclipError(f"There is no such window. Choose {names}, or give centre,width such as 40,400.")
    return centre, width


def name_window(window: tuple[float, float] | None) -> str:
    """Name a window, the same one always in the same way: `parse_window` takes the name back.

    Args:
        window: (centre, width), or None for `AS_STORED`.

    Returns:
        A name out of `CT_WINDOWS`, `AS_STORED`, or "centre,width".
    """
    if window is None:
        return AS_STORED
    names = {usual: name for name, usual in CT_WINDOWS.items()}
    return names.get(window, f"{window[0]:g},{window[1]:g}")
