"""The report as PDF, A4: a summary of all scans, worst first, then a page for each."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fmclip import __version__
from fmclip.figures import draw_colour_scale, draw_score_histogram, overlay
from fmclip.report.files import worst_first
from fmclip.report.record import RunRecord
from fmclip.scans import Scan, resize
from fmclip.session import Finding

DISCLAIMER = "Research use only. Not a medical device: no finding here is a diagnosis."
FEW = 10
"""With fewer reference scans than this, the report says how little their ranks mean."""

_A4 = 8.27, 11.69  # inches
_LEFT, _RIGHT = 0.09, 0.91
_ROWS = 34  # of a summary page
_THUMBNAILS = 12  # on the summary, where so few scans leave room for pictures
_PICTURE_SIDE = 640  # pixels; what is smaller is enlarged, so that contours are thin
_HIGH, _LOW, _MUTED, _LINE = "#b3273f", "#00667a", "#5b6770", "#cfd8dc"


def write_report(target: Path | BinaryIO, findings: Sequence[Finding], record: RunRecord) -> None:
    """Write the report.

    Args:
        target: File to write.
        findings: What was found, in any order; judged by the threshold that each holds.
        record: How it was found.

    Raises:
        ValueError: There is no finding.
        OSError: The file cannot be written.
    """
    if not findings:
        raise ValueError("a report needs at least one finding")
    # of the file itself: no author, no title from a file name
    metadata = {"Title": "fmclip report", "Subject": DISCLAIMER, "Creator": f"fmclip {__version__}", "Producer": None}
    ordered = worst_first(findings)
    pages = [ordered[start : start + _ROWS] for start in range(0, len(ordered), _ROWS)] if len(ordered) > 1 else []
    count = len(pages) + len(ordered)
    figures = (
        *(_summary_page(part, place * _ROWS, ordered, record) for place, part in enumerate(pages)),
        *(_scan_page(finding, place, len(ordered), record) for place, finding in enumerate(ordered, start=1)),
    )
    with PdfPages(target, metadata=metadata) as pdf:
        for number, figure in enumerate(figures, start=1):
            _frame(figure, record, f"Page {number} of {count}")
            pdf.savefig(figure)


def limits(record: RunRecord) -> str:
    """Say how far the threshold and a rank carry, in words that few references do not stretch."""
    count = len(record.calibration.reference_scores)
    text = (
        f"The threshold is set from {count} reference scans so that about one in ten new normal scans lies above it, "
        "if they vary as the references do."
    )
    if count < FEW:
        text += (
            f" With {count} references a rank has only {count + 1} steps: even “higher than all {count}” is "
            f"what one in {count + 1} normal scans would get by chance."
        )
    return text


def _scan_page(finding: Finding, place: int, count: int, record: RunRecord) -> Figure:
    figure = Figure(figsize=_A4)
    _verdict(figure, finding, place, count)
    scan, enlarged = _enlarged(finding, _PICTURE_SIDE)
    picture = overlay(scan, enlarged, finding.threshold)
    height = min(0.34, 0.4 * _A4[0] / _A4[1] * scan.height / scan.width)
    y = 0.85 - height
    _picture(figure, (_LEFT, y, 0.4, height), scan.pixels, "Scan")
    _picture(figure, (0.51, y, 0.4, height), picture, "Overlay; the contour is the threshold")
    draw_colour_scale(figure.add_axes((0.51, y - 0.025, 0.4, 0.014)), finding.threshold)
    histogram = figure.add_axes((_LEFT + 0.04, y - 0.235, 0.36, 0.135))
    draw_score_histogram(histogram, finding.reference_scores, finding.threshold, {finding.label: finding.score})
    histogram.set_title("Scores of the reference scans, and this scan", fontsize=9, loc="left", color=_MUTED)
    histogram.tick_params(labelsize=7)
    for label in (histogram.xaxis.label, histogram.yaxis.label):
        label.set_fontsize(8)
    _rows(figure, 0.535, y - 0.11, _facts(finding, record))
    _paragraph(figure, y - 0.29, limits(record), "How far this carries")
    if finding.scan.notes:
        _paragraph(figure, y - 0.355, "; ".join(finding.scan.notes) + ".", "About this scan", lines=2)
    _settings(figure, 0.11, record)
    return figure


def _summary_page(part: Sequence[Finding], before: int, ordered: Sequence[Finding], record: RunRecord) -> Figure:
    figure = Figure(figsize=_A4)
    above = sum(finding.is_abnormal for finding in ordered)
    title = f"{above} of {len(ordered)} scans deviate{'s' if above == 1 else ''} from the references"
    figure.text(_LEFT, 0.905, title, fontsize=15, weight="bold")
    figure.text(_LEFT, 0.884, "Worst first; the line in each bar is the threshold.", fontsize=9, color=_MUTED)
    top, step = 0.85, 0.0175
    for x, name in ((_LEFT, "Scan"), (0.27, "Score"), (0.49, "Verdict"), (0.685, "Rank")):
        figure.text(x, top, name, fontsize=8, color=_MUTED)
    for row, finding in enumerate(part, start=1):
        y = top - row * step
        colour = _HIGH if finding.is_abnormal else _LOW
        figure.text(_LEFT, y, f"{before + row}.  {textwrap.shorten(finding.label, 24)}", fontsize=9, parse_math=False)
        figure.text(0.27, y, f"{finding.score:.3f}", fontsize=9)
        bar = figure.add_axes((0.33, y, 0.14, 0.009))
        bar.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[], facecolor="#eef2f4")
        bar.spines[:].set_visible(False)
        bar.barh(0.5, finding.score, height=1, color=colour)
        bar.axvline(finding.threshold, color="black", linewidth=1.2)
        figure.text(0.49, y, _word(finding), fontsize=9, color=colour)
        figure.text(0.685, y, finding.rank, fontsize=8)
    if len(ordered) <= _THUMBNAILS:
        _thumbnails(figure, ordered, top - (len(part) + 2) * step)
    _paragraph(figure, 0.205, limits(record), "How far this carries")
    _settings(figure, 0.11, record)
    return figure


def _thumbnails(figure: Figure, findings: Sequence[Finding], top: float) -> None:
    """Overlays of all scans in rows of four, from `top` downwards to the text at the foot."""
    rows = -(-len(findings) // 4)
    height = min(0.2, (top - 0.24) / rows)
    for place, finding in enumerate(findings):
        scan, enlarged = _enlarged(finding, _PICTURE_SIDE // 2)
        row, column = divmod(place, 4)
        corner = _LEFT + column * 0.2075, top - (row + 1) * height
        title = f"{place + 1}.  {textwrap.shorten(finding.label, 20)}"
        _picture(figure, (*corner, 0.195, height - 0.022), overlay(scan, enlarged, finding.threshold), title)


def _frame(figure: Figure, record: RunRecord, page: str) -> None:
    """Head and foot that every page has."""
    figure.text(_LEFT, 0.955, "fmclip report", fontsize=11, weight="bold")
    head = f"{textwrap.shorten(record.config.scan_type, 60, placeholder=' …')} · {record.date}"
    figure.text(_RIGHT, 0.955, head, fontsize=9, color=_MUTED, ha="right", parse_math=False)
    figure.add_artist(_line(0.945))
    figure.add_artist(_line(0.045))
    figure.text(_LEFT, 0.027, DISCLAIMER, fontsize=8.5, weight="bold")
    figure.text(_RIGHT, 0.027, page, fontsize=8, color=_MUTED, ha="right")


def _verdict(figure: Figure, finding: Finding, place: int, count: int) -> None:
    colour = _HIGH if finding.is_abnormal else _LOW
    title = f"{_capital(textwrap.shorten(finding.label, 40))}: {_word(finding)}"
    figure.text(_LEFT, 0.905, title, fontsize=17, weight="bold", color=colour, parse_math=False)
    among = f"; number {place} of {count} scans, worst first" if count > 1 else ""
    figure.text(_LEFT, 0.881, f"{_capital(finding.rank)}{among}.", fontsize=10)


def _facts(finding: Finding, record: RunRecord) -> list[tuple[str, str]]:
    calibrated = record.calibration.threshold
    by_hand = abs(finding.threshold - calibrated) > 1e-6
    source = finding.scan.source
    rows = [
        ("Score", f"{finding.score:.3f}"),
        (
            "Threshold",
            f"{finding.threshold:.3f}" + (f", by hand (calibrated {calibrated:.3f})" if by_hand else ""),
        ),
        ("Area above it", _share((finding.map > finding.threshold).mean())),
        ("Reference scans", str(len(finding.reference_scores))),
        ("Window", record.window),
        ("Size", f"{finding.scan.width} x {finding.scan.height} pixels"),
    ]
    if source is not None and source.slice_index is not None:
        rows.append(("Slice", str(source.slice_index)))
    return rows


def _share(share: float) -> str:
    if 0 < share < 0.001:
        return "less than 0.1 % of the picture"
    return f"{100 * share:.1f} % of the picture"


def _word(finding: Finding) -> str:
    """The verdict with its sign, so that colour is not all that tells."""
    return f"{'▲' if finding.is_abnormal else '●'} {finding.verdict}"


def _settings(figure: Figure, y: float, record: RunRecord) -> None:
    text = " · ".join(f"{name}: {value}" for name, value in record.describe())
    is_long = len(textwrap.wrap(text, 122)) > 4  # many variants, or why it cannot be done again
    _paragraph(figure, y, text, "Settings", size=6.5 if is_long else 7.5, width=140 if is_long else 122)


def _rows(figure: Figure, x: float, y: float, rows: Sequence[tuple[str, str]]) -> None:
    for number, (name, value) in enumerate(rows):
        figure.text(x, y - number * 0.0185, name, fontsize=8.5, color=_MUTED)
        figure.text(x + 0.135, y - number * 0.0185, textwrap.shorten(value, 48), fontsize=8.5, parse_math=False)


def _paragraph(
    figure: Figure, y: float, text: str, title: str, *, size: float = 8.5, width: int = 108, lines: int = 4
) -> None:
    figure.text(_LEFT, y, title, fontsize=8.5, color=_MUTED)
    figure.text(
        _LEFT,
        y - 0.006,
        "\n".join(textwrap.wrap(text, width, max_lines=lines)),
        fontsize=size,
        va="top",
        linespacing=1.35,
        parse_math=False,
    )


def _picture(figure: Figure, place: tuple[float, float, float, float], picture: np.ndarray, title: str) -> None:
    axes = figure.add_axes(place)
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="none")
    axes.set_anchor("N")
    axes.set_axis_off()
    axes.set_title(title, fontsize=9, loc="left", color=_MUTED, parse_math=False)


def _enlarged(finding: Finding, side: int) -> tuple[Scan, np.ndarray]:
    """Scan and map [H, W] at the size that is printed."""
    scale = side / max(finding.scan.height, finding.scan.width)
    return Scan(resize(finding.scan.pixels, scale), finding.label), resize(finding.map, scale)


def _line(y: float) -> Line2D:
    return Line2D([_LEFT, _RIGHT], [y, y], color=_LINE, linewidth=0.8)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
