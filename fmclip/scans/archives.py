"""Zip archives of an upload: unpacked into numbered files, or refused as a whole. No name of a member is ever kept."""

import gzip
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath

from fmclip.scans.scan import MAX_SCANS, Unreadable

ZIP_MAGIC = b"PK\x03\x04"
MAX_UNPACKED_BYTES = 2**30
"""Of all members together: what they declare is checked first, what they unpack to is counted while it is read."""
MAX_RATIO = 1000
"""Bytes that a member may unpack to for each byte in the archive; an uncompressed black DICOM stays below 1032."""
_RATIO_FREE_BYTES = 2**26  # smaller members may have any ratio: they do no harm
_CHUNK = 2**20
_PREAMBLE_BYTES = 128  # of a DICOM file, free for anything
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_AGAIN = "Pack the scans anew as a plain zip file, or upload them without an archive."


def is_zip(path: Path) -> bool:
    """Whether a file begins as a zip archive does, and as nothing else that is read.

    A picture or a DICOM file with an archive behind or inside it is read as what it begins as, and never unpacked.
    """
    with path.open("rb") as file:
        head = file.read(_PREAMBLE_BYTES + 4)
    return head.startswith(ZIP_MAGIC) and head[_PREAMBLE_BYTES:] != b"DICM"


def unpack(path: Path, folder: Path) -> list[Path]:
    """Unpack an archive into files named by number, in the order of the members' names.

    Folders are left out, and so are hidden files and those that macOS adds. What the members are is told later by their
    content: an archive within the archive is refused there like any other file that is no scan.

    Args:
        path: The archive.
        folder: An empty folder that is there.

    Returns:
        The files.

    Raises:
        Unreadable: It is damaged, encrypted, leads out of the folder, holds links, too many members or too many bytes,
            or is packed by a method other than deflate.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _check(archive)
            room = MAX_UNPACKED_BYTES
            files = []
            for number, member in enumerate(members):
                file = folder / f"{number:04d}"
                room -= _copy(archive, member, file, room)
                files.append(file)
            return files
    except Unreadable:
        raise
    except Exception as error:  # zipfile raises anything for damaged files, with the members' names in the text
        raise Unreadable(f"is a zip archive that is damaged. {_AGAIN}") from error


def _check(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Refuse an archive by what its directory declares; give the members to be read."""
    everything = archive.infolist()
    if len(everything) > 4 * MAX_SCANS:
        raise Unreadable(
            f"is a zip archive with {len(everything)} members, more than are read. Upload fewer at a time."
        )
    members = []
    for member in everything:
        _check_place(member)
        if member.flag_bits & 0x1:
            raise Unreadable(f"is an encrypted zip archive. {_AGAIN}")
        if member.is_dir() or _is_hidden(member):
            continue
        if member.compress_type not in _METHODS:
            raise Unreadable(f"is a zip archive packed by a method that is not read. {_AGAIN}")
        if member.file_size > max(_RATIO_FREE_BYTES, MAX_RATIO * member.compress_size):
            raise Unreadable(f"is a zip archive that unpacks to far more than it holds. {_AGAIN}")
        members.append(member)
    if len(members) > MAX_SCANS:
        raise Unreadable(f"is a zip archive of {len(members)} files: at most {MAX_SCANS} are read. Upload fewer.")
    if not members:
        raise Unreadable("is a zip archive without a file in it.")
    if sum(member.file_size for member in members) > MAX_UNPACKED_BYTES:
        raise Unreadable(
            f"is a zip archive that unpacks to more than {MAX_UNPACKED_BYTES // 2**20} MiB. Upload fewer scans."
        )
    return sorted(members, key=lambda member: member.filename)


def _check_place(member: zipfile.ZipInfo) -> None:
    """Refuse names that lead out of the folder, and links; nothing is written under these names anyway."""
    name = member.filename
    leads_out = ".." in PurePosixPath(name.replace("\\", "/")).parts or name.startswith(("/", "\\"))
    if leads_out or PureWindowsPath(name).drive or "\0" in name:
        raise Unreadable(f"is a zip archive whose members lead out of their folder: it was not unpacked. {_AGAIN}")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise Unreadable(f"is a zip archive with links in it: it was not unpacked. {_AGAIN}")


def _is_hidden(member: zipfile.ZipInfo) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(member.filename).parts)


def _copy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: Path, room: int) -> int:
    """Unpack one member, whatever it declares never more than `room` bytes; returns how many."""
    count = 0
    with archive.open(member) as source, file.open("wb") as target:
        while chunk := source.read(_CHUNK):
            count += len(chunk)
            if count > room:
                raise Unreadable(f"is a zip archive that unpacks to far more than it declares. {_AGAIN}")
            target.write(chunk)
    return count


def gunzip(path: Path, target: Path, limit: int) -> bool:
    """Unzip a file of which several slices are to be read, so that it is done once.

    Args:
        path: The file, zipped by gzip or not.
        target: Where to.
        limit: Bytes that are written at most.

    Returns:
        Whether the target now holds all of it; if not, the reader says what is wrong with the file.
    """
    count = 0
    try:
        with gzip.open(path) as source, target.open("wb") as unzipped:
            while chunk := source.read(_CHUNK):
                count += len(chunk)
                if count > limit:
                    return False
                unzipped.write(chunk)
    except (OSError, EOFError, zlib.error):
        return False
    return True
