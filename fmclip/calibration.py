"""From the scores of the reference scans to a yes/no threshold, a rank in words, and warnings about the set itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np

from fmclip.errors import ReferenceSetError
from fmclip.prediction_interval import (
    SpreadPrior,
    counted_scores,
    exceedance,
    find_outliers,
    is_weighed,
    prediction_bound,
)
from fmclip.scans import Scan

MIN_REFERENCES = 2
MAX_REFERENCES = 64
RECOMMENDED_REFERENCES = (4, 32)

FALSE_ALARM_RATE = 0.10  # share of new normal scans that may lie above the threshold
RULE = "prediction bound 90 %"
WEIGHING_RULE = f"{RULE}, wrong references weighed"
DEVIATES = "deviates"
WITHIN = "within the references"

NEAR_DUPLICATE = 0.99
"""Correlation of thumbnails laid over each other: copies that were saved again, mirrored, brightened or shifted by up
to 4 of 256 pixels reach 0.994 and more; 1177 pairs of other people's brain MRI slices stay below 0.97."""
_THUMBNAIL = 64
_MARGIN = 5  # pixels of a thumbnail's rim that are not compared: a shift brings others in
_LIKELY = 0.5  # correlation from which it is worth looking for a shift
CLOSER = 4.0  # a copy is this much closer to 1 than most pairs are: scans of a phantom are all alike, and none a copy


@dataclass(frozen=True)
class Calibration:
    """What the scores of the reference scans say about the score of another scan.

    Attributes:
        reference_scores: Leave-one-out score of each reference scan, in [0, 1].
        threshold: Scores above it deviate.
        rule: How the threshold was made.
        prior: What was known about such scores; None for nothing.
    """

    reference_scores: tuple[float, ...]
    threshold: float
    rule: str = RULE
    prior: SpreadPrior | None = None

    @classmethod
    def from_scores(cls, scores: Iterable[float], prior: SpreadPrior | None = None) -> Calibration:
        """Set the threshold where a new normal scan stays below in nine of ten cases.

        The bound is the one-sided prediction interval for one more value of the same kind,
        mean + t(k - 1) * sd * sqrt(1 + 1/k) of the log-odds: with few references it keeps a larger distance, as it
        should. With a prior, sd and the degrees of freedom are those of the posterior, so that a handful of scans that
        happen to lie apart, or together, does not move it far. One wrong reference scan must not lift the threshold
        over everything: scores that `find_outliers` names are left out, or, with a prior that knows of wrong
        references, the highest count as far as they are likely to be sound (`fmclip.prediction_interval`); both from
        four scores on.

        Args:
            scores: Leave-one-out scores of the k >= 2 reference scans.
            prior: What is known about such scores (`Detector.spread_prior`).

        Returns:
            The calibration.

        Raises:
            ReferenceSetError: There are fewer than two scores, or one is not a number.
        """
        values = tuple(float(score) for score in scores)
        if not all(map(math.isfinite, values)):
            raise ReferenceSetError("The training diverged: the scores are no numbers. Choose smaller learning rates.")
        if len(values) < MIN_REFERENCES:
            raise ReferenceSetError("A threshold needs the scores of at least two reference scans; add normal scans.")
        threshold = prediction_bound(counted_scores(values, prior), FALSE_ALARM_RATE, prior)
        return cls(values, threshold, WEIGHING_RULE if is_weighed(prior, len(values)) else RULE, prior)

    def rank(self, score: float) -> int:
        """Count the reference scans with a lower score."""
        return sum(reference < score for reference in self.reference_scores)

    def describe_rank(self, score: float) -> str:
        """Word the rank; counts instead of percentages, which for a handful of scans would promise too much."""
        count, rank = len(self.reference_scores), self.rank(score)
        if rank == count:
            return f"higher than all {count} reference scans"
        if score < min(self.reference_scores):
            return f"lower than all {count} reference scans"
        return f"higher than {rank} of {count} reference scans"

    def p_values(self, scores: Sequence[float]) -> np.ndarray:
        """Share of new normal scans expected to score as high: n scores -> [n]; at the threshold `FALSE_ALARM_RATE`."""
        return exceedance(counted_scores(self.reference_scores, self.prior), scores, self.prior)

    def is_abnormal(self, score: float) -> bool:
        """Whether a score lies above the threshold."""
        return score > self.threshold

    def verdict(self, score: float) -> str:
        """Word the yes/no answer: "deviates" or "within the references"."""
        return DEVIATES if self.is_abnormal(score) else WITHIN

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return {
            "reference_scores": list(self.reference_scores),
            "threshold": self.threshold,
            "rule": self.rule,
            "prior": None if self.prior is None else asdict(self.prior),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """Take back what `to_dict` returned.

        Raises:
            ValueError: Something is missing or is not what it should be.
        """
        try:
            scores = tuple(float(score) for score in values["reference_scores"])
            threshold, rule = float(values["threshold"]), str(values["rule"])
            known = values.get("prior")  # files of earlier versions have none
            prior = None if known is None else _read_prior(known)
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError("the calibration is not complete") from error
        if not MIN_REFERENCES <= len(scores) <= MAX_REFERENCES:
            raise ValueError(f"the calibration has {len(scores)} reference scores")
        if not all(0 <= value <= 1 for value in (*scores, threshold)):  # also False for NaN
            raise ValueError("the calibration holds scores outside 0 to 1")
        if prior is not None and not prior.is_sound:
            raise ValueError("the calibration holds a prior that is none")
        return cls(scores, threshold, rule, prior)


@dataclass(frozen=True)
class ReferenceWarning:
    """Something about the reference set that a person should look at before trusting the maps.

    Attributes:
        kind: "duplicate", "near-duplicate", "size", "colour", "brightness", "contrast", "constant", "outlier", "mixed"
            or "text".
        message: The sentence for the person.
        scans: Places (from 0) of the scans meant.
    """

    kind: str
    message: str
    scans: tuple[int, ...]


def distinct(scans: Sequence[Scan]) -> list[Scan]:
    """Leave out copies of an earlier scan, also those that are only almost the same picture.

    A copy finds itself among the references: its score would be far below any that a new normal scan can reach, and
    the threshold, made from such scores, wrong in one direction or the other.
    """
    left_out = {copy for _, copy in _find_copies(scans)}
    return [scan for place, scan in enumerate(scans) if place not in left_out]


def require_references(scans: Sequence[Scan]) -> None:
    """Refuse a set that nothing can be learned from.

    Raises:
        ReferenceSetError: There are too few or too many scans, one is a single flat value, or all are copies of one.
    """
    low, high = RECOMMENDED_REFERENCES
    if len(scans) < MIN_REFERENCES:
        given = "No normal scan was" if not scans else "Only one normal scan was"
        raise ReferenceSetError(f"{given} given: at least {MIN_REFERENCES} are needed, {low} to {high} are better.")
    if len(scans) > MAX_REFERENCES:
        raise ReferenceSetError(
            f"{len(scans)} normal scans were given, more than the {MAX_REFERENCES} that are learned from. "
            f"Choose {low} to {high} typical ones."
        )
    constant = [scan.label for scan in scans if _is_constant(scan)]
    if constant:
        raise ReferenceSetError(f"{enumerate_labels(constant)}: the image is one flat value. Remove or replace it.")
    if len(distinct(scans)) < MIN_REFERENCES:
        raise ReferenceSetError(f"All {len(scans)} normal scans are (almost) the same picture. Give different ones.")


def check_references(scans: Sequence[Scan], calibration: Calibration | None = None) -> list[ReferenceWarning]:
    """Look for what goes wrong most often with reference sets: copies, mixed scan types, outliers.

    Args:
        scans: The k reference scans.
        calibration: Of the `distinct` ones, once there is one.

    Returns:
        Warnings, the plainest first; empty when nothing stands out.
    """
    warnings = [
        ReferenceWarning("constant", f"{scan.label}: the image is one flat value. Remove it.", (place,))
        for place, scan in enumerate(scans)
        if _is_constant(scan)
    ]
    warnings += _check_copies(scans)
    warnings += _check_shapes(scans)
    warnings += _check_colours(scans)
    warnings += _check_intensities(scans)
    places = [next(i for i, scan in enumerate(scans) if scan is one) for one in distinct(scans)]
    outliers = find_outliers(calibration.reference_scores, calibration.prior) if calibration is not None else ()
    for place in [places[i] for i in sorted(outliers)]:
        message = f"{scans[place].label} looks unlike the other {len(scans) - 1}: keep it?"
        warnings.append(ReferenceWarning("outlier", message, (place,)))
    return warnings


def _read_prior(known: Any) -> SpreadPrior:
    """Take back a prior; those of earlier versions know of no unsound references."""
    scans, spread = float(known["scans"]), float(known["spread"])
    return SpreadPrior(
        scans, spread, **{name: float(known[name]) for name in ("contamination", "shift") if name in known}
    )


def _check_copies(scans: Sequence[Scan]) -> list[ReferenceWarning]:
    """Name what `distinct` leaves out, with the scan that it repeats."""
    warnings = []
    for kept, copy in _find_copies(scans):
        pair = f"{scans[kept].label} and {scans[copy].label}"
        if scans[kept].digest == scans[copy].digest:
            message = f"{pair} are the same picture: the second adds nothing and is left out."
            warnings.append(ReferenceWarning("duplicate", message, (kept, copy)))
        else:
            message = (
                f"{pair} are almost the same picture: the second is left out, since two of a kind would make the "
                "references look more alike than they are."
            )
            warnings.append(ReferenceWarning("near-duplicate", message, (kept, copy)))
    if len(scans) > 1 and _usual_closeness(_closeness(_thumbnails(scans))) > NEAR_DUPLICATE:
        message = (
            f"Most of the {len(scans)} references are almost the same picture: a scan may deviate only because it is "
            "not that picture. Are they scans of different people?"
        )
        warnings.append(ReferenceWarning("near-duplicate", message, tuple(range(len(scans)))))
    return warnings


def _find_copies(scans: Sequence[Scan]) -> list[tuple[int, int]]:
    """Find scans that repeat an earlier one, which itself repeats none: (place of the earlier one, place of the copy).

    Copies have the same pixels, or the same picture saved again, mirrored, brightened or shifted a little.
    """
    if len(scans) < 2:
        return []
    thumbnails = _thumbnails(scans)  # [k, 64, 64]
    closeness = _closeness(thumbnails)  # [k, k]
    bound = max(NEAR_DUPLICATE, 1 - (1 - _usual_closeness(closeness)) / CLOSER)
    kept: list[int] = []
    copies = []
    for place, scan in enumerate(scans):
        for earlier in kept:
            same = scan.digest == scans[earlier].digest
            alike = closeness[earlier, place] > _LIKELY and 0.95 < aspect(scans[earlier]) / aspect(scan) < 1.05
            pairs = lay_over(thumbnails[earlier], thumbnails[place])
            if same or (alike and any(correlation(*pair) > bound for pair in pairs)):
                copies.append((earlier, place))
                break
        else:
            kept.append(place)
    return copies


def _thumbnails(scans: Sequence[Scan]) -> np.ndarray:
    return np.stack([thumbnail(scan) for scan in scans])  # [k, 64, 64]


def _closeness(thumbnails: np.ndarray) -> np.ndarray:
    """Correlations [k, k] of thumbnails [k, 64, 64] as they lie, or with one of the two mirrored."""
    flat = thumbnails.reshape(len(thumbnails), -1)
    mirrored = thumbnails[:, :, ::-1].reshape(len(thumbnails), -1)
    return np.maximum(flat @ flat.T, flat @ mirrored.T)


def _usual_closeness(closeness: np.ndarray) -> float:
    """Median over the pairs of closeness [k, k]."""
    return float(np.median(closeness[np.triu_indices(len(closeness), 1)]))


def lay_over(one: np.ndarray, other: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the insides [54, 54] of two thumbnails [64, 64], the other one as it is or mirrored, and shifted to fit."""
    window = cv2.createHanningWindow(one.shape[::-1], cv2.CV_32F)
    inside = slice(_MARGIN, -_MARGIN)
    for candidate in (other, np.ascontiguousarray(other[:, ::-1])):
        shift, _ = cv2.phaseCorrelate(one.copy(), candidate.copy(), window)  # which writes into what it is given
        for dx, dy in ((0.0, 0.0), shift):
            if max(abs(dx), abs(dy)) < _MARGIN:
                there = np.array([[1, 0, dx], [0, 1, dy]], np.float32)
                moved = cv2.warpAffine(candidate, there, one.shape[::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
                yield one[inside, inside], moved[inside, inside]


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation of two pictures of one shape; 0 if one of them is flat."""
    one, other = one - one.mean(), other - other.mean()
    return float((one * other).sum() / max(np.linalg.norm(one) * np.linalg.norm(other), 1e-9))


def _check_shapes(scans: Sequence[Scan]) -> list[ReferenceWarning]:
    """Name scans whose proportions or size are far from those of most."""
    aspects = np.log([aspect(scan) for scan in scans])
    sizes = np.log([math.sqrt(scan.height * scan.width) for scan in scans])
    odd = (abs(aspects - np.median(aspects)) > math.log(1.6)) | (abs(sizes - np.median(sizes)) > math.log(3))
    return [
        ReferenceWarning(
            "size",
            f"{scans[place].label} ({scans[place].width} x {scans[place].height} pixels) has another shape or size "
            "than most: is it the same kind of scan?",
            (place,),
        )
        for place in np.flatnonzero(odd).tolist()
    ]


def _check_colours(scans: Sequence[Scan]) -> list[ReferenceWarning]:
    """Name the minority where grey and coloured scans are mixed."""
    coloured = np.array([_is_coloured(scan) for scan in scans], dtype=bool)
    if coloured.all() or not coloured.any():
        return []
    is_minority_coloured = coloured.sum() * 2 <= len(scans)
    places = np.flatnonzero(coloured == is_minority_coloured).tolist()
    names = enumerate_labels([scans[place].label for place in places])
    this, other = ("coloured", "grey") if is_minority_coloured else ("grey", "coloured")
    verb = "is" if len(places) == 1 else "are"
    message = f"{names} {verb} {this}, the others {other}: are they the same kind of scan?"
    return [ReferenceWarning("colour", message, tuple(places))]


def _check_intensities(scans: Sequence[Scan]) -> list[ReferenceWarning]:
    """Name scans that are much brighter, darker, flatter or harsher than the others."""
    if len(scans) < 4:
        return []
    warnings = []
    brightness = [float(scan.pixels.mean()) for scan in scans]
    contrast = [float(scan.pixels.std()) for scan in scans]
    for kind, high, low, values, visible in (  # smaller differences than `visible` are seen by nobody
        ("brightness", "brighter", "darker", brightness, 0.02),
        ("contrast", "richer in contrast", "poorer in contrast", contrast, 0.01),
    ):
        distance = np.array(values) - np.median(values)
        spread = max(1.4826 * float(np.median(abs(distance))), visible)
        for place in np.flatnonzero(abs(distance) > 5 * spread).tolist():
            word = high if distance[place] > 0 else low
            message = f"{scans[place].label} is much {word} than the others: is it the same kind of scan?"
            warnings.append(ReferenceWarning(kind, message, (place,)))
    return warnings


def _grey(scan: Scan) -> np.ndarray:
    return scan.pixels if scan.pixels.ndim == 2 else scan.pixels.mean(axis=2)


def thumbnail(scan: Scan) -> np.ndarray:
    """Return [64, 64] with mean 0 and norm 1, so that a product of two is their correlation; 0 for a flat scan."""
    small = cv2.resize(_grey(scan), (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), 1.0)  # a shift by part of a pixel should cost no correlation
    small = small - small.mean()
    return small / max(float(np.linalg.norm(small)), 1e-6)


def aspect(scan: Scan) -> float:
    """Width over height."""
    return scan.width / scan.height


def _is_constant(scan: Scan) -> bool:
    return bool(scan.pixels.min() == scan.pixels.max())


def _is_coloured(scan: Scan) -> bool:
    """Whether the channels differ visibly; grey pictures are often saved with three equal channels."""
    if scan.pixels.ndim == 2:
        return False
    return float((scan.pixels.max(axis=2) - scan.pixels.min(axis=2)).mean()) > 0.02


def enumerate_labels(labels: Sequence[str]) -> str:
    """Word a list of labels: "scan 1, scan 2 and scan 5"."""
    return " and ".join(filter(None, (", ".join(labels[:-1]), *labels[-1:])))
