"""From stored numbers to pixels in [0, 1]: windows, robust ranges, missing values, grey or colour."""

import math

import numpy as np

from fmclip.scans.scan import Unreadable

CT_WINDOWS: dict[str, tuple[float, float]] = {
    "soft tissue": (40.0, 400.0),
    "lung": (-600.0, 1500.0),
    "brain": (40.0, 80.0),
    "bone": (480.0, 2500.0),
}
"""Window (centre, width) in Hounsfield units, for `read_scan(window=...)`. One window for reference and query scans."""

_SAMPLED_VALUES = 2**22
_GREY_TOLERANCE = 4 / 255  # JPEG rounds the three channels of a grey picture apart by a few steps


def robust_range(values: np.ndarray, lower: float = 0.1, upper: float = 99.9) -> tuple[float, float]:
    """Darkest and brightest value, without the few extreme pixels that a marker or a spike of noise adds.

    Percentiles are taken over at most four million evenly spread values. Where they coincide (an image that is nearly
    all background), the true minimum and maximum are used instead.

    Args:
        values: Numbers of any shape; NaN and infinities are left out.
        lower: Percentile shown as 0.
        upper: Percentile shown as 1.

    Returns:
        (low, high); equal for a constant image, (0, 0) when there is no finite number.
    """
    step = max(1, values.size // _SAMPLED_VALUES)
    if step > 1:
        step |= 1  # an odd step does not fall on one column of an image whose width is a power of two
    sample = values.ravel(order="K")[::step].astype(np.float64)
    sample = sample[np.isfinite(sample)]
    if sample.size == 0:
        return 0.0, 0.0
    low, high = np.percentile(sample, (lower, upper))
    if low == high:
        everything = values[np.isfinite(values)]
        low, high = everything.min(), everything.max()
    return float(low), float(high)


def stretch(values: np.ndarray, bounds: tuple[float, float] | None = None) -> np.ndarray:
    """Map `bounds` to [0, 1] linearly and clip; a constant image becomes black.

    Args:
        values: Finite numbers of any shape.
        bounds: (low, high); default: `robust_range(values)`, the rule for 16-bit and float pictures, whose files do
            not say which values are black and white.

    Returns:
        float32 in [0, 1], the shape of `values`.
    """
    low, high = robust_range(values) if bounds is None else bounds
    # Half of everything, so that the range of a float64 image cannot overflow.
    half_span = high / 2 - low / 2
    if not half_span > 0:
        return np.zeros(values.shape, np.float32)
    exact_in_float32 = values.dtype.itemsize <= 2 or values.dtype == np.float32
    working = np.float32 if exact_in_float32 and half_span < 1e30 else np.float64
    scaled: np.ndarray = values.astype(working)
    scaled /= 2
    scaled -= low / 2
    scaled /= half_span
    return np.clip(scaled, 0.0, 1.0, out=scaled).astype(np.float32, copy=False)


def apply_window(values: np.ndarray, centre: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """Show the values around `centre`, as a viewer does (DICOM PS3.3 section C.11.2.1.2).

    Args:
        values: Numbers in the window's units (Hounsfield units for CT).
        centre: Value shown as mid-grey.
        width: Distance from black to white, above 0.
        function: "LINEAR", "LINEAR_EXACT" or "SIGMOID"; anything else counts as "LINEAR", the standard's default.

    Returns:
        float32 in [0, 1], the shape of `values`.

    Raises:
        Unreadable: If the window is not usable.
    """
    if not (math.isfinite(centre) and math.isfinite(width) and width > 0):
        raise Unreadable("cannot be shown with this window: its width must be above 0, and its centre a number.")
    values = values.astype(np.float64)
    if function == "SIGMOID":
        exponent = np.clip(-4.0 * (values - centre) / width, -500.0, 500.0)
        return (1.0 / (1.0 + np.exp(exponent))).astype(np.float32)
    if function == "LINEAR_EXACT":
        shown = (values - centre) / width + 0.5
    else:
        shown = (values - (centre - 0.5)) / max(width - 1.0, 1e-6) + 0.5
    return np.clip(shown, 0.0, 1.0).astype(np.float32)


def fill_missing(values: np.ndarray, notes: list[str]) -> np.ndarray:
    """Replace NaN and infinities by the smallest number of the image, and say so in `notes`.

    Args:
        values: [H, W] or [H, W, 3] numbers.
        notes: Gets a note when something was filled.

    Returns:
        Finite numbers, the shape of `values`.

    Raises:
        Unreadable: If more than half of the pixels hold no number.
    """
    if not np.issubdtype(values.dtype, np.floating):
        return values
    finite = np.isfinite(values)
    missing = 1.0 - float(finite.mean())
    if missing == 0.0:
        return values
    if missing > 0.5:
        raise Unreadable(
            f"holds no numbers (NaN) in {missing:.0%} of its pixels. Export it again, or choose another slice."
        )
    share = f"{missing:.0%}" if missing >= 0.005 else "less than 1%"
    notes.append(f"{share} of the pixels held no number (NaN) and were filled with the darkest value")
    return np.where(finite, values, values[finite].min())


def collapse_grey(pixels: np.ndarray) -> np.ndarray:
    """Return [H, W] for a picture whose three channels are equal (up to JPEG rounding), else the picture itself.

    Args:
        pixels: [H, W] or [H, W, 3], uint8 or float in [0, 1].

    Returns:
        [H, W] or [H, W, 3], the type of `pixels`.
    """
    if pixels.ndim == 2:
        return pixels
    red, green, blue = np.moveaxis(pixels, 2, 0)
    spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    tolerance = _GREY_TOLERANCE * (255 if pixels.dtype == np.uint8 else 1)
    # Green carries most of the luminance, and is exact where all three are equal.
    return np.ascontiguousarray(green) if float(spread.max()) <= tolerance + 1e-6 else pixels


def orient(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored pixels upright by the EXIF/TIFF orientation tag.

    Args:
        array: [H, W] or [H, W, C].
        orientation: Tag 274: 1 to 8; anything else counts as 1 (stored upright).

    Returns:
        [H, W(, C)] or [W, H(, C)], upright.
    """
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array
