"""A wrong reference: what one abnormal scan among the references does, and whether it is named.

    python -m benchmarks.wrong_reference ROOT

ROOT is as for `python -m fmclip evaluate`. References are drawn as there, once as they are, and once with the last of
them replaced by an abnormal scan of the same half; where the checks name references as unlike the others, these are
taken away, as the page offers it, and the answers are looked at once more. The abnormal scan is tested in neither case.

It writes results/wrong_reference.json and wrong_reference.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from benchmarks import pages
from fmclip.detectors import DETECTORS, Detector
from fmclip.errors import FmclipError
from fmclip.evaluation import Case, Half, Split, environment, load_datasets, split_cases
from fmclip.evaluation.metrics import image_metrics
from fmclip.evaluation.runner import BATCH
from fmclip.prediction_interval import find_outliers
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
    pages.write_page(options.out / f"{NAME}.md", "A wrong reference", command, table(answers), [])


def measure(root: Path, names: Sequence[str] | None, ks: Sequence[int], seeds: int, tower: Tower) -> Iterator[Answer]:
    """Ask with every draw as it is and with its last reference replaced."""
    for dataset in load_datasets(root, names):
        scans: dict[Case, Scan] = {}  # read once for all draws
        for k in ks:
            for seed in range(seeds):
                split = split_cases(dataset.cases, k, seed, abnormal_k=1, half=Half.REPORT)
                for case in (*split.references, *split.abnormals, *split.test):
                    scans.setdefault(case, read_scan(case.path, label="scan"))
                for told in _ask(split, scans, tower):
                    yield Answer(dataset.name, k, seed, *told)


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


def _ask(
    split: Split, scans: dict[Case, Scan], tower: Tower
) -> Iterator[tuple[str, float, float, float, bool | None, int]]:
    drawn = [scans[case] for case in split.references]
    wrong = scans[split.abnormals[0]]
    detector = _fit(drawn, tower)
    yield (AS_DRAWN, *_shares(detector, split, scans), None, len(_named(detector)))
    mixed = [*drawn[:-1], wrong]
    detector = _fit(mixed, tower)
    named = _named(detector)
    is_named = len(drawn) - 1 in named
    shares = _shares(detector, split, scans)
    yield (WRONG, *shares, is_named, len(named) - is_named)
    if named:
        shares = _shares(_fit([scan for place, scan in enumerate(mixed) if place not in named], tower), split, scans)
    yield (TAKEN_AWAY, *shares, None, 0)


def _fit(references: Sequence[Scan], tower: Tower) -> Detector:
    return DETECTORS[METHOD](tower, config_of(METHOD, "full", {}, scan_type="scan")).fit(references)


def _named(detector: Detector) -> set[int]:
    calibration = detector.calibration()
    return find_outliers(calibration.reference_scores, calibration.prior)


def _shares(detector: Detector, split: Split, scans: dict[Case, Scan]) -> tuple[float, float, float]:
    """Image AUROC, and the shares of normal and of abnormal test scans above the threshold."""
    scores = []
    for start in range(0, len(split.test), BATCH):
        batch = [scans[case] for case in split.test[start : start + BATCH]]
        scores += [float(prediction.score) for prediction in detector.predict(batch)]
    found = image_metrics(scores, [case.is_abnormal for case in split.test], detector.calibration().threshold)
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
