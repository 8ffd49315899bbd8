"""A wrong reference: what one abnormal scan among the references does, and whether it is named.

    python -m benchmarks.wrong_reference ROOT

ROOT is as for `python -m fmclip evaluate`. References are drawn as there, once as they are, and once with the last of
them replaced by an abnormal scan of the same half; where the checks name references as unlike the others, these are
taken away, as the page offers it, and the answers are looked at once more. The abnormal scan is tested in neither case.
The default method's score and threshold are those of `patch_memory`.

It writes results/wrong_reference.json and wrong_reference.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from benchmarks import pages
from fmclip.calibration import check_references
from fmclip.detectors import DETECTORS, Detector
from fmclip.errors import FmclipError, ScanError
from fmclip.evaluation import Case, Half, Split, environment, load_datasets, split_cases
from fmclip.evaluation.metrics import image_metrics
from fmclip.evaluation.runner import BATCH
from fmclip.scans import Scan, read_scan
from fmclip.settings import config_of
from fmclip.towers import Tower, get_tower

METHOD = "patch_memory"
NAME = "wrong_reference"
AS_DRAWN = "all normal"
WRONG = "one abnormal"
TAKEN_AWAY = "one abnormal, what is named taken away"


@dataclass(frozen=True)
class Answer:
    """How one reference set answers for the test scans.

    Attributes:
        dataset: Name of the data set.
        k: Reference scans.
        seed: Of the draw.
        references: `AS_DRAWN`, `WRONG` or `TAKEN_AWAY`.
        image_auroc: Of the test scans.
        false_alarms: Share of normal test scans above the threshold.
        found: Share of abnormal ones above it.
        named_wrong: Whether the abnormal reference is named; None where there is none.
        named_sound: Normal references that are named.
    """

    dataset: str
    k: int
    seed: int
    references: str
    image_auroc: float
    false_alarms: float
    found: float
    named_wrong: bool | None
    named_sound: int


def main() -> None:
    """Measure and write JSON and Markdown."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        answers = []
        for answer in measure(options.root, options.dataset, options.k, options.seeds, get_tower(options.tower)):
            where = f"{answer.dataset} k={answer.k} seed={answer.seed} {answer.references}"
            above = f"normal above {answer.false_alarms:.2f}, abnormal {answer.found:.2f}"
            print(f"{where}: image {answer.image_auroc:.3f}, {above}", flush=True)
            answers.append(answer)
    except FmclipError as error:
        raise SystemExit(f"Error: {error}") from None
    content = {"answers": [asdict(answer) for answer in answers], "environment": environment()}
    (options.out / f"{NAME}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    command = f"python -m benchmarks.wrong_reference ROOT --k {' '.join(map(str, options.k))} --seeds {options.seeds}"
    command += "".join(f" --dataset {name}" for name in options.dataset or ())
    pages.write_page(options.out / f"{NAME}.md", f"A wrong reference ({METHOD})", command, table(answers), [])


def measure(root: Path, names: Sequence[str] | None, ks: Sequence[int], seeds: int, tower: Tower) -> Iterator[Answer]:
    """Ask with every draw as it is and with its last reference replaced."""
    for dataset in load_datasets(root, names):
        scans = _read(dataset.cases)
        unreadable = set(dataset.cases).difference(scans)
        for k in ks:
            for seed in range(seeds):
                split = split_cases(dataset.cases, k, seed, abnormal_k=1, half=Half.REPORT, unreadable=unreadable)
                for references, detector, named_wrong, named_sound in _sets(split, scans, tower):
                    yield Answer(
                        dataset.name, k, seed, references, *_shares(detector, split, scans), named_wrong, named_sound
                    )


def table(answers: Sequence[Answer]) -> list[str]:
    """One row for each data set, k and kind of reference set."""
    rows = [
        "| scans | k | references | image AUROC | normal above the threshold | abnormal above it | wrong one named |"
        " normal ones named, of a set |",
        "|---|---|---|---|---|---|---|---|",
    ]
    kinds = list(dict.fromkeys((one.dataset, one.k, one.references) for one in answers))
    for dataset, k, references in kinds:
        own = [one for one in answers if (one.dataset, one.k, one.references) == (dataset, k, references)]
        shares = [fmean(getattr(one, name) for one in own) for name in ("image_auroc", "false_alarms", "found")]
        wrong = [one.named_wrong for one in own if one.named_wrong is not None]
        named = f"{sum(wrong)} of {len(wrong)}" if wrong else "–"
        sound = f"{fmean(one.named_sound for one in own):.2f}" if references != TAKEN_AWAY else "–"
        cells = [dataset, str(k), references, *(f"{100 * one:.1f}" for one in shares), named, sound]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _read(cases: Sequence[Case]) -> dict[Case, Scan]:
    """Read the scans that can be read, once for all draws."""
    scans = {}
    for case in cases:
        with contextlib.suppress(ScanError):
            scans[case] = read_scan(case.path, label="scan")
    return scans


def _sets(split: Split, scans: Mapping[Case, Scan], tower: Tower) -> Iterator[tuple[str, Detector, bool | None, int]]:
    """The reference sets of a draw, each with what was learned from it and what is named of it."""
    drawn = [scans[case] for case in split.references]
    detector = _fit(drawn, tower)
    yield AS_DRAWN, detector, None, len(_named(drawn, detector))
    mixed = [*drawn[:-1], scans[split.abnormals[0]]]
    detector = _fit(mixed, tower)
    named = _named(mixed, detector)
    is_named = len(mixed) - 1 in named
    yield WRONG, detector, is_named, len(named) - is_named
    if named:
        detector = _fit([scan for place, scan in enumerate(mixed) if place not in named], tower)
    yield TAKEN_AWAY, detector, None, 0


def _fit(references: Sequence[Scan], tower: Tower) -> Detector:
    return DETECTORS[METHOD](tower, config_of(METHOD, "full", {}, scan_type="scan")).fit(references)


def _named(references: Sequence[Scan], detector: Detector) -> set[int]:
    """Places of the references that the checks ask about as unlike the others."""
    warnings = check_references(references, detector.calibration())
    return {place for warning in warnings if warning.kind == "outlier" for place in warning.scans}


def _shares(detector: Detector, split: Split, scans: Mapping[Case, Scan]) -> tuple[float, float, float]:
    """Image AUROC, and the shares of normal and of abnormal test scans above the threshold."""
    learned = {scans[case].digest for case in (*split.references, *split.abnormals)}
    asked = [case for case in split.test if scans[case].digest not in learned]  # copies that no group tells of
    scores = []
    for start in range(0, len(asked), BATCH):
        batch = [scans[case] for case in asked[start : start + BATCH]]
        scores += [float(prediction.score) for prediction in detector.predict(batch)]
    found = image_metrics(scores, [case.is_abnormal for case in asked], detector.calibration().threshold)
    return found.image_auroc, 1 - found.specificity, found.sensitivity


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--dataset", action="append", help="may be repeated; all if left out")
    parser.add_argument("--tower", default="mini")
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
