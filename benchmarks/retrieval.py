"""How well texts find images and images texts: the embedded tower as it is, and after learning its projections.

    python -m benchmarks.retrieval captions.csv --root FOLDER            # columns path, text, patientid
    python -m benchmarks.retrieval captions.csv --config radiology-mini -o augment.size=160 -o epochs=4 --seeds 1
    python -m benchmarks.retrieval captions.csv --config roco-vit-l-14 --stem roco-mini -o start=mini -o lr=1e-4 ...

Each seed draws another patient-level split; the test part is measured before and after training, beside chance and
the figures that radiology-clip-mini states. Those fit three test items with ranks 1, 1, 2 and 1, 2, 3 (or a
multiple of three), so that every tower is also measured among three pairs at a time. Runs are thrown away, or kept
in `--runs FOLDER`, where `evaluate-retrieval`, `retrieve` and `benchmarks.stage1` find them; a run that is done is
not trained again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fmclip.contrastive.config import load_config
from fmclip.contrastive.pairs import numbered
from fmclip.contrastive.retrieval import both_directions, chance
from fmclip.contrastive.runs import Embedded, embed_pairs, measure, pretrain, read_data, run_folder
from fmclip.evaluation import environment

NAMES = {"recall_1": "R@1", "recall_5": "R@5", "recall_10": "R@10", "median_rank": "median rank", "ndcg_10": "nDCG@10"}
DIRECTIONS = ("image_to_text", "text_to_image")
SOURCE = {
    "image_to_text": {"recall_1": 0.67, "recall_5": 1.0, "recall_10": 1.0, "median_rank": 1, "ndcg_10": 0.877},
    "text_to_image": {"recall_1": 0.33, "recall_5": 1.0, "recall_10": 1.0, "median_rank": 2, "ndcg_10": 0.710},
}
"""radiology-clip-mini's README, "tiny experiment": 30 patients of OpenI."""
SOURCE_ITEMS = 3
"""Its test items, as R@1 of 2/3 and 1/3 and both nDCG suggest; a multiple of three is possible."""
DRAWS = 1000

Metrics = dict[str, Any]


def main() -> None:
    """Measure each seed and write JSON and Markdown."""
    options = _options()
    whole: dict[str, list[Metrics]] = {}
    three: dict[str, list[Metrics]] = {}
    for seed in range(options.seeds):
        for name, (metrics, few) in _measure(options, seed).items():
            whole.setdefault(name, []).append(metrics)
            three.setdefault(name, []).append(few)
    content = {
        "config": options.config,
        "overrides": options.override,
        "command": _command(options),
        "rows": _means(whole),
        "rows_of_three": _means(three),
        "runs": whole,
        "source": SOURCE,
        "environment": environment(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"retrieval-{options.stem or options.config}"
    (options.out / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = _page(content, whole["trained"])
    (options.out / f"{stem}.md").write_text(text, encoding="utf-8")
    print(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", help="CSV of pairs")
    parser.add_argument("--root", default="", help="folder that image paths are relative to")
    parser.add_argument("--config", default="mini-align")
    parser.add_argument("--override", "-o", action="append", default=[], help="KEY=VALUE, may be repeated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--runs", type=Path, help="keep the runs here, as STEM-SEED; those that are done are used again"
    )
    parser.add_argument("--stem", default="", help="name of the results and runs; that of the config if left out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def _command(options: argparse.Namespace) -> str:
    """Word what measures the same again, without where files lie on this machine."""
    words = ["python", "-m", "benchmarks.retrieval", "PAIRS.csv", "--config", options.config]
    words += ["--stem", options.stem] if options.stem else []
    words += [word for one in options.override for word in ("-o", one)]
    return shlex.join([*words, "--seeds", str(options.seeds)])


def _measure(options: argparse.Namespace, seed: int) -> dict[str, tuple[Metrics, Metrics]]:
    """Train on one split; measure its test part with the tower as it starts and as it ends, and chance."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            "pairs.format=csv",
            f"pairs.path={options.pairs}",
            f"pairs.root={options.root}",
            "pairs.test_share=0.2",
            *options.override,
            f"pairs.split_seed={seed}",
            f"seed={seed}",
            f"results={options.runs or folder}",
            f"name={options.stem or options.config}-{seed}",
        ]
        config = load_config(options.config, settings)
        run = run_folder(config)
        if not _is_done(run):
            pretrain(config, device=options.device, on_event=lambda event: print(event, flush=True))
        test = read_data(config).part("test")
        ended = embed_pairs(config, str(run), test, options.device)
        trained = measure(ended)
        found = {"chance": ({**trained["chance"], "pairs": trained["pairs"]}, _chance_of_three())}
        if not config.model.start.endswith(":random"):
            begun = embed_pairs(config, config.model.start, test, options.device)
            found["as it is"] = measure(begun), _among_three(begun, seed)
        return {**found, "trained": (trained, _among_three(ended, seed))}


def _is_done(run: Path) -> bool:
    """Whether a run has ended: its facts then say how long it took."""
    file = run / "run.json"
    return file.is_file() and "seconds" in json.loads(file.read_text(encoding="utf-8"))


def _chance_of_three() -> Metrics:
    return {name: one.to_dict() for name, one in chance(range(SOURCE_ITEMS)).items()}


def _among_three(embedded: Embedded, seed: int) -> Metrics:
    """Measure among three pairs with different texts at a time, as many as the source's test part holds; the mean."""
    labels = numbered([pair.text for pair in embedded.pairs])
    generator = torch.Generator().manual_seed(seed)
    draws: list[Metrics] = []
    while len(draws) < DRAWS:
        places = torch.randperm(len(labels), generator=generator)[:SOURCE_ITEMS].tolist()
        if len({labels[place] for place in places}) == SOURCE_ITEMS:
            few = both_directions(embedded.image[places], embedded.text[places], range(SOURCE_ITEMS))
            draws.append({name: one.to_dict() for name, one in few.items()})
    return {way: {name: statistics.fmean(draw[way][name] for draw in draws) for name in NAMES} for way in DIRECTIONS}


def _means(rows: dict[str, list[Metrics]]) -> dict[str, Metrics]:
    return {name: {way: _mean([one[way] for one in own]) for way in DIRECTIONS} for name, own in rows.items()}


def _mean(metrics: list[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    return {
        name: {
            "mean": statistics.fmean(values := [one[name] for one in metrics]),
            "sd": statistics.stdev(values) if len(values) > 1 else None,
        }
        for name in NAMES
    }


def _page(content: dict[str, Any], runs: Sequence[Metrics]) -> str:
    where = content["environment"]
    sizes = "; ".join(f"{one['pairs']} pairs with {one['texts']} texts of {one['patients']} patients" for one in runs)
    parts = f"Mean and spread over {len(runs)} patient-level splits" if len(runs) > 1 else "One patient-level split"
    lines = [
        f"# Retrieval, {content['config']}",
        "",
        f"Test parts: {sizes}. {parts}; {where['cpu']}, {where['date']}, commit {where['commit']}.",
        "",
        f"`{content['command']}`",
        "",
        *_table(content["rows"]),
        "",
        "## Among three pairs at a time",
        "",
        "radiology-clip-mini's figures are quoted: another data set, and few test items, not stated how many. Three "
        "with ranks 1, 1, 2 and 1, 2, 3, give exactly these; chance among three gives the latter. Ours are means over "
        f"{DRAWS} draws of three pairs with different texts.",
        "",
        *_table(content["rows_of_three"]),
    ]
    for way in DIRECTIONS:
        quoted = [f"{content['source'][way][key]:.3g}" for key in NAMES]
        lines.append(f"| {way.replace('_', ' ')} | radiology-clip-mini (quoted) | {' | '.join(quoted)} |")
    return "\n".join(lines) + "\n"


def _table(rows: dict[str, Metrics]) -> list[str]:
    lines = [f"| direction | tower | {' | '.join(NAMES.values())} |", f"|---|---|{'---|' * len(NAMES)}"]
    for way in DIRECTIONS:
        for name, row in rows.items():
            cells = [_cell(row[way][key], key) for key in NAMES]
            lines.append(f"| {way.replace('_', ' ')} | {name} | {' | '.join(cells)} |")
    return lines


def _cell(value: dict[str, float | None], name: str) -> str:
    places = 1 if name == "median_rank" else 3
    spread = "" if value["sd"] is None else f" ± {value['sd']:.{places}f}"
    return f"{value['mean']:.{places}f}{spread}"


if __name__ == "__main__":
    main()
