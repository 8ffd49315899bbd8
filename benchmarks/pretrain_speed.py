"""Pairs per second of contrastive training, beside open_clip's own trainer (`open_clip_train.main`) on the same work.

    python -m benchmarks.pretrain_speed                          # ViT-B-32, random weights, 2 cores, under 10 minutes
    python -m benchmarks.pretrain_speed --model ViT-L-14 --batch-size 128 --device cuda --precision bf16

Both train both halves of one architecture on one CSV of simulated pictures, with InfoNCE, AdamW of the same
settings, gradients clipped at 1, random crops of 90 to 100 % of the picture, the same batch, threads and number of
workers that read; `tests/contrastive/test_same_work.py` holds that a step of one is a step of the other. One clock
times both: the end of each optimiser step. The first step of a turn (start of workers, caches) is not counted,
turns alternate, and the median step counts. Texts are measured twice: short sentences, after which ours cuts the
context while open_clip runs all 77 positions (the same result), and texts that fill the context.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from fmclip.contrastive.config import load_config
from fmclip.contrastive.runs import pretrain
from fmclip.evaluation import environment

TEXTS = {
    "short": "chest radiograph {} with a small opacity in the left lower lobe",
    "full": "chest radiograph {}" + " lung" * 90,
}
Step = tuple[float, float]
"""Wall and CPU seconds; the latter of the training process, where other programs disturb less."""
TRAINERS = ("fmclip", "open_clip")
ADAM = {"lr": 5e-4, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.2}


def main() -> None:
    """Measure both and write JSON and Markdown."""
    options = _options()
    torch.set_num_threads(options.cores)
    seconds: dict[str, dict[str, list[Step]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in options.texts:
            table = _write_pairs(folder, kind, (options.steps + 1) * options.batch_size)
            seconds[kind] = {trainer: [] for trainer in TRAINERS}
            for turn in range(options.repeats):  # in turns, so that a busy moment of the machine hits both
                for trainer, train in (("fmclip", _ours), ("open_clip", _open_clip)):
                    seconds[kind][trainer] += _timed(train, options, table, folder / f"{kind}-{trainer}-{turn}")
                    print(kind, trainer, [round(wall, 3) for wall, _ in seconds[kind][trainer]], flush=True)
    walls, cpus = (
        {
            kind: {name: statistics.median(step[place] for step in steps) for name, steps in own.items()}
            for kind, own in seconds.items()
        }
        for place in (0, 1)
    )
    speeds = {kind: {name: options.batch_size / wall for name, wall in own.items()} for kind, own in walls.items()}
    content = {
        "pairs_per_second": speeds,
        "ratio": {kind: own["fmclip"] / own["open_clip"] for kind, own in speeds.items()},
        "cpu_seconds": cpus,
        "steps": seconds,
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        "environment": environment(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"pretrain-speed-{options.model}-{options.device}"
    (options.out / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = _page(content)
    (options.out / f"{stem}.md").write_text(text, encoding="utf-8")
    print(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip model")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn that are timed")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each trainer")
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), choices=list(TEXTS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="no", choices=("no", "bf16"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def _page(content: dict[str, Any]) -> str:
    where, settings = content["environment"], content["settings"]
    lines = [
        f"# Contrastive training, {settings['model']}",
        "",
        f"Batches of {settings['batch_size']}, precision {settings['precision']}, median of "
        f"{settings['repeats'] * settings['steps']} steps; {where['gpu'] or where['cpu']}, "
        f"{settings['cores']} threads, torch {where['torch']}, open_clip {where['open_clip_torch']}, "
        f"{where['date']}, commit {where['commit']}. "
        "`python -m benchmarks.pretrain_speed`; what is the same in both stands at its head.",
        "",
        "| texts | fmclip, pairs/s | open_clip, pairs/s | fmclip / open_clip | CPU s a step, of either |",
        "|---|---|---|---|---|",
    ]
    for kind, own in content["pairs_per_second"].items():
        cpu = content["cpu_seconds"][kind]
        cells = (f"{own['fmclip']:.2f}", f"{own['open_clip']:.2f}", f"{content['ratio'][kind]:.2f}")
        lines.append(f"| {kind} | {' | '.join(cells)} | {cpu['fmclip']:.2f} / {cpu['open_clip']:.2f} |")
    return "\n".join(lines) + "\n"


def _write_pairs(folder: Path, kind: str, count: int) -> Path:
    """Write pictures of 512 x 512 and their sentences."""
    random = np.random.default_rng(0)
    table = folder / f"{kind}.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "text"])
        for number in range(count):
            path = folder / f"{number}.jpg"
            cv2.imwrite(str(path), cv2.resize(random.integers(0, 255, (32, 32), np.uint8), (512, 512)))
            writer.writerow([path, TEXTS[kind].format(number)])
    return table


def _timed(
    train: Callable[[argparse.Namespace, Path, Path], None], options: argparse.Namespace, table: Path, folder: Path
) -> list[Step]:
    """Time the optimiser steps of one training, from the end of one to the end of the next."""
    ends: list[Step] = []

    def note(*_: Any) -> None:
        if options.device != "cpu":
            torch.cuda.synchronize()
        ends.append((time.perf_counter(), time.process_time()))

    hook = register_optimizer_step_post_hook(note)
    try:
        train(options, table, folder)
    finally:
        hook.remove()
        shutil.rmtree(folder, ignore_errors=True)  # gigabytes, whose writing would disturb the next turn
    gc.collect()
    if len(ends) != options.steps + 1:
        raise SystemExit(f"{len(ends)} optimiser steps were seen, not {options.steps + 1}.")
    return [(after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(ends)]


def _ours(options: argparse.Namespace, table: Path, folder: Path) -> None:
    """Train one epoch with this package."""
    settings = {
        "pairs.format": "csv",
        "pairs.path": table,
        "pairs.patient_column": "",
        "pairs.val_share": 0,
        "pairs.test_share": 0,
        "model.start": f"{options.model}:random",
        "train_text": "all",
        "dropout": 0,
        "crop_min": 0.9,
        "flip": 0,
        "jitter": 0,
        "rotation": 0,
        "grayscale": 0,
        "mixup_alpha": 0,
        "label_smoothing": 0,
        "same_text_matches": "false",
        "layer_decay": 1,
        **ADAM,
        "min_lr": 0,
        "warmup_epochs": 0,
        "epochs": 1,
        "batch_size": options.batch_size,
        "precision": options.precision,
        "workers": options.workers,
        "results": folder.parent,
        "name": folder.name,
    }
    config = load_config("roco-vit-l-14", [f"{key}={value}" for key, value in settings.items()])
    pretrain(config, device=options.device)


def _open_clip(options: argparse.Namespace, table: Path, folder: Path) -> None:
    """Train one epoch with `python -m open_clip_train.main`, in this process."""
    from open_clip_train.main import main as train

    settings = {
        "train-data": table,
        "dataset-type": "csv",
        "csv-img-key": "path",
        "csv-caption-key": "text",
        "csv-separator": ",",
        "model": options.model,
        "lr": ADAM["lr"],
        "beta1": ADAM["beta1"],
        "beta2": ADAM["beta2"],
        "eps": ADAM["eps"],
        "wd": ADAM["weight_decay"],
        "warmup": 0,
        "epochs": 1,
        "batch-size": options.batch_size,
        "grad-clip-norm": 1.0,
        "precision": "fp32" if options.precision == "no" else "amp_bf16",
        "device": options.device,
        "workers": options.workers,
        "save-frequency": 0,
        "log-every-n-steps": 10**9,
        "logs": folder.parent,
        "name": folder.name,
    }
    argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    threads, own = torch.get_num_threads(), sys.argv
    train(argv)
    sys.argv = own
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
