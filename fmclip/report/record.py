"""What was done, in one small JSON file: to do it again with the same scans, or why not; nothing that names them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fmclip.calibration import Calibration
from fmclip.checkpoint import parse_config
from fmclip.detectors import DETECTORS, Detector, DetectorConfig
from fmclip.errors import FmclipError
from fmclip.scans import AS_STORED, Scan, name_window, parse_window
from fmclip.settings import PRESETS, further_presets, in_words, settings_with_variants

FORMAT, FORMAT_VERSION = "fmclip-run", 1
MAX_CHARS = 2**20
"""Of a run.json; one with 500 scans takes a tenth of it."""
VERSIONS = ("python", "fmclip", "code", "torch", "timm", "open_clip_torch", "peft", "numpy")
OWN_SETTINGS, NOT_TRAINED = "own settings", "none: this method learns without"

MARKED = "regions were marked as normal by hand"
ABNORMALS = "abnormal scans were learned from, which run.json does not hold"
STOPPED = "the training was stopped before its end"
RESUMED = (
    "stage 3 of the training went on after a stop, its end or a shortage of memory, which one training does not repeat "
    "exactly"
)
UNDER_WAY = "the training was still under way"

_UNUSABLE = "This is no run.json of fmclip, or it is damaged. Export it again."


@dataclass(frozen=True)
class ScanRecord:
    """One scan, told by its content.

    Attributes:
        label: What the person called it ("scan 3").
        digest: SHA-256 of its pixels as they were looked at.
        slice_index: Slice or frame, from 0; None where the file holds one picture.
        score: Score of a query; None for a reference scan.
    """

    label: str
    digest: str
    slice_index: int | None = None
    score: float | None = None

    @classmethod
    def of(cls, scan: Scan, score: float | None = None) -> ScanRecord:
        """Describe a scan."""
        return cls(scan.label, scan.digest, scan.source.slice_index if scan.source else None, score)


@dataclass(frozen=True)
class RunRecord:
    """An adaptation and what it said.

    Attributes:
        method: Name of the detector.
        config: Its config, the seed and the scan type among it.
        tower: Name of the tower.
        tower_identity: SHA-256 over its architecture and weights.
        window: Name of the window that all scans were read with.
        calibration: Threshold and scores of the references.
        references: The scans that were learned from, in their order; none where only the adapter file is at hand.
        queries: The scans that were mapped.
        versions: Of the program and of the libraries whose numbers may differ.
        date: Day of the export, ISO.
        not_repeatable: Why the scans and settings alone do not give this adapter again, in words; "" if they do as far
            as is known (an adapter file does not say whether its training was stopped).
    """

    method: str
    config: DetectorConfig
    tower: str
    tower_identity: str
    window: str
    calibration: Calibration
    references: tuple[ScanRecord, ...]
    queries: tuple[ScanRecord, ...]
    versions: dict[str, str | None]
    date: str
    not_repeatable: str = ""

    @classmethod
    def of(
        cls,
        detector: Detector,
        calibration: Calibration,
        queries: Sequence[ScanRecord],
        *,
        references: Sequence[Scan] = (),
        window: str | None = None,
        not_repeatable: str = "",
    ) -> RunRecord:
        """Describe a fitted detector and what it found.

        Args:
            detector: The detector that answered.
            calibration: Its calibration.
            queries: What it was asked about, with the scores.
            references: The scans that it was fitted to; () where they are not at hand.
            window: Name of the window that the scans were read with.
            not_repeatable: What is known of the training beyond what the detector itself shows; see `RunRecord`.
        """
        from fmclip.evaluation.environment import environment

        here = environment()
        return cls(
            method=detector.name,
            config=detector.config,
            tower=detector.tower.name,
            tower_identity=detector.tower.identity,
            window=window or AS_STORED,
            calibration=calibration,
            references=tuple(ScanRecord.of(scan) for scan in references),
            queries=tuple(queries),
            versions={name: here[name] for name in VERSIONS},
            date=here["date"],
            not_repeatable=not_repeatable or _beyond_the_config(detector),
        )

    @property
    def preset(self) -> str:
        """Name of the preset whose settings these are ("full"), `OWN_SETTINGS` or `NOT_TRAINED`; with the variants."""
        return preset_of(self.config)

    def describe(self) -> list[tuple[str, str]]:
        """Word the settings for a person: (name, value) rows."""
        return [
            ("Scan type", self.config.scan_type),
            ("Method", self.method),
            ("Training", self.preset),
            *([("Cannot be done again", self.not_repeatable)] if self.not_repeatable else []),
            ("Seed", str(self.config.seed)),
            ("Reference scans", str(len(self.calibration.reference_scores))),
            ("Threshold rule", self.calibration.rule),
            ("Window", self.window),
            ("Tower", f"{self.tower} ({self.tower_identity[:12]})"),
            ("Program", f"fmclip {self.versions.get('fmclip')} ({self.versions.get('code')})"),
            (
                "Libraries",
                ", ".join(f"{name} {self.versions[name]}" for name in ("torch", "timm") if name in self.versions),
            ),
            ("Date", self.date),
        ]

    def to_json(self) -> str:
        """Write the record as JSON text."""
        values = {"format": FORMAT, "format_version": FORMAT_VERSION, **self.__dict__}
        values |= {"config": self.config.to_dict(), "calibration": self.calibration.to_dict()}
        values |= {name: [asdict(scan) for scan in values[name]] for name in ("references", "queries")}
        return json.dumps(values, indent=1)

    @classmethod
    def from_json(cls, text: str) -> RunRecord:
        """Take back what `to_json` wrote; every value is checked, since the file may come from anyone.

        Raises:
            FmclipError: It is no such text, of another version, or holds values that no run has.
        """
        try:
            values = _object(json.loads(text) if len(text) <= MAX_CHARS else None)
            if values.pop("format") != FORMAT or values.pop("format_version") != FORMAT_VERSION:
                raise ValueError("another format")
            config_class = DETECTORS[values["method"]].config_class
            values["config"] = parse_config(config_class, _object(values["config"]))
            values["calibration"] = Calibration.from_dict(_object(values["calibration"]))
            values["window"] = name_window(parse_window(values["window"]))
            for name in ("references", "queries"):
                values[name] = tuple(_scan_record(one) for one in values[name])
            values["versions"] = {name: str(_object(values["versions"])[name]) for name in VERSIONS}
            for name in ("tower", "tower_identity", "date"):
                values[name] = str(values[name])[:200]
            values["not_repeatable"] = str(values.get("not_repeatable", ""))[:200]
            return cls(**values)
        except (FmclipError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise FmclipError(_UNUSABLE) from error


def preset_of(config: DetectorConfig) -> str:
    """Name the preset that a config is, see `RunRecord.preset`."""
    config_class: Any = type(config)
    names = (*PRESETS, *further_presets(config_class))
    presets = {name: config_class.preset(name, scan_type=config.scan_type, seed=config.seed) for name in names}
    plain = config_class()
    varied = {name: getattr(config, name) for name in settings_with_variants(config_class)}
    changed = {name: value for name, value in varied.items() if value != getattr(plain, name)}
    if presets[PRESETS[0]] == presets[PRESETS[-1]]:
        return in_words(NOT_TRAINED, changed)
    alike = (name for name, preset in presets.items() if replace(preset, **varied) == config)
    return in_words(next(alike, OWN_SETTINGS), changed)


def _beyond_the_config(detector: Detector) -> str:
    """What a fitted detector shows of a fit that its config and references do not tell of; "" for nothing."""
    memory = getattr(detector, "memory_", None)
    if memory is not None and memory.regions:
        return MARKED
    if detector.n_abnormals_ > 0 or detector.uses_abnormals == "required":
        return ABNORMALS
    if getattr(detector, "is_resumed_", False):
        return RESUMED
    is_untrained = getattr(detector, "network_", detector) is None
    if is_untrained and any(
        stage.startswith("stage") for stage, _ in detector.config.plan(len(detector.reference_scores_ or ()))
    ):
        return STOPPED
    return ""


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("no JSON object")
    return value


def _scan_record(values: Mapping[str, Any]) -> ScanRecord:
    record = ScanRecord(**_object(values))
    is_index = record.slice_index is None or (type(record.slice_index) is int and 0 <= record.slice_index < 10**6)
    is_score = record.score is None or (type(record.score) in (int, float) and 0 <= record.score <= 1)
    if not (is_index and is_score and re.fullmatch(r"[0-9a-f]{64}", record.digest) and isinstance(record.label, str)):
        raise ValueError("no scan of a run")
    return record
