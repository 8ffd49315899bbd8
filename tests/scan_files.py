"""Writers of small scan files for the tests of `fmclip.scans`."""

import struct
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
PATIENT = "Doe^Jane"


def gradient(height: int = 40, width: int = 60, top: int = 255, dtype: Any = np.uint8) -> np.ndarray:
    """Return [height, width]: 0 at the upper left to `top` at the lower right, every corner different."""
    rows, columns = np.mgrid[0:height, 0:width]
    values = (2 * rows / max(1, height - 1) + columns / max(1, width - 1)) / 3
    return (values * top).round().astype(dtype)


def write_dicom(path: Path, frames: np.ndarray, **elements: Any) -> Path:
    """Write [H, W], [F, H, W], [H, W, 3] or [F, H, W, 3] integers; `elements` set or (None) leave out elements."""
    colour = frames.ndim >= 3 and frames.shape[-1] == 3
    stack = frames.shape[0] if frames.ndim == (4 if colour else 3) else None
    rows, columns = frames.shape[-3:-1] if colour else frames.shape[-2:]
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.Modality = CT_STORAGE, generate_uid(), "CT"
    dataset.PatientName, dataset.PatientID = PATIENT, "4711"
    dataset.Rows, dataset.Columns = int(rows), int(columns)
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = frames.dtype.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(frames.dtype.kind == "i")
    if stack is not None:
        dataset.NumberOfFrames = stack
    raw = np.ascontiguousarray(frames).tobytes()
    dataset.PixelData = raw + b"\0" * (len(raw) % 2)
    for keyword, value in elements.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def dicom_sample(name: str) -> Path:
    """Return one of the files that come with pydicom."""
    path = get_testdata_file(name, download=False)
    assert path is not None, f"pydicom's {name} is missing"
    return Path(path)


def read_dicom_sample(name: str) -> Dataset:
    """Return the elements of one of the files that come with pydicom."""
    return pydicom.dcmread(dicom_sample(name))


def write_nifti(path: Path, volume: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Write a volume; by default its axes point right, anterior, superior."""
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4) if affine is None else affine), path)
    return path


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Return one chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path: Path, width: int, height: int, bit_depth: int, colour_type: int, rows: bytes) -> Path:
    """Write a PNG from its raw rows (each beginning with the filter byte), whatever size is declared."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(rows, 9)) + png_chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    return path


def tiff_header(width: int, height: int, bits: int = 8) -> bytes:
    """Return a TIFF file of nothing but a header that declares a grey picture of this size."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    tags += [(278, 4, height), (279, 4, width * height * bits // 8)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
