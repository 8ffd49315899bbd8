"""What to learn from, and where: one fit as plain values, for the process that runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fmclip.pace import Plan
from fmclip.scans import Scan

if TYPE_CHECKING:
    import numpy as np

    from fmclip.detectors import DetectorConfig, Training
    from fmclip.regions import NormalRegion


@dataclass(frozen=True, eq=False)
class Job:
    """What to learn from, and where.

    Attributes:
        tower: Name of the tower.
        device: "cpu", "cuda", ...
        method: Name of the detector.
        preset: One of the method's, see `settings.presets_of`.
        scan_type: What the scans show.
        seed: Start of all random draws.
        normals: k normal scans.
        queries: Scans to be mapped at every good state; may grow while the fit goes on.
        window: Name of the window that the normals were read with, for the adapter to remember.
        regions: Parts of other scans that are normal too, for methods with a patch memory.
        abnormals: Abnormal scans, for methods that can use them.
        abnormal_masks: For each of them bool [H, W] on its source pixels, or None where nobody has drawn it.
        settings: Settings of the method that differ from the preset, by name.
        start: Where a former training of the same job stood, to go on from there; None begins anew.
        times: How many times as long as the preset the last stage is.
        is_on_loan: Whether the device is lent for a time: short of memory, the fit then ends with a `DeviceShortage`
            instead of spending that time on the processor.
    """

    tower: str
    device: str
    method: str
    preset: str
    scan_type: str
    seed: int
    normals: Sequence[Scan]
    queries: Sequence[Scan] = ()
    window: str | None = None
    regions: Sequence[NormalRegion] = ()
    abnormals: Sequence[Scan] = ()
    abnormal_masks: Sequence[np.ndarray | None] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    start: Training | None = None
    times: int = 1
    is_on_loan: bool = False

    def config(self) -> DetectorConfig:
        """The detector's config."""
        from fmclip.detectors import DETECTORS
        from fmclip.settings import config_of, settings_of

        unknown = [name for name in self.settings if name not in settings_of(DETECTORS[self.method].config_class)]
        if unknown:
            raise ValueError(f"{self.method} has no setting {', '.join(unknown)}")
        config: Any = config_of(self.method, self.preset, self.settings, scan_type=self.scan_type, seed=self.seed)
        return config.longer(self.times) if self.times > 1 else config

    @property
    def what(self) -> tuple[str, str, str]:
        """What is trained, as far as it decides how long a step takes, see `pace.Paces`."""
        return what_is_trained(self.tower, self.device, self.method, self.settings)

    def plan(self) -> Plan:
        """Stages to come; of a training that goes on, the rest, after the pool was made again."""
        plan = self.config().plan(len(self.normals))
        if self.start is None:
            return plan
        stages = [stage for stage, _ in plan]
        here = stages.index(self.start.stage)
        first = next(place for place, stage in enumerate(stages) if stage.startswith("stage"))
        rest = [(stage, steps - (self.start.step if stage == self.start.stage else 0)) for stage, steps in plan]
        return [*rest[:first], *rest[here:]]


def what_is_trained(tower: str, device: str, method: str, settings: Mapping[str, Any]) -> tuple[str, str, str]:
    """Name what decides how long a step takes: tower, device, method with its settings."""
    from fmclip.settings import in_words

    return tower, device, in_words(method, settings)


@dataclass(frozen=True, eq=False)
class Unfinished:
    """A training that can be gone on with: one that was stopped, or one that could be longer.

    Attributes:
        job: What it learns from.
        training: Where it stands.
        is_answering: Whether a state that was reached after `training` is in use.
    """

    job: Job
    training: Training
    is_answering: bool = False

    @property
    def normals(self) -> tuple[Scan, ...]:
        """The reference scans."""
        return tuple(self.job.normals)

    @property
    def is_over(self) -> bool:
        """Whether only a longer training could go on; a Stop after the last step may still have lost its result."""
        return self.training.is_over and self.is_answering

    def go_on(self, queries: Sequence[Scan], regions: Sequence[NormalRegion]) -> Job:
        """The job that goes on: to its end, or, if that was reached, for as long again."""
        times = self.job.times + 1 if self.is_over else self.job.times
        return replace(self.job, queries=queries, regions=regions, start=self.training, times=times)
