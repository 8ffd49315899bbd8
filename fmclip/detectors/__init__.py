"""Detectors by name; a new method is one file beside this one and one line in `DETECTORS`."""

from fmclip.detectors.base import Detector, DetectorConfig, Prediction
from fmclip.detectors.conrad import ConRAD
from fmclip.detectors.cosine import Cosine
from fmclip.detectors.events import (
    Event,
    Notice,
    OnEvent,
    Ready,
    StageStarted,
    Step,
    SyntheticExample,
    SyntheticExamples,
    Training,
)
from fmclip.detectors.fusionmedclip import FusionMedCLIP, FusionMedCLIPConfig
from fmclip.detectors.guided_memory import GuidedMemory
from fmclip.detectors.madclip import MadCLIP
from fmclip.detectors.patch_memory import PatchMemory, PatchMemoryConfig
from fmclip.detectors.published import Published
from fmclip.detectors.two_layer import TwoLayer
from fmclip.detectors.zero_shot import ZeroShot

DETECTORS: dict[str, type[Detector]] = {
    FusionMedCLIP.name: FusionMedCLIP,
    PatchMemory.name: PatchMemory,
    GuidedMemory.name: GuidedMemory,
    Cosine.name: Cosine,
    ZeroShot.name: ZeroShot,
    TwoLayer.name: TwoLayer,
    MadCLIP.name: MadCLIP,
    ConRAD.name: ConRAD,
    Published.name: Published,
}
DEFAULT_DETECTOR = FusionMedCLIP.name

__all__ = [
    "DEFAULT_DETECTOR",
    "DETECTORS",
    "Detector",
    "DetectorConfig",
    "Event",
    "FusionMedCLIP",
    "FusionMedCLIPConfig",
    "Notice",
    "OnEvent",
    "PatchMemory",
    "PatchMemoryConfig",
    "Prediction",
    "Ready",
    "StageStarted",
    "Step",
    "SyntheticExample",
    "SyntheticExamples",
    "Training",
]
