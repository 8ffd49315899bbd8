"""Files as scripts upload them and as agents name them: records of gradio's client, links to this page, data: URLs.

gradio's own list of files cannot be called by agents: the schema of the tool points to a definition that is not there,
and links in a list stay strings.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from gradio.data_classes import FileData
from gradio.processing_utils import save_base64_to_cache

from fmclip.errors import FmclipError
from fmclip.page import uploads

_MARK = "/gradio_api/file="


def find_files(given: Sequence[Any] | None, *, keep: bool = False) -> list[str]:
    """Find files in gradio's cache.

    Args:
        given: For each a record of gradio's client, a path or a link as gradio gives it after an upload or for a file
            of this page, or a data: URL. Nothing is fetched from other addresses.
        keep: Whether what a link names stays: a copy is given.

    Returns:
        Their paths.

    Raises:
        FmclipError: One of them is something else, or not there any more; the others are deleted if they may be.
    """
    found: list[str] = []
    refused: FmclipError | None = None
    with uploads.deleted_if_refused(found):
        for one in given or ():
            try:
                found.append(_find(one, keep))
            except FmclipError as error:
                refused = refused or error
        if refused is not None:
            raise refused
    return found


def offer_file(path: str | Path) -> dict[str, Any]:
    """What gradio makes a link of, and its client a file."""
    return FileData(path=str(path)).model_dump()


def _find(given: Any, keep: bool) -> str:
    text = str(given.get("path", "")) if isinstance(given, dict) else given
    if isinstance(text, str) and text.startswith("data:"):
        try:
            return save_base64_to_cache(text, uploads.get_upload_folder())
        except Exception as error:  # its text holds the data
            raise FmclipError("A data: URL could not be read: give the file in base64.") from error
    if not isinstance(text, str) or not text:
        raise FmclipError("A file is given as a link to this page or as a data: URL: upload it first.")
    is_link = text.startswith(("http://", "https://")) and _MARK in text
    path = _in_cache(Path(unquote(urlsplit(text).path.partition(_MARK)[2])) if is_link else Path(text))
    if not (is_link and keep):
        return str(path)
    copy = uploads.new_file(path.suffix)
    shutil.copyfile(path, copy)
    return str(copy)


def _in_cache(path: Path) -> Path:
    """The file itself, if it lies in gradio's cache.

    Raises:
        FmclipError: It does not, or is gone.
    """
    try:
        file, cache = path.resolve(), Path(uploads.get_upload_folder()).resolve()
        if cache in file.parents and file.is_file():
            return file
    except (OSError, ValueError):  # such as a name of absurd length; gradio would log it
        pass
    raise FmclipError("A file that was named is not on this page, or not any more: upload it, then give its link.")
