"""What a file is, told by its first bytes; names and extensions are not looked at."""

from fmclip.scans.scan import Unreadable

HEAD_BYTES = 1024
READABLE = "PNG, JPEG, TIFF, BMP, WebP, DICOM or NIfTI"

_PICTURES = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"II+\x00": "TIFF",
    b"MM\x00+": "TIFF",
    b"BM": "BMP",
}
_REFUSED = {
    b"GIF8": "is a GIF",
    b"%PDF": "is a PDF document",
    b"PK\x03\x04": "is a zip archive (or an office document). Unpack it and upload the pictures",
    b"Rar!": "is a RAR archive. Unpack it and upload the pictures",
    b"7z\xbc\xaf": "is a 7-zip archive. Unpack it and upload the pictures",
    b"\x00\x00\x00\x0cjP": "is a JPEG 2000 picture",
    b"\xff\x4f\xff\x51": "is a JPEG 2000 picture",
    b"8BPS": "is a Photoshop document",
    b"\x89HDF": "is an HDF5 file",
    b"\x93NUMPY": "is a NumPy array",
}


def sniff(head: bytes) -> str:
    """Tell the kind of a file from its first `HEAD_BYTES` bytes.

    Args:
        head: The beginning of the file.

    Returns:
        "PNG", "JPEG", "TIFF", "BMP", "WebP", "DICOM" or "NIfTI" (also for gzip, which may hold a NIfTI volume).

    Raises:
        Unreadable: If it is empty or of no kind that is read.
    """
    if not head:
        raise Unreadable("is empty (0 bytes). Copy or export it again.")
    # DICOM first: its 128 free bytes may hold the beginning of another format, a TIFF say.
    if head[128:132] == b"DICM" or _is_bare_dicom(head):
        return "DICOM"
    for magic, kind in _PICTURES.items():
        if head.startswith(magic):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[:2] == b"\x1f\x8b" or head[344:348] in (b"n+1\x00", b"ni1\x00") or head[4:8] in (b"n+2\x00", b"ni2\x00"):
        return "NIfTI"
    raise Unreadable(_why_refused(head))


def _is_bare_dicom(head: bytes) -> bool:
    """Whether the file is a DICOM data set without preamble: it begins with an element of group 0008."""
    group, element = head[0:2], int.from_bytes(head[2:4], "little")
    return len(head) >= 8 and group == b"\x08\x00" and element <= 0x0070


def _why_refused(head: bytes) -> str:
    for magic, what in _REFUSED.items():
        if head.startswith(magic):
            advice = "" if "Unpack" in what else f". Save it as {READABLE}"
            return f"{what}{advice}."
    if head[4:12] in (b"ftypavif", b"ftypheic", b"ftypheix", b"ftypmif1"):
        return "is a HEIC or AVIF photo. Save it as PNG or JPEG."
    if not any(byte < 9 or 13 < byte < 27 for byte in head):  # no control characters
        what = "an SVG drawing" if b"<svg" in head.lower() else "a text file, whatever its ending"
        return f"is {what}. Upload the picture itself as {READABLE}."
    return f"is of no kind that is read. Save it as {READABLE}."
