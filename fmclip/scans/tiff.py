"""TIFF: 16-bit, 32-bit and float pages through tifffile, at full depth; all others through Pillow."""

import math
import zlib
from pathlib import Path

import numpy as np
import tifffile

from fmclip.scans.intensity import fill_missing, orient, stretch
from fmclip.scans.pictures import read_picture, stretch_colour
from fmclip.scans.scan import MAX_VOLUME_BYTES, Unreadable, check_size

_ORIENTATION = 274
_UNCOMPRESSED, _DEFLATE = (1,), (8, 32946)
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2


def read_tiff(path: Path) -> tuple[np.ndarray, list[str]]:
    """Read the first page of a TIFF file.

    Args:
        path: The file.

    Returns:
        ([H, W] or [H, W, 3] float32 in [0, 1], notes); scaled as `read_picture` says.

    Raises:
        Unreadable: If it is too large, cut short, or of a layout that is not read.
        Exception: Whatever the libraries raise for a damaged file.
    """
    with path.open("rb") as stream, tifffile.TiffFile(stream) as file:  # by itself it would resolve links of /proc
        page = file.pages.first
        check_size(page.imagelength, page.imagewidth, stack=max(1, page.imagedepth))
        if _is_wide(page):
            _check_segments(page, file.filehandle)
            notes = []
            if len(file.pages) > 1:
                notes.append("the file holds more than one picture; the first one is read")
            return _read_wide(page, notes), notes
        wide_colour = page.bitspersample > 8 and page.samplesperpixel > 1
    pixels, notes = read_picture(path, "TIFF")
    if wide_colour:
        notes.append("its 16-bit colours were read with 8 bits")
    return pixels, notes


def _is_wide(page: tifffile.TiffPage) -> bool:
    """Whether a page has more than 8 bits per sample, in a form that tifffile decodes without further plug-ins."""
    return (
        page.dtype is not None
        and page.dtype.kind in "uif"
        and page.dtype.itemsize > 1
        and page.compression in _UNCOMPRESSED + _DEFLATE
        and page.predictor in (1, 2)
        and page.photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB)
    )


def _check_segments(page: tifffile.TiffPage, file: tifffile.FileHandle) -> None:
    """Refuse strips and tiles that lie beyond the end of the file or unpack to more than they declare."""
    sample_bytes = np.dtype(page.dtype).itemsize
    check_size(page.imagelength, page.imagewidth, pixel_bytes=page.samplesperpixel * sample_bytes)
    segment_bytes = math.prod(page.chunks) * sample_bytes
    if segment_bytes > MAX_VOLUME_BYTES:  # tiles of any size can be declared around a small page
        raise Unreadable("is stored in tiles that are too large to be read. Save it without tiles.")
    segments = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    if len(segments) < math.prod(page.chunked) or any(offset + count > file.size for offset, count in segments):
        raise Unreadable("could not be decoded as TIFF: the file is cut short. Copy or export it again.")
    if page.compression in _DEFLATE:
        for offset, count in segments:
            file.seek(offset)
            unpacked = zlib.decompressobj().decompress(file.read(count), segment_bytes + 1)
            if len(unpacked) > segment_bytes:
                raise Unreadable("unpacks to far more than it declares and was not read. Export it again.")


def _read_wide(page: tifffile.TiffPage, notes: list[str]) -> np.ndarray:
    """Return [H, W] or [H, W, 3] float32 in [0, 1] of a page of more than 8 bits per sample."""
    values = page.asarray()
    if page.axes.startswith("S"):  # samples stored plane by plane
        values = np.moveaxis(values, 0, -1)  # [H, W, S]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] > 4):
        raise Unreadable("holds more than a grey or colour picture in one page. Save one channel or slice of it.")
    values = fill_missing(values, notes)
    if values.ndim == 2:
        pixels = stretch(values)
    else:
        # Extra samples of kind 1 and 2 are opacity; of kind 0 they may hold anything and are left out.
        colours = 3 if values.shape[2] >= 3 else 1
        has_alpha = len(page.extrasamples) > 0 and int(page.extrasamples[0]) in (1, 2)
        pixels = stretch_colour(values if has_alpha else values[:, :, :colours], alpha=colours if has_alpha else None)
    if page.photometric == _WHITE_IS_ZERO:
        pixels = 1.0 - pixels
    orientation = page.tags.get(_ORIENTATION)
    return np.ascontiguousarray(orient(pixels, int(orientation.value) if orientation else 1))
