"""How well texts find images and images texts: the embedded tower as it is, and after learning its projections.

    python -m benchmarks.retrieval captions.csv --root FOLDER            # columns path, text, patientid
    python -m benchmarks.retrieval captions.csv --config radiology-mini -o augment.size=160 -o epochs=4 --seeds 1

Each seed draws another patient-level split; the test part is measured before and after training, beside chance and the
figures that radiology-clip-mini states for its handful of test items. What is trained here is thrown away.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from fmclip.contrastive.config import load_config
from fmclip.contrastive.runs import embed_pairs, measure, pretrain, read_data
from fmclip.evaluation import environment

NAMES = {"recall_1": "R@1", "recall_5": "R@5", "recall_10": "R@10", "median_rank": "median rank", "ndcg_10": "nDCG@10"}
DIRECTIONS = ("image_to_text", "text_to_image")
SOURCE = {
    "image_to_text": {"recall_1": 0.67, "recall_5": 1.0, "recall_10": 1.0, "median_rank": 1, "ndcg_10": 0.877},
    "text_to_image": {"recall_1": 0.33, "recall_5": 1.0, "recall_10": 1.0, "median_rank": 2, "ndcg_10": 0.710},
}
"""radiology-clip-mini's README, "tiny experiment": 30 patients of OpenI, a test part of about three to six items."""


def main() -> None:
    """Measure each seed and write JSON and Markdown."""
    options = _options()
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.seeds):
        for name, metrics in _measure(options, seed).items():
            rows.setdefault(name, []).append(metrics)
    content = {
        "config": options.config,
        "overrides": options.override,
        "rows": {name: {way: _mean([one[way] for one in own]) for way in DIRECTIONS} for name, own in rows.items()},
        "runs": rows,
        "source": SOURCE,
        "environment": environment(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"retrieval-{options.config}"
    (options.out / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = _table(content, rows["trained"])
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
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def _measure(options: argparse.Namespace, seed: int) -> dict[str, dict[str, Any]]:
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
            f"results={folder}",
        ]
        config = load_config(options.config, settings)
        run = pretrain(config, device=options.device, on_event=lambda event: print(event, flush=True))
        test = read_data(config).part("test")
        trained = measure(embed_pairs(config, str(run), test, options.device))
        found = {"chance": {**trained["chance"], "pairs": trained["pairs"]}}
        if not config.model.start.endswith(":random"):
            found["as it is"] = measure(embed_pairs(config, config.model.start, test, options.device))
        return {**found, "trained": trained}


def _mean(metrics: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "mean": statistics.fmean(values := [one[name] for one in metrics]),
            "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
        }
        for name in NAMES
    }


def _table(content: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    where = content["environment"]
    sizes = ", ".join(f"{one['pairs']} pairs with {one['texts']} texts of {one['patients']} patients" for one in runs)
    overrides = f", {', '.join(content['overrides'])}" if content["overrides"] else ""
    lines = [
        f"# Retrieval, {content['config']}",
        "",
        f"Test parts: {sizes}. Mean and spread over {len(runs)} patient-level splits{overrides}; {where['cpu']}, "
        f"{where['date']}, commit {where['commit']}. The source's row is quoted: another data set, a handful of items.",
        "",
        f"| direction | tower | {' | '.join(NAMES.values())} |",
        f"|---|---|{'---|' * len(NAMES)}",
    ]
    for way in DIRECTIONS:
        for name, row in content["rows"].items():
            cells = [f"{row[way][key]['mean']:.3f} ± {row[way][key]['sd']:.3f}" for key in NAMES]
            lines.append(f"| {way.replace('_', ' ')} | {name} | {' | '.join(cells)} |")
        quoted = [f"{content['source'][way][key]:.3g}" for key in NAMES]
        lines.append(f"| {way.replace('_', ' ')} | radiology-clip-mini (quoted) | {' | '.join(quoted)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
