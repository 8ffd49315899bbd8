"""Pairs per second of contrastive training, beside open_clip's own training loop on the same model and files.

    python -m benchmarks.pretrain_speed                          # ViT-B-32, random weights, 2 cores
    python -m benchmarks.pretrain_speed --model ViT-L-14 --batch-size 128 --device cuda --precision bf16

Both read the same simulated pictures from disk with the same number of workers, train both halves with AdamW and clip
gradients at 1; the first epoch warms up, the second is measured. open_clip resizes and crops, ours draws what Table
A2 does but mixup. Texts are short sentences: ours cuts the context after the longest, open_clip runs all 77 positions.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch

from fmclip.contrastive.config import load_config
from fmclip.contrastive.logs import EpochDone
from fmclip.contrastive.runs import pretrain
from fmclip.evaluation import environment


def main() -> None:
    """Measure both and write JSON and Markdown."""
    options = _options()
    torch.set_num_threads(options.cores)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = _write_pairs(folder, options.steps * options.batch_size)
        speeds: dict[str, list[float]] = {"fmclip": [], "open_clip": []}
        for _ in range(options.repeats):  # in turns, so that a busy moment of the machine hits both
            speeds["fmclip"].append(_ours(options, table, folder))
            speeds["open_clip"].append(_open_clip(options, table))
    best = {name: max(values) for name, values in speeds.items()}
    content = {
        "pairs_per_second": best,
        "all": speeds,
        "ratio": best["fmclip"] / best["open_clip"],
        "settings": {key: str(value) for key, value in vars(options).items() if key != "out"},
        "environment": environment(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"pretrain-speed-{options.model}-{options.device}"
    (options.out / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    where = content["environment"]
    text = (
        f"# Contrastive training, {options.model}\n\nBatches of {options.batch_size}, {options.precision}, best of "
        f"{options.repeats}; {where['gpu'] or where['cpu']}, {options.cores} threads, torch {where['torch']}, "
        f"{where['date']}, commit {where['commit']}.\n\n| trainer | pairs/s |\n|---|---|\n"
        f"| fmclip | {best['fmclip']:.2f} |\n| open_clip | {best['open_clip']:.2f} |\n\n"
        f"fmclip / open_clip: {content['ratio']:.2f}\n"
    )
    (options.out / f"{stem}.md").write_text(text, encoding="utf-8")
    print(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip model")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="steps of an epoch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="no", choices=("no", "bf16"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def _write_pairs(folder: Path, count: int) -> Path:
    """Write pictures of 512 x 512 and their sentences."""
    random = np.random.default_rng(0)
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "text"])
        for number in range(count):
            path = folder / f"{number}.jpg"
            cv2.imwrite(str(path), cv2.resize(random.integers(0, 255, (32, 32), np.uint8), (512, 512)))
            writer.writerow([path, f"chest radiograph {number} with a small opacity in the left lower lobe"])
    return folder / "pairs.csv"


def _ours(options: argparse.Namespace, table: Path, folder: Path) -> float:
    """Pairs per second of the second epoch."""
    config = load_config(
        "roco-vit-l-14",
        [
            "pairs.format=csv",
            f"pairs.path={table}",
            "pairs.patient_column=",
            "pairs.val_share=0",
            "pairs.test_share=0",
            f"model.start={options.model}:random",
            "train_text=all",
            "dropout=0",
            "mixup_alpha=0",
            "epochs=2",
            f"batch_size={options.batch_size}",
            f"precision={options.precision}",
            f"workers={options.workers}",
            f"results={folder}",
            f"name=run{time.monotonic_ns()}",
        ],
    )
    times: list[float] = []
    begun: list[float] = []

    def watch(event: Any) -> None:
        if isinstance(event, EpochDone):
            begun.append(time.perf_counter())
        elif event.epoch == 1:
            times.append(time.perf_counter())

    pretrain(config, device=options.device, on_event=watch)
    return options.steps * options.batch_size / (times[-1] - begun[0])


def _open_clip(options: argparse.Namespace, table: Path) -> float:
    """Pairs per second of the second epoch of open_clip's `train_one_epoch`."""
    import open_clip
    from open_clip_train.data import CsvDataset
    from open_clip_train.train import train_one_epoch

    model, preprocess, _ = open_clip.create_model_and_transforms(options.model, device=options.device, output_dict=True)
    dataset = CsvDataset(str(table), preprocess, "path", "text", ",", open_clip.get_tokenizer(options.model))
    loader: Any = torch.utils.data.DataLoader(
        dataset, batch_size=options.batch_size, shuffle=True, num_workers=options.workers, drop_last=True
    )
    loader.num_samples, loader.num_batches = len(dataset), len(loader)
    args = SimpleNamespace(
        device=options.device,
        precision="fp32" if options.precision == "no" else "amp_bf16",
        distill=False,
        accum_freq=1,
        skip_scheduler=True,
        grad_clip_norm=1.0,
        log_every_n_steps=10**9,
        batch_size=options.batch_size,
        world_size=1,
        rank=0,
        local_rank=0,
        horovod=False,
        wandb=False,
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-6)
    data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda _epoch: None)}
    seconds = 0.0
    for epoch in range(2):
        started = time.perf_counter()
        train_one_epoch(model, data, open_clip.ClipLoss(), epoch, optimiser, None, None, None, args)
        seconds = time.perf_counter() - started
    return loader.num_batches * options.batch_size / seconds


if __name__ == "__main__":
    main()
