"""Why a spot of a scan looks odd: the reference patches it was compared with, and the maps that the answer is made of.

Beside that, where the tower itself looks, and what speaks for "abnormal" where it can read.

Features of the one scan are computed again for each question (one run of the tower), so that nothing large is
kept between a query and the question why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fmclip.calibration import distinct
from fmclip.detectors import Detector
from fmclip.detectors.base import to_pixels
from fmclip.detectors.evidence import to_unit
from fmclip.detectors.manual_prompts import embed_manual_prompts
from fmclip.errors import FmclipError, TowerError
from fmclip.maps import resize_map, smooth_inside
from fmclip.memory import ReferenceMemory
from fmclip.patch_grid import patch_content, patch_weight
from fmclip.scans import Letterbox, Scan
from fmclip.towers import Tower
from fmclip.towers.saliency import attention_rollout, grad_cam
from fmclip.views import midline, weigh, weigh_places

COUNT = 3
"""Reference patches named for each view."""

Box: TypeAlias = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels; right and bottom are the first column and row outside."""


@runtime_checkable
class HasPatchMemory(Protocol):
    """A detector whose answer rests on the nearest patches of the references."""

    memory_: ReferenceMemory

    def patch_features(self, pixels: Tensor) -> list[Tensor]:
        """What the memory compares: pixels [B, 3, S, S] in [0, 1] -> one [B, C_j, H_j, W_j] for each level."""


@dataclass(frozen=True)
class Match:
    """The patch of one reference scan that is nearest to the spot, as one view sees it.

    Attributes:
        reference: Place of the reference scan among those that were learned from, from 0; copies are not counted. After
            them come the regions that were marked as normal.
        label: What the person calls it ("scan 3"); "reference 3" where the pictures are not at hand, as for an adapter
            from a file; "normal region 1" for a region.
        scan: The reference scan; None where it is not at hand.
        box: Where the patch lies on the pixels of the reference scan; None where it is not at hand.
        distance: In units of the reference level: 1 is as far as the oddest patch of a normal scan, on average.
    """

    reference: int
    label: str
    scan: Scan | None
    box: Box | None
    distance: float


@dataclass(frozen=True, eq=False)
class ViewExplanation:
    """What one view of the patch memory says.

    Attributes:
        name: In words: "stride 16, direction".
        layer: Level of the tower ("stride 16", "block 4").
        kind: "direction", "context" or "mirror", see `fmclip.views`.
        share: Share of the view in what the memory says of this place, in [0, 1], half by the score and half by the
            map; 0 for the mirror view at the midline, where a place is its own mirror image.
        distance: To the references (`memory.ReferenceMemory.compare`), in units of the reference level.
        matches: Nearest patch of each of the nearest references, nearest first; none where the share is 0.
        map: [H, W] float32 in [0, 1] on the source pixels: this view's distance at each place, 0.5 at distance 1.
    """

    name: str
    layer: str
    kind: str
    share: float
    distance: float
    matches: tuple[Match, ...]
    map: np.ndarray


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why a spot is as odd as it is.

    Attributes:
        scan: The scan that was asked about.
        x: Column of the spot on its pixels.
        y: Row of the spot.
        box: The patch that the spot lies in, on the scan's pixels.
        distance: Of the patch to the references, the views together by their shares, in units of the reference level,
            before the map is smoothed.
        views: Each view of the memory.
        parts: Maps [H, W] in [0, 1] on the source pixels that the answer was made of, by name: "patch memory",
            "learned" where something was trained, "abnormal scans" where such taught it.
        map: [H, W] in [0, 1], the answer itself.
    """

    scan: Scan
    x: float
    y: float
    box: Box
    distance: float
    views: tuple[ViewExplanation, ...]
    parts: dict[str, np.ndarray]
    map: np.ndarray


@torch.no_grad()
def explain(
    detector: Detector,
    scan: Scan,
    x: float,
    y: float,
    *,
    references: Sequence[Scan] = (),
    regions: Sequence[Scan] = (),
    count: int = COUNT,
) -> Explanation:
    """Find what a spot of a scan was compared with.

    Args:
        detector: A fitted detector with a patch memory (patch_memory, fusionmedclip, guided_memory).
        scan: Any scan; it need not have been mapped before.
        x: Column of the spot on the scan's pixels, 0 up to its width.
        y: Row of the spot.
        references: The scans that were learned from, copies included; () where they are not at hand. Matches then name
            a number and no place.
        regions: Scans of the regions that were marked as normal; () where they are not at hand.
        count: Matches for each view, each from another reference scan.

    Returns:
        The explanation; a spot beside the scan's patches counts as the nearest patch.

    Raises:
        NotFittedError: The detector has learned nothing yet.
        FmclipError: The detector compares no patches, or the spot lies outside the scan.
    """
    if not (0 <= x <= scan.width and 0 <= y <= scan.height):
        raise FmclipError(f"The spot lies outside {scan.label}, which has {scan.width} x {scan.height} pixels.")
    (prediction,) = detector.predict([scan])
    if not isinstance(detector, HasPatchMemory):
        raise FmclipError(
            f"The method {detector.name} compares no patches with those of the reference scans: adapt with "
            "fusionmedclip, patch_memory or guided_memory to see them."
        )
    memory, learned_from = detector.memory_, distinct(references)
    if len(learned_from) != memory.references:
        learned_from = []  # these are not the scans it was learned from: better no pictures than wrong ones
    regions = regions if len(regions) == memory.regions else ()
    pixels, content, (box,) = to_pixels([scan], detector.tower)
    features = detector.patch_features(pixels)
    distances, _ = memory.compare(features)  # [1, V, h, w]
    grid = cast("tuple[int, int]", tuple(distances.shape[-2:]))
    row, column = _inside(box.cell_at(x, y, grid), patch_content(content, grid)[0])
    nearest, places = memory.nearest_by_reference(features, row, column)  # [V, k + R] both
    name_of, size = partial(_name, references=learned_from, regions=regions, count=memory.references), box.size
    relative = memory.relative(distances)  # [1, V, h, w]
    weight = patch_weight(content, grid)  # [1, h, w]
    shares = _shares(memory, grid, column)
    views = []
    for index, view in enumerate(memory.views):
        layer = detector.tower.layers[view.level]
        order = nearest[index].argsort()[: count if shares[index] else 0].tolist()
        views.append(
            ViewExplanation(
                name=f"{layer}, {view.kind}",
                layer=layer,
                kind=view.kind,
                share=shares[index],
                distance=float(relative[0, index, row, column]),
                matches=tuple(
                    _match(owner, *name_of(owner), float(nearest[index, owner]), int(places[index, owner]), grid, size)
                    for owner in order
                ),
                map=_on_scan(smooth_inside(relative[:, index], weight, detector.config.map_smoothing), box),
            )
        )
    return Explanation(
        scan=scan,
        x=x,
        y=y,
        box=box.cell_box(row, column, grid),
        distance=float(sum(one(relative, memory.views)[0, row, column] for one in (weigh, weigh_places)) / 2),
        views=tuple(views),
        parts=prediction.parts,
        map=prediction.map,
    )


def attention_map(detector: Detector, scan: Scan) -> np.ndarray:
    """Where the image tower looks (`towers.saliency.attention_rollout`), on the source pixels.

    Args:
        detector: Its tower is asked, with what stage 3 has changed in it.
        scan: Any scan.

    Returns:
        [H, W] float32 in [0, 1], 1 at the place that is looked at most.

    Raises:
        TowerError: The tower is a CNN, or its attention is of a kind that is not known.
    """
    return _looked_at(scan, attention_rollout, getattr(detector, "adapted_", detector.tower))


def words_map(detector: Detector, scan: Scan) -> np.ndarray:
    """Which places speak for "abnormal" and against "normal", as the tower reads these words: Grad-CAM.

    Args:
        detector: Its tower is asked, about hand-written prompts for its scan type (`detectors.manual_prompts`).
        scan: Any scan.

    Returns:
        [H, W] float32 in [0, 1] on the source pixels, 1 at the strongest place; all 0 where nothing speaks for it.

    Raises:
        TowerError: The tower's halves were never trained together: it has no score of a picture and words.
    """
    if not detector.tower.paired:
        raise TowerError(
            f"The two halves of the tower {detector.tower.name} were never trained together, so that it cannot tell "
            "how well a scan goes with words. Choose a CLIP (ViT-L-14:openai) to see Grad-CAM."
        )
    normal, abnormal = embed_manual_prompts(detector.tower, detector.config.scan_type)
    return _looked_at(scan, partial(grad_cam, direction=abnormal - normal), detector.tower)


def _looked_at(scan: Scan, look: Callable[[Tower, Tensor], Tensor], tower: Tower) -> np.ndarray:
    """Ask a tower for a map [1, h, w] and bring it to the source pixels, its highest place to 1."""
    pixels, _, (box,) = to_pixels([scan], tower)
    square = resize_map(look(tower, pixels), (box.size, box.size))[0]
    found = box.restore(square.float().cpu().numpy())
    return found / max(float(found.max()), 1e-12)


def _shares(memory: ReferenceMemory, grid: tuple[int, int], column: int) -> list[float]:
    """Shares of the views at one column of the grid: half by what they say of the score, half by what of the map."""
    is_midline = bool(midline(*grid)[column])
    asked = [0.0 if is_midline and view.kind == "mirror" else 1.0 for view in memory.views]
    weights = [one * view.weight for one, view in zip(asked, memory.views, strict=True)]
    places = [one * view.map_weight for one, view in zip(asked, memory.views, strict=True)]
    return [0.5 * (weight / sum(weights) + place / sum(places)) for weight, place in zip(weights, places, strict=True)]


def _name(owner: int, references: Sequence[Scan], regions: Sequence[Scan], count: int) -> tuple[str, Scan | None]:
    """What a person calls the owner of a patch, and its picture where it is at hand; `count` references were seen."""
    if owner < count:
        scan = references[owner] if references else None
        return (scan.label if scan else f"reference {owner + 1}"), scan
    return f"normal region {owner - count + 1}", regions[owner - count] if regions else None


def _match(
    owner: int, label: str, scan: Scan | None, distance: float, place: int, grid: tuple[int, int], size: int
) -> Match:
    if scan is None:
        return Match(owner, label, None, None, distance)
    box = Letterbox.of((scan.height, scan.width), size).cell_box(*divmod(place, grid[1]), grid)
    return Match(owner, label, scan, box, distance)


def _inside(cell: tuple[int, int], inside: Tensor) -> tuple[int, int]:
    """The patch itself, or the nearest one that lies on the scan: inside [h, w] bool."""
    places = inside.nonzero()  # [N, 2]
    apart = (places - torch.tensor(cell, device=places.device)).square().sum(dim=1)
    row, column = places[int(apart.argmin())].tolist()
    return row, column


def _on_scan(evidence: Tensor, box: Letterbox) -> np.ndarray:
    """Evidence [1, h, w] -> [H, W] in [0, 1] on the source pixels."""
    return box.restore(resize_map(to_unit(evidence), (box.size, box.size))[0].cpu().numpy())
