"""The page's own pieces of HTML. All text from outside is escaped; pictures are inside the text itself."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Literal, NamedTuple

from fmclip.calibration import enumerate_labels as enumerate_labels
from fmclip.colours import COLOUR_MAPS, COLOURS
from fmclip.page import pictures
from fmclip.page.charts import self_check_chart
from fmclip.page.score_charts import describe_odds, score_histogram
from fmclip.scans import Scan
from fmclip.session import Finding, Progress

if TYPE_CHECKING:
    from fmclip.detectors import SyntheticExample
    from fmclip.self_check import SelfCheck

DEVIATES, WITHIN = "▲ deviates", "● within"

HEADER = """
<header class="fm-header">
  <h1>fmclip</h1>
  <p>Learns from a handful of <b>normal</b> scans, here and now, and shows where a new scan deviates from them.</p>
  <p class="fm-research" role="note">Research use only. Not a medical device: no finding here is a diagnosis.</p>
</header>
"""


def step_title(number: int, title: str, hint: str) -> str:
    """Heading of one of the three steps."""
    return f'<div class="fm-step"><span class="fm-number">{number}</span><h2>{title}</h2><p>{hint}</p></div>'


class Item(NamedTuple):
    """A line of a note.

    Attributes:
        text: The line.
        drop: Labels of the scans that a button at its end takes away; none, no button.
    """

    text: str
    drop: tuple[str, ...] = ()


def note(text: str, kind: str = "info", more: Sequence[str | Item] = ()) -> str:
    """Short message that stays on the page: kind "info", "good", "warning" or "error"; `data-labels` of its buttons."""
    items = "".join(_item(Item(line) if isinstance(line, str) else line) for line in more)
    body = (f"<p>{escape(text)}</p>" if text else "") + (f"<ul>{items}</ul>" if items else "")
    return f'<div class="fm-note fm-{kind}">{body}</div>' if body else ""


def hint(text: str) -> str:
    """A quiet line."""
    return f'<p class="fm-count">{escape(text)}</p>' if text else ""


def _item(item: Item) -> str:
    labels = escape(json.dumps(item.drop), quote=True)
    names = escape(enumerate_labels(item.drop))
    button = (
        f' <button type="button" class="fm-drop" data-labels="{labels}">Remove {names}</button>' if item.drop else ""
    )
    return f"<li>{escape(item.text)}{button}</li>"


def seen(there: bool) -> bool | Literal["hidden"]:
    """Whether a button shows; else it is hidden, not taken out, so that no new text comes while gradio puts it in."""
    return there or "hidden"


def empty(text: str) -> str:
    """Placeholder for something that is still to come."""
    return f'<div class="fm-empty">{escape(text)}</div>'


def thumbnails(scans: Sequence[Scan], noun: str, *, selectable: bool = False, marked: Collection[Scan] = ()) -> str:
    """Strip of scans with their numbers; selectable ones are buttons, `data-index` is their place."""
    if not scans:
        return ""
    figures = "".join(_thumbnail(place, scan, selectable, scan in marked) for place, scan in enumerate(scans))
    count = f"{len(scans)} {noun}{'' if len(scans) == 1 else 's'}"
    hint = "; click to select" if selectable else ""
    return (
        f'<p class="fm-count">{count}{hint}</p><div class="fm-strip" tabindex="0" aria-label="{count}">{figures}</div>'
    )


def _thumbnail(place: int, scan: Scan, selectable: bool, is_marked: bool) -> str:
    picture = f'<img src="{pictures.scan_thumbnail(scan)}" alt="{escape(scan.label)}" loading="lazy">'
    number = escape(scan.label.rpartition(" ")[2])
    if not selectable:
        return f"<figure>{picture}<figcaption>{number}</figcaption></figure>"
    pressed = "true" if is_marked else "false"
    return (
        f'<button type="button" class="fm-pick" data-index="{place}" aria-pressed="{pressed}">{picture}'
        f"<span>{number}</span></button>"
    )


def progress(state: Progress) -> str:
    """Status line with a bar; the bar moves to and fro while the length of the work is unknown."""
    share = 100 * state.step / state.steps if state.steps and state.step else None
    bar = f'<i style="width:{share:.1f}%"></i>' if share is not None else '<i class="fm-unknown"></i>'
    now = f' aria-valuenow="{share:.0f}"' if share is not None else ""
    return (
        f'<div class="fm-note fm-info" role="status"><p>{escape(_capital(state.message))}'
        f'<span class="fm-seconds">{state.elapsed:.0f} s</span></p>'
        f'<div class="fm-bar" role="progressbar" aria-label="training" aria-valuemin="0" aria-valuemax="100"{now}>'
        f"{bar}</div></div>"
    )


def self_check(checks: Sequence[SelfCheck]) -> str:
    """How well synthetic anomalies that were held out of the training are found, after each stage."""
    last = checks[-1]
    words = (
        f"Synthetic self-check: {last.anomalies} anomalies that were never trained on, and {last.normals} unchanged "
        "scans. Area under the ROC curve; filled: scans told apart, hollow: pixels. Real findings look different: this "
        "is no promise about them."
    )
    return f'<p class="fm-count">{escape(words)}</p>{self_check_chart(checks)}'


def synthetic(examples: Sequence[SyntheticExample], threshold: float, opacity: float) -> str:
    """Synthetic anomalies with outline, kind and strength, each beside its heatmap once there is one; `data-index`."""
    figures = []
    for place, example in enumerate(examples):
        outlined, heat = pictures.example_thumbnails(example, threshold, opacity)
        words = escape(_capital(example.description))
        strength = f"<small>{escape(example.strength)}</small>" if example.strength else ""
        second = f'<img src="{heat}" alt="heatmap of it">' if heat else '<div class="fm-later">heatmap follows</div>'
        figures.append(
            f'<button type="button" class="fm-example" data-index="{place}" title="Make it again from its record">'
            f'<span class="fm-pair"><img src="{outlined}" alt="{words}, outlined">{second}</span>'
            f"<span>{words}{strength}</span></button>"
        )
    return (
        '<p class="fm-count">Synthetic anomalies that it learns from, outlined, each beside its heatmap; click to '
        'replay</p><div class="fm-synthetic" tabindex="0" '
        f'aria-label="synthetic anomalies">{"".join(figures)}</div>'
    )


def replay(description: str, strength: str, picture: str, verdict: str, record: dict, same: bool) -> str:
    """A synthetic anomaly that was made again, with its record."""
    words = escape(", ".join(filter(None, (_capital(description), strength))))
    text = escape(json.dumps(record, indent=1))
    return (
        f'<div class="fm-replay"><img src="{picture}" alt="{words}, outlined"><div><h3>{words}</h3>'
        f"{note(verdict, 'good' if same else 'warning')}"
        f"<details><summary>Its record</summary><pre>{text}</pre></details></div></div>"
    )


def cards(
    findings: Sequence[Finding], selected: Finding, threshold: float, opacity: float, colours: str = COLOURS
) -> str:
    """One button for each query, worst first; `data-index` is its place in `findings`."""
    order = sorted(range(len(findings)), key=lambda place: -findings[place].score)
    buttons = []
    for place in order:
        finding = findings[place]
        high = finding.score > threshold
        chip = f'<span class="fm-chip {"fm-high" if high else ""}">{DEVIATES if high else WITHIN}</span>'
        words = f"{finding.label}, score {finding.score:.2f}, {'deviates' if high else 'within the references'}"
        buttons.append(
            f'<button type="button" class="fm-card" data-index="{place}" aria-label="{escape(words)}" '
            f'aria-pressed="{"true" if finding is selected else "false"}">'
            f'<img src="{pictures.finding_thumbnail(finding, threshold, opacity, colours)}" alt="">'
            f'<span class="fm-label">{escape(finding.label)}</span>'
            f'<span class="fm-score">{finding.score:.2f}</span>{chip}</button>'
        )
    hint = "query scans, worst first; arrow keys move, Enter shows"
    above = sum(finding.score > threshold for finding in findings)
    count = f"{above} of {len(findings)} scans deviate{'s' if above == 1 else ''}; worst first"
    group = f'<div class="fm-cards" role="group" aria-label="{hint}">{"".join(buttons)}</div>'
    return f'<p class="fm-count">{count}</p>{group}'


def verdict(finding: Finding, threshold: float, facts: Mapping[str, str], place: int, count: int) -> str:
    """Everything about one query in words, beside its picture.

    Args:
        finding: What the session says about it.
        threshold: The threshold in use.
        facts: Further rows; those without text are left out.
        place: Its place among the queries, worst first.
        count: How many queries there are.
    """
    high = finding.score > threshold
    words = "deviates from the references" if high else "within the references"
    by_hand = abs(threshold - finding.threshold) > 1e-6
    source = "set by hand" if by_hand else f"from {len(finding.reference_scores)} reference scans"
    rows = [
        ("Score", f"{finding.score:.2f}"),
        ("Threshold", f"{threshold:.2f} <small>{source}</small>"),
        ("Among the queries", f"{place} of {count}, worst first"),
    ]
    if by_hand:
        rows.insert(2, ("Calibrated", f"{escape(finding.verdict)} <small>at {finding.threshold:.2f}</small>"))
    rows += [(name, escape(text)) for name, text in facts.items() if text]
    chance = describe_odds(finding.reference_scores, finding.score)
    odds = f'<small class="fm-odds">{chance}</small>' if chance else ""
    table = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows)
    return (
        f'<div class="fm-verdict"><h3 class="{"fm-high" if high else ""}">{escape(_capital(finding.label))} {words}'
        f"<small>{escape(finding.rank)}</small>{odds}</h3><dl>{table}</dl>"
        f"{score_histogram(finding.reference_scores, threshold, finding.score)}"
        f"{note('', 'warning', finding.scan.notes)}"
        '<p class="fm-research">Research use only: no diagnosis.</p></div>'
    )


def legend(threshold: float, colours: str = COLOURS) -> str:
    """Colour scale of the overlay: its middle is the threshold."""
    end = min(1.0, 2 * threshold)
    stops = ", ".join(f"rgb{tuple(int(part) for part in COLOUR_MAPS[colours][index])}" for index in range(0, 256, 51))
    return (
        '<div class="fm-legend" role="img" aria-label="colour scale: dark is like the references, bright is unlike">'
        f'<span>0 like the references</span><i style="background:linear-gradient(90deg, {stops})"></i>'
        f"<span>{end:.2f} unlike</span>"
        f"<small>middle of the scale and white contour: threshold {threshold:.2f}</small></div>"
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
