"""The loss as SVG: it takes the colours of the page, light or dark, and costs nothing to redraw."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

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
