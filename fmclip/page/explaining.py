"""Why a spot is odd, as HTML: the clickable scan, the reference patches beside the spot, and all maps side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING

import cv2
import numpy as np

from fmclip.page.pictures import THUMBNAIL_SIDE, data_address, map_thumbnail, patch_with_surroundings, slider_pair
from fmclip.scans import Scan, resize

if TYPE_CHECKING:
    from fmclip.explain import Explanation, Match, ViewExplanation
    from fmclip.session import Finding

KINDS = {
    "direction": "pattern",
    "context": "against the rest of the scan",
    "mirror": "left against right",
}
"""Views in words."""
ASK = "Click a spot on the scan: here you see the patches of the reference scans that it was compared with."
NOT_AT_HAND = "The adapter came from a file, which holds no pictures: the reference patches have numbers only."
MAP_NAMES = {"patch memory": "Patch memory", "learned": "Learned map", "abnormal scans": "Abnormal scans"}
MAP_HINTS = {
    "patch memory": "distance to the nearest patches of the references; its height says how odd, its shape where",
    "learned": "from prompts and adapters trained on synthetic anomalies",
    "abnormal scans": "what is more like the abnormal scans that were given than like the normal ones",
}


LOOKS = {
    "Attention": "where the tower looks, which need not be odd; contour at half of the highest",
    "Words": 'what speaks for "abnormal" as the tower reads the word; contour at half of the highest',
}
"""What the tower itself can tell, where it can."""


@dataclass(frozen=True, eq=False)
class Why:
    """The answer to one question of a visitor, small enough to be kept.

    Attributes:
        explanation: Why the spot is odd; the maps of its views are thumbnails, those of the answer are left out.
        adapter: Key of the adapter that was asked.
        looks: Where the tower itself looks, by the names in `LOOKS`, [h, w] in [0, 1]; only what the tower can tell.
    """

    explanation: Explanation
    adapter: str
    looks: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, explanation: Explanation, adapter: str, looks: Mapping[str, np.ndarray]) -> Why:
        """Keep what the page shows of an explanation."""
        scale = min(1.0, THUMBNAIL_SIDE / max(explanation.map.shape))
        views = tuple(replace(view, map=resize(view.map, scale)) for view in explanation.views)
        nothing = np.zeros((1, 1), np.float32)
        small = replace(explanation, views=views, parts={}, map=nothing)
        return cls(small, adapter, {name: resize(look, scale) for name, look in looks.items()})

    def is_about(self, finding: Finding) -> bool:
        """Whether the question was about this finding."""
        return self.explanation.scan is finding.scan and self.adapter == finding.adapter


def highest_spot(finding: Finding) -> tuple[float, float]:
    """Find the oddest spot of the map: (x, y) on the scan's pixels, the middle of the largest peak."""
    top = (finding.map >= (1 - 1e-6) * finding.map.max()).astype(np.uint8)
    _, labels, stats, centroids = cv2.connectedComponentsWithStats(top)
    peak = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    places = np.argwhere(labels == peak)  # [n, 2] rows and columns
    row, column = places[np.square(places - centroids[peak][::-1]).sum(axis=1).argmin()]
    return float(column) + 0.5, float(row) + 0.5


def clickable(finding: Finding, threshold: float, opacity: float, colours: str, why: Why | None) -> str:
    """The overlay to click on, with a cross, and the patch of the last question."""
    scan = finding.scan
    box = ""
    x, y = highest_spot(finding)
    if why is not None:
        x, y = why.explanation.x, why.explanation.y
        left, top, right, bottom = why.explanation.box
        box = (
            f'<i class="fm-patch" style="left:{100 * left / scan.width:.2f}%;top:{100 * top / scan.height:.2f}%;'
            f'width:{100 * (right - left) / scan.width:.2f}%;height:{100 * (bottom - top) / scan.height:.2f}%"></i>'
        )
    x, y = x / scan.width, y / scan.height
    picture = data_address(slider_pair(finding, threshold, opacity, colours)[1])
    label = f"{finding.label}: click a spot to see what it was compared with; arrow keys move the cross, Enter asks"
    return (
        f'<div class="fm-spot" tabindex="0" role="application" aria-label="{escape(label)}" data-x="{x:.4f}" '
        f'data-y="{y:.4f}"><img src="{picture}" alt="overlay of {escape(finding.label)}" draggable="false">{box}'
        f'<i class="fm-cross" style="left:{100 * x:.2f}%;top:{100 * y:.2f}%"></i></div>'
    )


def answer(why: Why | None) -> str:
    """The reference patches beside the patch of the spot, a row for each view of the memory."""
    if why is None:
        return f'<div class="fm-empty">{ASK}</div>'
    told = why.explanation
    far = "as odd as" if 0.95 <= told.distance <= 1.05 else "odder than" if told.distance > 1 else "less odd than"
    rows = "".join(_row(told.scan, told.box, view) for view in told.views if view.matches)
    at_hand = any(match.scan is not None for view in told.views for match in view.matches)
    hint = "" if at_hand else f"<p>{NOT_AT_HAND}</p>"
    return (
        f'<div class="fm-why" role="region" aria-label="why this spot"><h4>Distance {told.distance:.2f}</h4>'
        f"<p>This patch is {far} the oddest patch of a normal scan, whose distance is 1 on average. Each row is one "
        f"way of looking, and its distance a mean over the references that leans on the nearest; patches near in one "
        f"row may be far in another. The shallowest layer counts for the score alone, the next scale on a finer grid "
        f"for where the map is high, the others for both.</p>{hint}{rows}</div>"
    )


def maps(finding: Finding, threshold: float, opacity: float, colours: str, why: Why | None) -> str:
    """The answer, what it was made of, and once a spot was asked about also what each layer sees."""

    def draw(title: str, hint: str, values: np.ndarray, middle: float = 0.5, scan: Scan = finding.scan) -> str:
        picture = map_thumbnail(scan, values, middle, opacity, colours)
        return (
            f'<figure><img src="{picture}" alt="{escape(title)}"><figcaption><b>{escape(title)}</b> '
            f"{escape(hint)}</figcaption></figure>"
        )

    figures = [draw("Answer", "what the score and the threshold are about", finding.map, threshold)]
    figures += [
        draw(MAP_NAMES.get(name, name), MAP_HINTS.get(name, ""), values) for name, values in finding.parts.items()
    ]
    if why is not None:
        small = _small(finding.scan, why.explanation.views[0].map.shape)
        drawn = "".join(
            draw(_title(view), f"{100 * view.share:.0f} % of the answer", view.map, 0.5, small)
            for view in why.explanation.views
        )
        drawn += "".join(draw(name, LOOKS[name], look, 0.5, small) for name, look in why.looks.items())
        layers = (
            f'<p class="fm-count">Layer by layer, as the patch memory sees it</p><div class="fm-maps">{drawn}</div>'
        )
    else:
        layers = '<p class="fm-count">Ask why about a spot to see each layer too.</p>'
    only = "" if finding.parts.keys() - {"patch memory"} else " Nothing was trained for this adapter."
    return (
        f'<p class="fm-count">What the answer is made of. In the parts the contour is at the height of the oddest '
        f'patches of normal scans.{only}</p><div class="fm-maps">{"".join(figures)}</div>{layers}'
    )


def _row(scan: Scan, box: tuple[int, int, int, int], view: ViewExplanation) -> str:
    picture = patch_with_surroundings(scan, box)
    here = f'<figure><img src="{picture}" alt="the spot"><figcaption>here</figcaption></figure>'
    return (
        f'<div class="fm-view"><p><b>{escape(_title(view))}</b> distance {view.distance:.2f}'
        f"<small>{100 * view.share:.0f} % of the answer</small></p>"
        f'<div class="fm-matches">{here}{"".join(_match(match) for match in view.matches)}</div></div>'
    )


def _title(view: ViewExplanation) -> str:
    return f"{KINDS.get(view.kind, view.kind).capitalize()}, {view.layer}"


def _match(match: Match) -> str:
    words = f"{'reference ' if match.label.startswith('scan') else ''}{match.label}"
    if match.scan is None or match.box is None:
        picture = '<div class="fm-later">no picture</div>'
    else:
        picture = f'<img src="{patch_with_surroundings(match.scan, match.box)}" alt="nearest patch in {escape(words)}">'
    return f"<figure>{picture}<figcaption>{escape(words)}<br>{match.distance:.2f}</figcaption></figure>"


def _small(scan: Scan, shape: tuple[int, ...]) -> Scan:
    """The scan at the size of a thumbnail map."""
    scale = max(shape) / max(scan.height, scan.width)
    return Scan(resize(scan.pixels, scale), scan.label)
