"""Where a scan shows tissue: synthetic anomalies belong there, not on air, glass, letterbox bars or burned-in text."""

import cv2
import numpy as np

MIN_BACKGROUND = 0.04  # share of the scan; less than this is a full-frame scan whose dark corners are tissue in shadow
MIN_FOREGROUND = 0.08  # share of the scan; less than this means that the estimate failed
MIN_COLOUR = 0.04  # mean spread of the channels, of the full range
BLACK = 5.0  # of 255: JPEG noise around true black
WORKING_SIZE = 112  # pixels a side: enough for an outline, a quarter of the time
_SQUARE = np.ones((3, 3), np.uint8)
_DISC = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))


def check_scan(image: np.ndarray, content: np.ndarray) -> None:
    """Raise ValueError unless `image` is float32 [S, S, 3] and `content` a bool [S, S] with at least one True."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.float32:
        raise ValueError(f"image must be float32 [S, S, 3], got {image.dtype} {list(image.shape)}")
    if content.shape != image.shape[:2] or content.dtype != np.bool_:
        raise ValueError(
            f"content must be bool {list(image.shape[:2])}, got {content.dtype} {list(content.shape)}: "
            "pass the content mask of the scan's own letterbox"
        )
    if not content.any():
        raise ValueError("content is False everywhere: the scan has no pixels to work on")


def is_grey(image: np.ndarray) -> bool:
    """True where the three channels of `image` [S, S, 3] are equal bit for bit."""
    return np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 0], image[..., 2])


def brightness(pixels: np.ndarray) -> np.ndarray:
    """Mean over the channels: [h, w, C] to [h, w]. Adding planes is many times faster than reducing the last axis."""
    if pixels.shape[2] == 1:
        return pixels[..., 0]
    return (pixels[..., 0] + pixels[..., 1] + pixels[..., 2]) * np.float32(1 / 3)


def is_coloured(image: np.ndarray) -> bool:
    """Whether `image` [S, S, 3] holds real colour: a grey scan that went through colour JPEG does not."""
    red, green, blue = (image[::4, ::4, channel] for channel in range(3))
    spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    return float(spread.mean()) > MIN_COLOUR


def estimate_foreground(image: np.ndarray, content: np.ndarray) -> np.ndarray:
    """Estimate the tissue of any kind of scan.

    Background is what is nearly black (air, the outside of a sector) or nearly white (a glass slide) *and* connected
    to the edge of the scan, so that dark tissue such as ventricles or lungs stays foreground. A scan without such a
    region is foreground all over, as is one for which the estimate would leave next to nothing.

    Args:
        image: float32 [S, S, 3] in [0, 1].
        content: bool [S, S], False on letterbox bars.

    Returns:
        Bool [S, S], True on tissue; a subset of `content`, never empty.

    Raises:
        ValueError: If a shape or dtype is wrong or `content` is empty.
    """
    check_scan(image, content)
    height, width = content.shape
    step = max(1, round(max(height, width) / WORKING_SIZE))
    small = image[::step, ::step]  # the limits are applied to blurred values, so plain sampling is good enough
    tissue = _tissue(small, np.ascontiguousarray(content[::step, ::step]))
    tissue = (
        cv2.resize(tissue.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST).astype(bool) & content
    )
    return tissue if tissue.any() else content.copy()


def _tissue(image: np.ndarray, content: np.ndarray) -> np.ndarray:
    """`estimate_foreground` at working size: float32 [s, s, 3] and bool [s, s] to bool [s, s]."""
    scan_area = int(np.count_nonzero(content))
    if scan_area == 0:
        return content
    red, green, blue = (image[..., channel] for channel in range(3))
    # darkest by the brightest channel: a fundus is black in blue (numpy's max over the last axis is 50 times slower)
    dark = (np.maximum(np.maximum(red, green), blue) * 255).astype(np.uint8)
    bright = 255 - (np.minimum(np.minimum(red, green), blue) * 255).astype(np.uint8)
    for darkness in (dark, bright):
        background = _edge_background(darkness, content)
        if np.count_nonzero(background & content) < MIN_BACKGROUND * scan_area:
            continue
        tissue = _main_parts(content & ~background)
        if np.count_nonzero(tissue) >= MIN_FOREGROUND * scan_area:
            return tissue
    return content.copy()


def _edge_background(darkness: np.ndarray, content: np.ndarray) -> np.ndarray:
    """Dark pixels of uint8 [S, S] that are joined to the edge of the scan; letterbox bars included. Bool [S, S].

    Noisy air can be as grey as an acoustic shadow. What tells them apart is that air surrounds the body, so the loose
    limit holds only for a background along half of the scan's edge; anything else must be black.
    """
    smooth = cv2.blur(darkness, (3, 3))
    values = darkness[content]
    split, _ = cv2.threshold(values, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    above = values > split
    if above.all() or not above.any():  # constant
        return ~content
    # on clean scans Otsu's split may lie anywhere between the two classes; the middle of their means does not
    middle = (float(values[above].mean()) + float(values[~above].mean())) / 2
    inner = cv2.erode(content.astype(np.uint8), _SQUARE, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    rim = content & (inner == 0)
    loose = _flood(smooth <= min(max(0.4 * middle, BLACK), 36.0), content)
    if np.count_nonzero(loose & rim) >= 0.5 * np.count_nonzero(rim):
        return loose
    return _flood(smooth <= BLACK, content)


def _flood(candidate: np.ndarray, content: np.ndarray) -> np.ndarray:
    """The part of bool `candidate` [S, S] that is joined to the letterbox bars or the frame. Bool [S, S]."""
    open_to_edge = (candidate | ~content).astype(np.uint8)
    # a gap in a dark skull or a dark skin line must not let the flood into the organ
    open_to_edge = cv2.erode(open_to_edge, _SQUARE, borderType=cv2.BORDER_CONSTANT, borderValue=1)
    framed = cv2.copyMakeBorder(open_to_edge, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=1)
    cv2.floodFill(framed, None, (0, 0), 2)
    flooded = (framed[1:-1, 1:-1] == 2).astype(np.uint8)
    return cv2.dilate(flooded, _SQUARE).astype(bool)


def _main_parts(tissue: np.ndarray) -> np.ndarray:
    """Keep the large parts of bool [S, S], without thin text and rulers, and fill the holes in them."""
    closed = cv2.morphologyEx(tissue.astype(np.uint8), cv2.MORPH_OPEN, _DISC)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(closed, connectivity=4)
    if count < 2:
        return np.zeros_like(tissue)
    area = stats[1:, cv2.CC_STAT_AREA]
    large = np.concatenate([[False], area >= 0.2 * area.max()])
    kept = large[labels].astype(np.uint8)
    framed = cv2.copyMakeBorder(kept, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    cv2.floodFill(framed, None, (0, 0), 2)
    return framed[1:-1, 1:-1] != 2
