"""Adapters on the Hugging Face Hub: one safetensors file and a card. The token is used once and kept nowhere."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fmclip.checkpoint import MAX_FILE_BYTES, describe_adapter
from fmclip.errors import FmclipError

FILE = "adapter.safetensors"
CARD = "README.md"
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")
_Result = TypeVar("_Result")


def push_adapter(path: Path, repository: str, token: str, *, private: bool = True, api: Any = None) -> str:
    """Upload an adapter with a card; the repository is made if it is not there.

    Args:
        path: A file from `save_adapter`.
        repository: "owner/name".
        token: Of the person, with the right to write; neither stored nor logged.
        private: Whether a new repository is private.
        api: Stands in for `huggingface_hub.HfApi`.

    Returns:
        Address of the repository.

    Raises:
        FmclipError: The name or token will not do, or the Hub refused.
        CheckpointError: The file is no adapter.
    """
    repository, token = _check_name(repository), _check_token(token)
    card = _card(describe_adapter(path), repository)
    hub = api if api is not None else _hub()

    def push() -> str:
        address = hub.create_repo(repository, token=token, private=private, exist_ok=True, repo_type="model")
        hub.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD, repo_id=repository, token=token)
        hub.upload_file(path_or_fileobj=path.read_bytes(), path_in_repo=FILE, repo_id=repository, token=token)
        return str(address)

    return _asking(push, "push the adapter: check the name of the repository, and that the token may write to it")


def pull_adapter(target: Path, repository: str, token: str = "", *, api: Any = None) -> None:
    """Download an adapter. What it holds is checked by `load_adapter`, as for any file of a stranger.

    Args:
        target: Where to.
        repository: "owner/name".
        token: For private repositories; neither stored nor logged.
        api: Stands in for `huggingface_hub.HfApi`.

    Raises:
        FmclipError: There is no such repository or file, it is too large, or the Hub cannot be reached.
    """
    repository = _check_name(repository)
    hub = api if api is not None else _hub()

    def pull() -> None:
        found = hub.get_paths_info(repository, [FILE], token=token.strip() or False)
        if not found:
            raise FmclipError(f"This repository holds no {FILE}: it was not pushed by fmclip.")
        if found[0].size > MAX_FILE_BYTES:
            raise FmclipError("The file in this repository is larger than any adapter. Nothing was downloaded.")
        with tempfile.TemporaryDirectory(prefix="fmclip-hub-") as folder:
            file = hub.hf_hub_download(repository, FILE, token=token.strip() or False, local_dir=folder)
            target.write_bytes(Path(file).read_bytes())

    _asking(pull, "pull the adapter: check the name of the repository; a private one needs a token")


def _hub() -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise FmclipError("This host keeps off the Hugging Face Hub (HF_HUB_OFFLINE is set): use Download and Load.")
    return HfApi(token=False)  # never the token of the machine's owner


def _check_name(repository: str) -> str:
    name = repository.strip()
    if not _REPOSITORY.fullmatch(name) or ".." in name:
        raise FmclipError("Name the repository as owner/name, such as my-group/brain-mri-t1.")
    return name


def _check_token(token: str) -> str:
    if not token.strip():
        raise FmclipError("Pushing needs a token with the right to write. It is used once and not stored.")
    return token.strip()


def _asking(task: Callable[[], _Result], what: str) -> _Result:
    """Run a task; the Hub's own errors may hold an address or a token and are not shown."""
    try:
        return task()
    except FmclipError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        answer = f" (it answered {status})" if isinstance(status, int) else ""
        raise FmclipError(f"The Hugging Face Hub could not {what}{answer}.") from None


def _card(facts: dict[str, Any], repository: str) -> str:
    """The repository's card: what the file is, what it was learned from, and what it is not."""
    window = f"\n- window of the references: {facts['window']}" if facts["window"] else ""
    title = facts["name"] or repository.split("/")[1]
    return f"""---
library_name: fmclip
tags: [anomaly-detection, medical-imaging, fmclip]
---

# {title}

An fmclip adapter: what was learned from {facts["references"]} **normal** reference scans, on the tower named below.

- method: {facts["method"]}
- scan type, as typed: {json.dumps(facts["scan_type"])}
- tower: {facts["tower"]}{window}
- threshold: {facts["threshold"]:.3f}; format {facts["format"]}, fmclip {facts["fmclip"]}

The file holds weights and features of patches; no picture, file name or tag of a scan.

**Research use only. Not a medical device.** Load it on the page of fmclip, or: `python -m fmclip predict {FILE} SCANS`.
"""
