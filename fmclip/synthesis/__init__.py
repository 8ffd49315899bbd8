"""Synthetic anomalies in normal scans; used in training only, never on a query scan.

FusionMedCLIP section 3.4. A sampler draws the parameters of an anomaly, `apply` turns them into a picture and a mask:

    foreground.py   where the tissue is
    masks.py        Perlin, ellipse and rectangle masks
    structural.py   CutPaste and Poisson blending
    density.py      intensity change and blurred texture, with halo and shadow
    deformation.py  radial warp and guided displacement
    anomaly.py      the record of one anomaly, and `apply`
    augmentation.py light variation of the normal scans themselves
    sampler.py      draws anomalies to suit the scan type
    pool.py         many training pairs at once, and their replay
    device/         the same on a GPU, for many anomalies at once
"""

from fmclip.synthesis.anomaly import KINDS, TASK_KINDS, TASKS, Anomaly, apply
from fmclip.synthesis.augmentation import Augmentation, View, apply_view
from fmclip.synthesis.foreground import estimate_foreground
from fmclip.synthesis.masks import MaskSpec
from fmclip.synthesis.pool import SyntheticScan, replay, synthesise_pool
from fmclip.synthesis.sampler import AnomalySampler, SynthesisConfig, scan_profile

__all__ = [
    "KINDS",
    "TASKS",
    "TASK_KINDS",
    "Anomaly",
    "AnomalySampler",
    "Augmentation",
    "MaskSpec",
    "SynthesisConfig",
    "SyntheticScan",
    "View",
    "apply",
    "apply_view",
    "estimate_foreground",
    "replay",
    "scan_profile",
    "synthesise_pool",
]
