"""Any file -> `Scan` (pixels in [0, 1], no patient data), and the square a tower looks at, with the way back.

reader      one file or an upload -> Scan, ScanError
sniff       the kind of a file, by content
pictures    PNG, JPEG, BMP, WebP          tiff    TIFF of any depth
dicom       one frame, windowed           nifti   one slice, in canonical orientation
intensity   windows and robust ranges     letterbox   to the square and back
windows     their names                   source      where the pixels lie, for exports
resize      large scans made smaller
archives    zip archives -> numbered files     series      slices of volumes and DICOM series
shards      WebDataset shards, read in place
"""

from fmclip.scans.intensity import CT_WINDOWS
from fmclip.scans.letterbox import Letterbox, letterbox
from fmclip.scans.reader import find_scan_files, read_scan, read_scans
from fmclip.scans.resize import resize, shrink
from fmclip.scans.scan import (
    FLAT_NOTE,
    MAX_FILE_BYTES,
    MAX_PIXELS,
    MAX_SCANS,
    MAX_UPLOAD_VALUES,
    MAX_VOLUME_BYTES,
    Scan,
)
from fmclip.scans.source import DicomReference, Source
from fmclip.scans.windows import AS_STORED, name_window, parse_window

__all__ = [
    "AS_STORED",
    "CT_WINDOWS",
    "FLAT_NOTE",
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "MAX_SCANS",
    "MAX_UPLOAD_VALUES",
    "MAX_VOLUME_BYTES",
    "DicomReference",
    "Letterbox",
    "Scan",
    "Source",
    "find_scan_files",
    "letterbox",
    "name_window",
    "parse_window",
    "read_scan",
    "read_scans",
    "resize",
    "shrink",
]
