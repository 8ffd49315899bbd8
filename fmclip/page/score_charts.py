"""Scores as pictures and words: one scan among the references, and all queries of a session on one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fmclip.session import Finding

WIDTH, LEFT, RIGHT = 320, 10, 310
BASE, TOP = 96, 24
BINS = 25
MARKS = ((0.065, 26, 6, ""), (0.032, 14, 24, "fm-small"))
"""Marks of the overview, large and small: share of the line that one takes (those that would touch go to another lane),
height of a lane in pixels, lanes at most, class. Small ones, without their numbers, are for many scans."""


def score_histogram(reference_scores: Sequence[float], threshold: float, score: float) -> str:
    """Draw a histogram of the reference scores, one dot for each scan, with the threshold and the scan in question.

    Dots instead of bars: nobody can take 4 dots for more than 4 scans.

    Args:
        reference_scores: Leave-one-out scores in [0, 1].
        threshold: Threshold in [0, 1].
        score: Score of the scan in [0, 1].

    Returns:
        SVG.
    """
    bins = Counter(min(BINS - 1, int(value * BINS)) for value in reference_scores)
    step = min(9.0, (BASE - TOP - 14) / max(bins.values()))
    dots = [
        f'<circle class="fm-dot" cx="{_place((column + 0.5) / BINS)}" cy="{BASE - step * (row + 0.5):.1f}" '
        f'r="{min(4.2, step * 0.47):.1f}"/>'
        for column, count in sorted(bins.items())
        for row in range(count)
    ]
    limit, mark = _place(threshold), _place(score)
    edge = "start" if threshold < 0.15 else "end" if threshold > 0.85 else "middle"
    kind = "fm-mark fm-high" if score > threshold else "fm-mark"
    legend = "dots: reference scans; triangle: this scan"
    parts = [
        f'<rect class="fm-above" x="{limit}" y="{TOP - 4}" width="{RIGHT - limit:.1f}" height="{BASE - TOP + 4}"/>',
        f'<line class="fm-axis" x1="{LEFT}" x2="{RIGHT}" y1="{BASE}" y2="{BASE}"/>',
        *dots,
        f'<line class="fm-threshold" x1="{limit}" x2="{limit}" y1="{TOP - 6}" y2="{BASE}"/>',
        f'<text x="{limit}" y="{TOP - 10}" text-anchor="{edge}">threshold {threshold:.2f}</text>',
        f'<line class="fm-this" x1="{mark}" x2="{mark}" y1="{TOP + 14}" y2="{BASE}"/>',
        f'<path class="{kind}" d="M {mark} {BASE} l -7 -13 h 14 z"/>',
        f'<text x="{LEFT}" y="{BASE + 16}">0</text>',
        f'<text x="{RIGHT}" y="{BASE + 16}" text-anchor="end">1</text>',
        f'<text x="{WIDTH / 2}" y="{BASE + 16}" text-anchor="middle">{legend}</text>',
    ]
    label = f"score {score:.2f} beside {len(reference_scores)} reference scores and the threshold {threshold:.2f}"
    box = f"0 0 {WIDTH} {BASE + 22}"
    return f'<svg class="fm-chart" viewBox="{box}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def describe_odds(reference_scores: Sequence[float], score: float) -> str:
    """Say how little "higher than all" means with few references; "" where the scan is not higher than all.

    Of k + 1 normal scans each is as likely as the others to be the highest: the one in question is, by chance alone,
    once in k + 1 times.
    """
    if not reference_scores or score <= max(reference_scores):
        return ""
    return f"By chance alone, 1 of {len(reference_scores) + 1} normal scans would be."


def overview(findings: Sequence[Finding], selected: Finding, threshold: float) -> str:
    """Place all queries of the session on the line of scores, above the references; `data-index` as on the cards."""
    scores = [finding.score for finding in findings]
    fitting = next((mark for mark in MARKS if max(_lanes(scores, mark[0])) < mark[2]), MARKS[-1])
    width, height, most, size = fitting
    lanes = _lanes(scores, width)
    count = min(most, max(lanes) + 1)
    marks = []
    for place in sorted(range(len(findings)), key=scores.__getitem__):
        finding, lane = findings[place], lanes[place] % most
        high = finding.score > threshold
        words = f"{finding.label}, score {finding.score:.2f}, {'deviates' if high else 'within the references'}"
        number = finding.label.rpartition(" ")[2]
        marks.append(
            f'<button type="button" class="fm-dot-button {"fm-high" if high else ""} {size}" data-index="{place}" '
            f'tabindex="-1" style="left:{100 * finding.score:.1f}%;bottom:{20 + height * lane}px" '
            f'title="{escape(words)}" '
            f'aria-label="{escape(words)}" aria-pressed="{"true" if finding is selected else "false"}">'
            f"{escape(number)}</button>"
        )
    ticks = "".join(f'<i style="left:{100 * value:.1f}%"></i>' for value in selected.reference_scores)
    above = sum(finding.score > threshold for finding in findings)
    label = f"{above} of {len(findings)} scans lie above the threshold {threshold:.2f}"
    side = "fm-left" if threshold > 0.6 else ""
    return (
        f'<div class="fm-overview" role="group" aria-label="{label}" style="height:{30 + height * count}px">'
        f'<div class="fm-beyond" style="left:{100 * threshold:.1f}%"><span class="{side}">threshold '
        f'{threshold:.2f}</span></div><div class="fm-ticks">{ticks}</div>{"".join(marks)}</div>'
        '<p class="fm-scale"><span>0</span><span>circles: query scans by their score; ticks: reference scans</span>'
        "<span>1</span></p>"
    )


def _lanes(scores: Sequence[float], width: float) -> list[int]:
    """The lane of each mark, so that no two touch that take so much of the line."""
    ends: list[float] = []
    lanes = [0] * len(scores)
    for place in sorted(range(len(scores)), key=scores.__getitem__):
        lane = next((lane for lane, end in enumerate(ends) if scores[place] >= end), len(ends))
        ends[lane : lane + 1] = [scores[place] + width]
        lanes[place] = lane
    return lanes


def _place(value: float) -> float:
    return round(LEFT + (RIGHT - LEFT) * min(max(value, 0.0), 1.0), 1)
