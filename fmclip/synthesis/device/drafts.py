"""What the CPU draws for one anomaly before a device paints it: its place and its noise, in the CPU path's order."""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np

from fmclip.synthesis.anomaly import Anomaly
from fmclip.synthesis.density import coarse_noise
from fmclip.synthesis.masks import Frame, coarse_perlin, perlin_period
from fmclip.synthesis.structural import patch_matrix

_NOTHING = np.zeros((4, 4), np.float32)


@dataclass(frozen=True, eq=False)
class Noise:
    """Smooth noise before it is enlarged.

    Attributes:
        coarse: Float32 [g, g'].
        factor: How many pixels each place becomes.
        deviation: What the enlarged noise is to be divided by.
    """

    coarse: np.ndarray = field(default_factory=lambda: _NOTHING)
    factor: float = 1.0
    deviation: float = 1.0


@dataclass(frozen=True, eq=False)
class Draft:
    """One anomaly, ready to be painted.

    Attributes:
        anomaly: Its parameters.
        frame: Where its box lies.
        foreground: Bool [S, S].
        outline: Noise of a Perlin mask.
        fields: Two noises of the texture, of the sway of a guided warp, or of an intensity change.
        tint: Noise of the intensity change of moved tissue.
        speckle: Float32 [h, w] of a speckled lesion.
        matrix: Float64 [2, 3], where the pixels of the box read the donor of a patch.
        inward: Towards the middle of the organ, row and column, at most one pixel long; for a guided warp.
    """

    anomaly: Anomaly
    frame: Frame
    foreground: np.ndarray
    outline: Noise
    fields: tuple[Noise, Noise]
    tint: Noise
    speckle: np.ndarray
    matrix: np.ndarray
    inward: tuple[float, float]

    @classmethod
    def of(cls, anomaly: Anomaly, foreground: np.ndarray, donor: np.ndarray | None) -> Draft:
        """Draw the noise of an anomaly.

        Args:
            anomaly: Its parameters.
            foreground: Bool [S, S] of the scan.
            donor: Bool [S, S], where the donor of a patch shows tissue; None where no patch is put in.
        """
        rng = np.random.default_rng(anomaly.seed)
        frame = Frame.of(anomaly.mask, foreground, anomaly.reach)
        (height, width), radius, density = frame.size, frame.radius, anomaly.density
        outline, first, second, tint, speckle = Noise(), Noise(), Noise(), Noise(), _NOTHING
        if anomaly.mask.shape == "perlin":
            outline = Noise(*coarse_perlin(height, width, perlin_period(anomaly.mask, radius), rng))
        if anomaly.kind == "guided_warp":
            first, second = (Noise(*coarse_noise(height, width, 0.8 * radius, rng)) for _ in range(2))
        if density is not None and anomaly.kind == "texture" and density.texture == "speckle":
            speckle = rng.standard_normal((height, width), dtype=np.float32)
        elif density is not None:
            grains = Noise(*coarse_noise(height, width, density.grain_size * radius, rng))
            if anomaly.warp is not None:
                tint = grains
            else:
                first = grains
            if anomaly.kind == "texture" and density.texture == "mottled":
                second = Noise(*coarse_noise(height, width, 0.4 * density.grain_size * radius, rng))
        matrix = np.zeros((2, 3))
        if anomaly.patch is not None and donor is not None:
            start = frame.box[1].start - frame.centre[1], frame.box[0].start - frame.centre[0]
            matrix = patch_matrix(anomaly.patch, radius, start, donor)
        inward = _inward(foreground, frame) if anomaly.kind == "guided_warp" else (0.0, 0.0)
        return cls(anomaly, frame, foreground, outline, (first, second), tint, speckle, matrix, inward)


def _inward(foreground: np.ndarray, frame: Frame) -> tuple[float, float]:
    organ = cv2.moments(foreground.astype(np.uint8), binaryImage=True)
    row, column = (
        organ[name] / organ["m00"] - centre for name, centre in zip(("m01", "m10"), frame.centre, strict=True)
    )
    length = max(float(np.hypot(row, column)), 1.0)
    return row / length, column / length
