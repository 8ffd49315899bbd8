"""What was learned <-> one safetensors file; the tower itself and the reference scans stay out of it.

The file holds the tensors of the detector (for a patch memory: patch features of the references, no pixels) and, as
metadata, format and version, method, config, calibration, and name and identity of the tower. Nothing in it is ever
unpickled, and no label, file name or pixel of a reference scan is stored.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fmclip import __version__
from fmclip.calibration import Calibration
from fmclip.detectors.base import Detector, DetectorConfig
from fmclip.errors import CheckpointError, FmclipError, NotFittedError
from fmclip.towers import Tower, get_tower

FORMAT = "fmclip-adapter"
FORMAT_VERSION = 1
MAX_HEADER_BYTES = 4 * 2**20
MAX_FILE_BYTES = 2**30

_DAMAGED = "The adapter file is damaged or incomplete. Download or save it again."
_FOREIGN = "This is not an adapter file. Choose a .safetensors file that fmclip saved after adapting."


def save_adapter(
    path: str | os.PathLike[str], detector: Detector, calibration: Calibration, *, window: str | None = None
) -> None:
    """Write what was learned into one file; an older file of that name stays whole until the new one is complete.

    Args:
        path: Where to; the folder must exist.
        detector: A fitted detector.
        calibration: Its calibration.
        window: Name of the window that the references were read with.

    Raises:
        NotFittedError: The detector has learned nothing yet.
        CheckpointError: The file cannot be written.
    """
    if not detector.is_fitted:
        raise NotFittedError("There is nothing to save yet: adapt to normal scans first.")
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "fmclip_version": __version__,
        "method": detector.name,
        "config": json.dumps(detector.config.to_dict()),
        "calibration": json.dumps(calibration.to_dict()),
        "tower": detector.tower.name,
        "tower_identity": detector.tower.identity,
    }
    if window is not None:
        metadata["window"] = window
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in detector.state().items()}
    try:
        _write_whole(Path(path), save(tensors, metadata))
    except OSError as error:
        raise CheckpointError(f"The adapter cannot be written: {error.strerror or 'the disk refused it'}.") from error


def load_adapter(
    path: str | os.PathLike[str], *, device: str | torch.device = "cpu", tower: Tower | None = None
) -> tuple[Detector, Calibration]:
    """Read an adapter and put it on its tower.

    Args:
        path: A file from `save_adapter`.
        device: Where the tower goes if it is loaded here.
        tower: The tower in use; None loads the one that the file names. Give one where files come from strangers, so
            that a file cannot choose what is loaded.

    Returns:
        The detector, ready to predict, and its calibration.

    Raises:
        CheckpointError: The file is damaged, no adapter, of another version, or made for another tower.
        TowerError: The tower that it names cannot be loaded.
    """
    metadata = _read_metadata(Path(path))
    detector_class, config, calibration = _parse(metadata)
    tensors = _read_tensors(Path(path))
    if tower is None:
        tower = get_tower(metadata["tower"], device=device)
    if tower.identity != metadata["tower_identity"]:
        raise CheckpointError(
            f"This adapter was made for another tower ({_shown(metadata['tower'])}) than the one in use "
            f"({_shown(tower.name)}), or for other weights of it. Choose that tower, or adapt again."
        )
    try:
        detector = detector_class(tower, config)
        detector.reference_scores_ = calibration.reference_scores  # first: their number says how the state is laid out
        detector.load_state(tensors)
    except FmclipError as error:
        raise CheckpointError(f"The adapter does not fit its own description. {_DAMAGED}") from error
    except (KeyError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise CheckpointError(_DAMAGED) from error
    return detector, calibration


def read_window(path: str | os.PathLike[str]) -> str | None:
    """Read which window the references of an adapter were read with; None if its file does not say.

    Raises:
        CheckpointError: The file is damaged, no adapter, or of another version.
    """
    window = _read_metadata(Path(path)).get("window")
    return window if isinstance(window, str) else None


def _write_whole(path: Path, data: bytes) -> None:
    """Write beside the target and move into place, so that a crash or a full disk leaves no half file."""
    descriptor, part = tempfile.mkstemp(prefix=".adapter-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(part).chmod(0o644)  # mkstemp leaves files that only their owner can read
        Path(part).replace(path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def _read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of an adapter file, all sizes checked before anything is read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= MAX_HEADER_BYTES:  # other files, pickles and archives among them, end here
                raise CheckpointError(_FOREIGN)
            if size > MAX_FILE_BYTES or 8 + length > size:
                raise CheckpointError(_DAMAGED)
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError("The adapter file was not found, or cannot be opened.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(_FOREIGN) from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CheckpointError(_FOREIGN)
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise CheckpointError(
            f"The adapter file has format version {_shown(metadata.get('format_version'))}; this program reads version "
            f"{FORMAT_VERSION}. Adapt again, or use the version of fmclip that saved it."
        )
    wanted = ("method", "config", "calibration", "tower", "tower_identity")
    if not all(isinstance(metadata.get(key), str) for key in wanted):
        raise CheckpointError(_DAMAGED)
    return metadata


def _parse(metadata: Mapping[str, str]) -> tuple[type[Detector], DetectorConfig, Calibration]:
    """Return method, config and calibration, each checked."""
    from fmclip.detectors import DETECTORS

    detector_class = DETECTORS.get(metadata["method"])
    if detector_class is None:
        raise CheckpointError(
            f"The adapter was made by a method that this program does not have ({_shown(metadata['method'])}). "
            f"It has {', '.join(DETECTORS)}."
        )
    try:
        config = _parse_config(detector_class.config_class, _strict_json(metadata["config"]))
        calibration = Calibration.from_dict(_strict_json(metadata["calibration"]))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(_DAMAGED) from error
    return detector_class, config, calibration


def _strict_json(text: str) -> Any:
    """Parse JSON without the NaN and Infinity that Python's parser would let through."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    return json.loads(text, parse_constant=refuse)


def _parse_config(config_class: type[DetectorConfig], values: dict[str, Any]) -> DetectorConfig:
    """Build a config from JSON; each value must be of the kind that the default has."""
    config = config_class.from_dict(values)
    for key, default in config_class().to_dict().items():
        value = getattr(config, key)
        allowed = (int, float) if isinstance(default, float) else type(default)
        if default is not None and value is not None and not isinstance(value, allowed):
            raise TypeError(f"config field {key} is of another kind")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:  # KeyError: a dtype that torch does not know
        raise CheckpointError(_DAMAGED) from error
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point()):
        raise CheckpointError(f"The adapter holds numbers that are not finite. {_DAMAGED}")
    return tensors


def _shown(text: object) -> str:
    """Shorten foreign text to what may be shown: one line, and no folder of a weights file."""
    return "".join(char for char in str(text).rsplit("/", 1)[-1][:60] if char.isprintable())
