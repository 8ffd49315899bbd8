"""The loss as SVG: it takes the colours of the page, light or dark, and costs nothing to redraw."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fmclip.self_check import SelfCheck

WIDTH, HEIGHT = 480, 150
LEFT, RIGHT, TOP, BOTTOM = 36, 8, 10, 22
SMOOTHING = 0.15


def loss_chart(curve: Sequence[tuple[str, float]]) -> str:
    """Draw the training loss: the steps thin, their running mean bold, a line where a stage ends.

    Args:
        curve: (stage, loss) of each step.

    Returns:
        SVG; empty before the first step.
    """
    if len(curve) < 2:
        return ""
    top = max(loss for _, loss in curve) * 1.05 or 1.0
    xs = [LEFT + (WIDTH - LEFT - RIGHT) * place / (len(curve) - 1) for place in range(len(curve))]
    ys = [TOP + (HEIGHT - TOP - BOTTOM) * (1 - loss / top) for _, loss in curve]
    parts = [_axis_label(0, top), _axis_label(top / 2, top), _axis_label(top / 1.05, top)]
    parts.append(f'<polyline class="fm-thin" points="{_points(xs, ys)}"/>')
    start = 0
    for _, steps in groupby(curve, key=lambda point: point[0]):
        end = start + len(list(steps))
        parts.append(f'<polyline class="fm-line" points="{_points(xs[start:end], _smooth(ys[start:end]))}"/>')
        if start:
            parts.append(f'<line class="fm-break" x1="{xs[start]:.1f}" x2="{xs[start]:.1f}" y1="{TOP}" y2="128"/>')
        start = end
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">step 1</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">step {len(curve)}</text>')
    label = f"training loss over {len(curve)} steps, now {curve[-1][1]:.2f}"
    return _svg(parts, HEIGHT, label)


def self_check_chart(checks: Sequence[SelfCheck]) -> str:
    """Draw how well held-out synthetic anomalies are found after each stage: scans filled, pixels hollow.

    Args:
        checks: In the order of the stages.

    Returns:
        SVG; empty without checks.
    """
    if not checks:
        return ""
    bottom, row = 0.5, 26
    left, right = 118, WIDTH - 46

    def place(value: float) -> float:
        return round(left + (right - left) * (min(max(value, bottom), 1.0) - bottom) / (1 - bottom), 1)

    floor = 14 + row * len(checks)
    parts = [
        f'<line class="fm-grid" x1="{place(tick)}" x2="{place(tick)}" y1="6" y2="{floor}"/>'
        f'<text x="{place(tick)}" y="{floor + 14}" text-anchor="middle">{text}</text>'
        for tick, text in ((0.5, "0.5 chance"), (0.75, "0.75"), (1.0, "1 all found"))
    ]
    for index, check in enumerate(checks):
        y = 20 + row * index
        image, pixel = place(check.image_auroc), place(check.pixel_auroc)
        parts += [
            f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(check.stage)}</text>',
            f'<line class="fm-axis" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>',
            f'<circle class="fm-hollow" cx="{pixel}" cy="{y}" r="5"/>',
            f'<circle class="fm-full" cx="{image}" cy="{y}" r="5"/>',
            f'<text x="{right + 8}" y="{y + 4}">{check.image_auroc:.2f}</text>',
        ]
    last = checks[-1]
    label = (
        f"synthetic self-check after {last.stage}: area under the ROC curve {last.image_auroc:.2f} for scans, "
        f"{last.pixel_auroc:.2f} for pixels"
    )
    return _svg(parts, floor + 22, escape(label, quote=True))


def _svg(parts: Sequence[str], height: int, label: str, width: int = WIDTH) -> str:
    body = "".join(parts)
    return f'<svg class="fm-chart" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{body}</svg>'


def _axis_label(value: float, top: float) -> str:
    y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top)
    return (
        f'<line class="fm-grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2g}</text>'
    )


def _points(xs: Sequence[float], ys: Sequence[float]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential running mean."""
    smooth: list[float] = []
    for value in values:
        smooth.append(value if not smooth else (1 - SMOOTHING) * smooth[-1] + SMOOTHING * value)
    return smooth
