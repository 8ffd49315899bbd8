"""PNG, JPEG, BMP, WebP, and the TIFF files that Pillow reads well, into pixels in [0, 1]."""

import struct
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from fmclip.scans.intensity import collapse_grey, fill_missing, orient, stretch
from fmclip.scans.scan import Unreadable, check_size

_ORIENTATION = 274  # EXIF and TIFF tag
_PHOTOMETRIC = 262  # TIFF tag; 0: white is zero
_WIDE_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")


def read_picture(path: Path, kind: str) -> tuple[np.ndarray, list[str]]:
    """Read a picture through Pillow, which may use its decoder for `kind` only.

    8-bit values are divided by 255. 16-bit, 32-bit and float values are stretched between their 0.1 and 99.9
    percentiles (`robust_range`), because such files do not say which values are black and white. Transparency is laid
    on black; the EXIF orientation is applied; three equal channels become grey.

    Args:
        path: The file.
        kind: "PNG", "JPEG", "TIFF", "BMP" or "WebP".

    Returns:
        ([H, W] or [H, W, 3] float32 in [0, 1], notes).

    Raises:
        Unreadable: If it is too large.
        Exception: Whatever Pillow raises for a damaged file.
    """
    notes: list[str] = []
    # An open file, not its name: Pillow maps a named TIFF into memory with its sides swapped when it is to be turned.
    with path.open("rb") as file, Image.open(file, formats=[kind.upper()]) as image:
        check_size(image.height, image.width)
        if kind != "JPEG" and getattr(image, "n_frames", 1) > 1:
            notes.append("the file holds more than one picture; the first one is read")
        image.load()
        orientation = _orientation(image)
        if kind == "PNG" and _is_wide_colour_png(path):
            pixels = stretch_colour(_decode_wide_png(path), alpha=None)
        elif image.mode in _WIDE_MODES:
            values = np.asarray(image)
            pixels = stretch(fill_missing(values, notes))
            if kind == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0:  # type: ignore[attr-defined]
                pixels = 1.0 - pixels
        else:
            pixels = _eight_bit(image)
    return np.ascontiguousarray(orient(pixels, orientation)), notes


def stretch_colour(values: np.ndarray, alpha: int | None) -> np.ndarray:
    """Stretch 16-bit or float samples to [0, 1], all colours by one range, and lay transparency on black.

    Args:
        values: [H, W, S] samples: grey or RGB, then extra samples.
        alpha: Index of the sample that holds the opacity (integers only); None: the second of two, the fourth of four.

    Returns:
        [H, W] or [H, W, 3] float32 in [0, 1].
    """
    samples = values.shape[2]
    colours = 3 if samples >= 3 else 1
    alpha = colours if alpha is None and samples == colours + 1 else alpha
    pixels = stretch(values[:, :, :colours])  # [H, W, 1 or 3]
    if alpha is not None and np.issubdtype(values.dtype, np.integer):
        pixels = pixels * (values[:, :, alpha, None].clip(0) / np.float32(np.iinfo(values.dtype).max))
    return collapse_grey(pixels[:, :, 0] if colours == 1 else pixels)


def _eight_bit(image: Image.Image) -> np.ndarray:
    """Return [H, W] or [H, W, 3] float32 in [0, 1] of a loaded picture of at most 8 bits per sample."""
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        black.alpha_composite(image.convert("RGBA"))
        image = black.convert("RGB")
    elif image.mode in ("1", "L"):
        image = image.convert("L")
    else:
        image = image.convert("RGB")
    return np.divide(collapse_grey(np.asarray(image)), 255, dtype=np.float32)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged camera data beside sound pixels: the pixels are what counts
        return 1


def _is_wide_colour_png(path: Path) -> bool:
    """Whether a PNG has 16-bit colour or 16-bit grey with opacity, of which Pillow keeps 8 bits only."""
    with path.open("rb") as file:
        bit_depth, colour_type = struct.unpack("BB", file.read(26)[24:26])
    return bit_depth == 16 and colour_type in (2, 4, 6)


def _decode_wide_png(path: Path) -> np.ndarray:
    """Return uint16 [H, W, 3 or 4], RGB(A), of a PNG that Pillow has already found sound and small enough."""
    values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.ndim != 3 or values.dtype != np.uint16:
        raise Unreadable("could not be decoded as 16-bit PNG. Save it with 8 bits, or as TIFF.")
    return values[:, :, [2, 1, 0, 3][: values.shape[2]]]  # OpenCV gives BGR(A)
