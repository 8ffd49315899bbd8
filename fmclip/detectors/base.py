"""The protocol of all detectors: constructed with its config, `fit` on normal scans, `predict` maps.

A new method is one file with a frozen config, a class and one line in `DETECTORS` (fmclip/detectors/__init__.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fmclip.calibration import Calibration, distinct, require_references
from fmclip.detectors.events import OnEvent, ignore
from fmclip.errors import ExportError, NotFittedError, ReferenceSetError, TowerError
from fmclip.prediction_interval import SpreadPrior
from fmclip.scans import Letterbox, Scan, letterbox
from fmclip.towers import Tower

N_ABNORMALS = "n_abnormals"
"""Name of `Detector.n_abnormals_` in the state of a method that can learn from abnormal scans."""


def setting(default: Any, text: str, variants: Mapping[Any, str] | None = None) -> Any:
    """Config field with its help.

    Args:
        default: Its value.
        text: What it is.
        variants: Other values that anyone may choose, a visitor of a shared page too, and what each of them does: none
            may make training longer or take more memory.
    """
    return field(default=default, metadata={"help": text, "variants": variants or {}})


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a detector says about one scan.

    Attributes:
        map: [H, W] float32 in [0, 1] on the source pixels; higher is more unlike the references.
        score: Score of the whole scan in [0, 1], on the scale of the map.
        parts: Further maps [H, W] in [0, 1] on the source pixels that the map was made of, by name, for those who ask
            why ("patch memory", "learned", "abnormal scans").
    """

    map: np.ndarray
    score: float
    parts: dict[str, np.ndarray]


@dataclass(frozen=True)
class DetectorConfig:
    """What every detector can be told.

    Attributes:
        scan_type: What the scans show, as the person says it ("brain MRI"); goes into prompts and synthesis.
        seed: Start of all random draws.
    """

    scan_type: str = "medical scan"
    seed: int = 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DetectorConfig:
        """Build from a plain dictionary (JSON lists become tuples), ignoring nothing.

        Raises:
            TypeError: A field is unknown.
        """
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**plain)

    def plan(self, references: int) -> list[tuple[str, int]]:
        """Stages of a fit on so many references, each with its steps, for an estimate of time; none if it is quick."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Detector(ABC):
    """Learns from normal scans, maps where others deviate.

    Args:
        tower: Frozen tower; never changed.
        config: The method's own config; None takes the defaults.

    Raises:
        TowerError: The method cannot work on this tower, see `refusal`.

    Attributes:
        title: What the person reads in a menu.
        summary: What the method does and needs, in one line for the person.
        uses_abnormals: Whether `fit` learns from abnormal scans: it never does, it does where some are given, or it
            cannot learn without them.
        needs_alignment: Whether the method compares pictures with words as the tower embeds them, so that the tower's
            halves must have been trained together.
        needs_transformer: Whether the method puts tokens into the blocks of the image tower.
        compares_patches: Whether the method looks at the tower's levels for comparing patches (`Tower.for_patches`).
        spread_prior: What is known about its reference scores before any is seen; None for nothing.
        reference_scores_: Leave-one-out score of each reference scan, after `fit`; the calibration reads these.
        n_abnormals_: Abnormal scans that `fit` learned from; part of the state of a method that can.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[DetectorConfig]]
    title: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    uses_abnormals: ClassVar[Literal["never", "optional", "required"]] = "never"
    needs_alignment: ClassVar[bool] = False
    needs_transformer: ClassVar[bool] = False
    compares_patches: ClassVar[bool] = False
    spread_prior: ClassVar[SpreadPrior | None] = None

    n_abnormals_: int = 0

    def __init__(self, tower: Tower, config: DetectorConfig | None = None) -> None:
        reason = self.refusal(tower)
        if reason is not None:
            raise TowerError(reason)
        self.tower = tower.for_patches() if self.compares_patches else tower
        self.config: Any = config if config is not None else self.config_class()
        self.reference_scores_: tuple[float, ...] | None = None

    @classmethod
    def refusal(cls, tower: Tower) -> str | None:
        """Say why the method cannot work on a tower; None if it can."""
        if cls.needs_alignment and not tower.paired:
            return (
                f"{cls.name} compares scans with words, and the two halves of the tower {tower.name} were never "
                "trained together: their cosines mean nothing. Choose a CLIP (ViT-L-14:openai) or another method."
            )
        if cls.needs_transformer and not tower.block_widths:
            return (
                f"{cls.name} works with the tokens in the blocks of a vision transformer; the image tower of "
                f"{tower.name} has none. Choose a ViT, such as ViT-B-16:openai, or another method."
            )
        return None

    @abstractmethod
    def fit(
        self,
        normals: Sequence[Scan],
        abnormals: Sequence[Scan] | None = None,
        *,
        abnormal_masks: Sequence[np.ndarray | None] | None = None,
        on_event: OnEvent | None = None,
    ) -> Detector:
        """Learn from reference scans.

        Args:
            normals: k normal scans, at least 2.
            abnormals: Abnormal scans, for methods that can use them (`uses_abnormals`).
            abnormal_masks: For each abnormal scan bool [H, W] on its source pixels, or None where nobody has drawn it.
            on_event: Called with each event; raising `Stopped` ends the fit early and keeps the last good state.

        Returns:
            The detector itself.

        Raises:
            ReferenceSetError: The set cannot be learned from.
        """

    @abstractmethod
    def predict(self, scans: Sequence[Scan]) -> list[Prediction]:
        """Map scans, each on its own: no scan's answer depends on the others.

        Raises:
            NotFittedError: Neither `fit` nor `load_state` was called.
        """

    def map_squares(self, pixels: Tensor, content: Tensor) -> tuple[Tensor, Tensor]:
        """Map letterboxed squares with tensor operations alone, so that they can be recorded as a graph.

        Args:
            pixels: [B, 3, S, S] in [0, 1] on the tower's device, see `to_pixels`.
            content: [B, S, S] bool, False on letterbox bars.

        Returns:
            Maps [B, S, S] float32 and scores [B] float64, both in [0, 1]: those of `predict`, on the square.

        Raises:
            ExportError: The method has no such form.
        """
        raise ExportError(f"The method {self.name} cannot be written as a graph; choose another method.")

    @torch.no_grad()
    def predict_synthetic(self, pixels: Tensor, content: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
        """Map pictures that were synthesised on reference scans, each without its own reference.

        Here the references are not left out: methods that keep them apart, such as a patch memory, do that.

        Args:
            pixels: [B, 3, S, S] in [0, 1].
            content: [B, S, S] bool.
            sources: [B] index of the reference that each was made from.

        Returns:
            Maps [B, h, w] and scores [B], both in [0, 1].
        """
        found = self.predict([Scan(one) for one in pixels.permute(0, 2, 3, 1).cpu().numpy()])
        maps = torch.from_numpy(np.stack([one.map for one in found]))
        return maps, torch.tensor([one.score for one in found], dtype=torch.float64)

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return what was learned, as tensors on the CPU for the checkpoint (`reference_scores_` apart)."""

    @abstractmethod
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned; the tower must be the same.

        Raises:
            CheckpointError: A tensor is missing or has another shape.
        """

    @property
    def is_fitted(self) -> bool:
        """Whether `predict` can be called."""
        return self.reference_scores_ is not None

    def calibration(self) -> Calibration:
        """What its reference scores say about the score of another scan.

        Raises:
            NotFittedError: Neither `fit` nor `load_state` was called.
        """
        self._require_fit()
        return Calibration.from_scores(self.reference_scores_ or (), self.spread_prior)

    @staticmethod
    def _begin(normals: Sequence[Scan], on_event: OnEvent | None) -> tuple[list[Scan], OnEvent]:
        """Check the references and leave out copies; somebody who hears the events.

        Raises:
            ReferenceSetError: The set cannot be learned from.
        """
        require_references(normals)
        return distinct(normals), on_event or ignore

    def _require_abnormals(self, abnormals: Sequence[Scan] | None) -> None:
        """Refuse to learn without abnormal scans.

        Raises:
            ReferenceSetError: There are none.
        """
        if not abnormals:
            raise ReferenceSetError(
                f"{self.name} learns from abnormal scans too: give some beside the normal ones, or choose a method "
                "that needs none."
            )

    def _batches(self, scans: Sequence[Scan]) -> Iterator[tuple[Tensor, Tensor, list[Letterbox]]]:
        """Letterboxed scans, a few at a time, see `to_pixels`.

        Raises:
            NotFittedError: Neither `fit` nor `load_state` was called.
        """
        self._require_fit()
        for some in forward_passes(len(scans), self.tower.device):
            yield to_pixels(scans[some], self.tower)

    def _require_fit(self) -> None:
        if not self.is_fitted:
            raise NotFittedError("This detector has seen no reference scans yet: adapt it to normal scans first.")


def forward_passes(count: int, device: torch.device) -> Iterator[slice]:
    """Slices of so many scans that go through a tower together: 4 on a CPU, where more save no time, else 8."""
    size = 4 if device.type == "cpu" else 8
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def to_pixels(scans: Sequence[Scan], tower: Tower) -> tuple[Tensor, Tensor, list[Letterbox]]:
    """Letterbox scans to the size of the tower.

    Returns:
        pixels [B, 3, S, S] in [0, 1] and content [B, S, S] bool on the tower's device; the way back for each scan.
    """
    squares, boxes = zip(*(letterbox(scan, tower.image_size) for scan in scans), strict=True)
    pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()  # [B, 3, S, S]
    content = torch.from_numpy(np.stack([box.content_mask() for box in boxes]))  # [B, S, S]
    return pixels.to(tower.device), content.to(tower.device), list(boxes)


def batched_features(tower: Tower, pixels: Tensor, levels: int | None = None) -> list[Tensor]:
    """Features of many scans, a few at a time: [N, 3, S, S] -> one [N, C_j, H_j, W_j] for each of so many levels."""
    parts = [tower.features(pixels[some], levels) for some in forward_passes(len(pixels), tower.device)]
    return [torch.cat(level) for level in zip(*parts, strict=True)]
