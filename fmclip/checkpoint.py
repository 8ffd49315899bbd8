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
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fmclip import __version__
from fmclip.calibration import Calibration
from fmclip.detectors.base import Detector, DetectorConfig
from fmclip.errors import CheckpointError, FmclipError, NotFittedError, TowerError
from fmclip.memory import MAX_REGIONS
from fmclip.scans import name_window, parse_window
from fmclip.towers import Tower, get_tower
from fmclip.views import tower_views

FORMAT = "fmclip-adapter"
FORMAT_VERSION = 8
"""2: the patch memory holds the context view, see `fmclip.views`; 3: and looks inside a stage, see `fmclip.towers`;
4: scores are made otherwise, so that thresholds of before do not fit, see `fmclip.detectors.evidence`; 5: distances
lean on all references, whose patches lie scan by scan, see `fmclip.search`; a level looks ahead, see `towers.ahead`;
6: levels of a smaller copy of the picture, which nothing reads any more (benchmarks/NOTES.md); 7: MadCLIP's score
leaves letterbox bars out, maps of the cosine baseline have the spread of its scores; 8: FusionMedCLIP's score is its
memory's alone, and files say whether abnormal scans were learned from or a training went on."""
MAX_HEADER_BYTES = 2**20
MAX_FILE_BYTES = 2**30
MAX_METADATA_CHARS = 16_384
"""Of one entry; the longest that is written holds the scores of 64 references, in less than 2000."""
MAX_TEXT_CHARS = 1000
"""Of a text in a config, such as the scan type; prompts take less than 80 words."""
MAX_PARTS = 64
"""Of a setting that is a list."""
LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "context_tokens": (1, 64),
    "batch_size": (1, 1024),
    "stage2_epochs": (0, 10_000),
    "stage3_epochs": (0, 10_000),
    "lora_rank": (1, 128),
    "lora_alpha": (0, 1024),
    "lora_dropout": (0, 0.99),
    "lora_depth": (1e-3, 1),
    "block_bottleneck": (1, 1024),
    "block_dropout": (0, 0.99),
    "score_top": (0, 1),
    "temperature": (1e-4, 100),
    "pool_size": (1, 10_000),
    "hidden": (1, 10_000),
    "bottleneck": (1, 10_000),
    "lr": (0, 1),
    "weight_decay": (0, 10),
    "learned_share": (0, 1),
    "learned_slope": (0, 100),
    "shrinkage": (0, 1),
    "smoothing": (0, 16),
    "map_smoothing": (0, 16),
    "coreset": (1e-3, 1),
    "copies": (0, 32),
    "neighbours": (1, 64),
    "reweighting": (0, 64),
}
"""Smallest and largest value of a config field that is taken from a file: what is sensible, with room, and too small to
fill the memory. Rates ("..._lr") lie in 0 to 1, all other numbers in 0 to 10000."""

_RATES, _NUMBERS = (0.0, 1.0), (0.0, 10_000.0)
_DTYPES = ("F32", "F16", "BF16", "I32", "I64", "BOOL")

_DAMAGED = "The adapter file is damaged or incomplete. Download or save it again."
_FOREIGN = "This is not an adapter file. Choose a .safetensors file that fmclip saved after adapting."


def save_adapter(
    path: str | os.PathLike[str],
    detector: Detector,
    calibration: Calibration,
    *,
    window: str | None = None,
    name: str = "",
) -> None:
    """Write what was learned into one file; an older file of that name stays whole until the new one is complete.

    Args:
        path: Where to; the folder must exist.
        detector: A fitted detector.
        calibration: Its calibration.
        window: Name of the window that the references were read with.
        name: What the person calls it.

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
    if name:
        metadata["name"] = plain_name(name)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in detector.state().items()}
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
        CheckpointError: The file is damaged, no adapter, of another version, made for another tower, or holds
            settings or tensors of sizes that no adapter has. Settings and the sizes of a patch memory are looked at
            before a tensor is loaded.
        TowerError: The tower that it names cannot be loaded.
    """
    header = _read_header(Path(path))
    metadata = header.metadata
    detector_class, config, calibration = _parse(metadata)
    if tower is None:
        tower = get_tower(metadata["tower"], device=device)
    if tower.identity != metadata["tower_identity"]:
        raise CheckpointError(
            f"This adapter was made for another tower ({_shown(metadata['tower'])}) than the one in use "
            f"({_shown(tower.name)}), or for other weights of it. Choose that tower, or adapt again."
        )
    _check_memory(header.shapes, tower, config, len(calibration.reference_scores))
    tensors = _read_tensors(Path(path))
    try:
        detector = detector_class(tower, config)
        detector.reference_scores_ = calibration.reference_scores  # first: their number says how the state is laid out
        detector.load_state(tensors)
    except FmclipError as error:
        raise CheckpointError(f"The adapter does not fit its own description. {_DAMAGED}") from error
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise CheckpointError(_DAMAGED) from error
    return detector, calibration


def read_window(path: str | os.PathLike[str]) -> str | None:
    """Read which window the references of an adapter were read with; None if its file does not say.

    Raises:
        CheckpointError: The file is damaged, no adapter, or of another version.
    """
    window = _read_header(Path(path)).metadata.get("window")
    if window is None:
        return None
    try:
        return name_window(parse_window(window))
    except (FmclipError, AttributeError) as error:
        raise CheckpointError(_DAMAGED) from error


def describe_adapter(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Tell what an adapter file says about itself: name, method, scan type, tower, window, references, threshold.

    Raises:
        CheckpointError: The file is damaged, no adapter, or of another version.
    """
    metadata = _read_header(Path(path)).metadata
    _, config, calibration = _parse(metadata)
    return {
        "name": plain_name(metadata.get("name", "")),
        "method": metadata["method"],
        "scan_type": config.scan_type,
        "tower": _shown(metadata["tower"]),
        "window": read_window(path),
        "references": len(calibration.reference_scores),
        "threshold": calibration.threshold,
        "format": metadata["format_version"],
        "fmclip": _shown(metadata.get("fmclip_version")),
    }


def plain_name(name: str) -> str:
    """Keep of a name what may stand in a file name and on a page: letters, digits, blanks, dashes; at most 40."""
    kept = "".join(char if char.isascii() and (char.isalnum() or char in " -_") else " " for char in str(name))
    return " ".join(kept.split())[:40].strip()


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


class _Header(NamedTuple):
    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]  # of each tensor


def _read_header(path: Path) -> _Header:
    """Return what an adapter file says about itself, all sizes checked before anything is read."""
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
    if any(len(str(value)) > MAX_METADATA_CHARS for value in metadata.values()):
        raise CheckpointError(f"The adapter file describes itself at a length that no adapter needs. {_DAMAGED}")
    return _Header(metadata, {name: _shape(entry) for name, entry in header.items() if name != "__metadata__"})


def _shape(entry: Any) -> tuple[int, ...]:
    """Return the shape of a tensor from its entry in the header; safetensors itself checks it against the data."""
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(_DAMAGED) from error
    if dtype not in _DTYPES or not all(isinstance(side, int) and side >= 0 for side in shape):
        raise CheckpointError(_DAMAGED)
    return shape


def _check_memory(shapes: Mapping[str, tuple[int, ...]], tower: Tower, config: DetectorConfig, references: int) -> None:
    """Refuse a patch memory that is not of this tower: each view's width, and no more patches than the scans have."""
    if not any(name.startswith("memory.") for name in shapes):
        return
    tower = tower.for_patches()
    try:
        views = tower_views(tower, getattr(config, "levels", ()))
        rows, columns = min(tower.grids[view.level] for view in views)
    except (TowerError, TypeError, IndexError) as error:  # also what is no index at all
        raise CheckpointError(f"The adapter looks at levels that its tower does not have. {_DAMAGED}") from error
    pictures = references * (1 + getattr(config, "copies", 0))
    patches = shapes.get("memory.owner", ())
    fits = len(patches) == 1 and references <= patches[0] <= (pictures + MAX_REGIONS) * rows * columns
    fits = fits and shapes.get("memory.place") == patches
    fits = fits and shapes.get("memory.scale") == shapes.get("memory.level") == (len(views),)
    for index, view in enumerate(views):
        width = tower.widths[view.level]
        fits = fits and shapes.get(f"memory.bank.{index}") == (*patches, width)
        fits = fits and shapes.get(f"memory.whitening.{index}") == (width, width)
    if not fits:
        raise CheckpointError(f"The adapter's patch memory does not fit this tower and {references} scans. {_DAMAGED}")


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
        config = parse_config(detector_class.config_class, _strict_json(metadata["config"]))
        calibration = Calibration.from_dict(_strict_json(metadata["calibration"]))
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise CheckpointError(_DAMAGED) from error
    return detector_class, config, calibration


def _strict_json(text: str) -> Any:
    """Parse JSON without the NaN and Infinity that Python's parser would let through."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    return json.loads(text, parse_constant=refuse)


def parse_config(config_class: type[DetectorConfig], values: dict[str, Any]) -> DetectorConfig:
    """Build a config from JSON; each value must be of the kind that the default has, and within its limits.

    Raises:
        CheckpointError: A value is out of its range.
        TypeError: A field is unknown or of another kind.
    """
    config = config_class.from_dict(values)
    kinds = get_type_hints(config_class)
    for key, default in config_class().to_dict().items():
        value = getattr(config, key)
        choices = get_args(kinds[key]) if get_origin(kinds[key]) is Literal else ()
        if not _is_kind_of(value, default) or (choices and value not in choices):
            raise TypeError(f"config field {key} is of another kind")
    if wrong := out_of_range(config):
        raise CheckpointError(f"The adapter's setting {wrong}. {_DAMAGED}")
    return config


def out_of_range(config: DetectorConfig) -> str:
    """Say which setting of a config no adapter file may hold, and what it may be; "" if there is none."""
    for name, value in config.to_dict().items():
        low, high = LIMITS.get(name, _RATES if name.endswith("_lr") else _NUMBERS)
        parts = value if isinstance(value, (list, tuple)) else (value,)
        numbers = [part for part in parts if isinstance(part, (int, float))]
        if not all(low <= number <= high for number in numbers):  # also False for NaN
            return f"{name} must lie between {low:g} and {high:g}"
        if any(len(part) > MAX_TEXT_CHARS for part in parts if isinstance(part, str)):
            return f"{name} must have at most {MAX_TEXT_CHARS} characters"
        if len(parts) > MAX_PARTS:
            return f"{name} must have at most {MAX_PARTS} parts"
    return ""


def _is_kind_of(value: Any, default: Any) -> bool:
    """Whether a value from JSON may stand for a default: an integer for a float, but no bool for a number."""
    if default is None:
        return value is None or isinstance(value, (str, int, float))
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(value, tuple):
        return isinstance(default, tuple) and all(isinstance(part, (str, int, float)) for part in value)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:  # KeyError: a dtype that torch does not know
        raise CheckpointError(_DAMAGED) from error
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point()):
        raise CheckpointError(f"The adapter holds numbers that are not finite. {_DAMAGED}")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _shown(text: object) -> str:
    """Shorten foreign text to what may be shown: one line, and no folder of a weights file."""
    return "".join(char for char in str(text).rsplit("/", 1)[-1][:60] if char.isprintable())
