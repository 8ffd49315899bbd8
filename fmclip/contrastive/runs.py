"""A run from end to end: pairs, split, training, metrics, index and figures in one folder `results/<run>/`.

run.json        config, machine, versions, counts        metrics.json   retrieval of the test pairs
splits.json     which pair is in which part              log.csv        losses
tower/          the trained tower, for --tower           index.safetensors   all pairs, to search in
checkpoints/    to go on from                            figures/       grid, curves, Grad-CAM
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmclip.contrastive.augmentation import fit_image
from fmclip.contrastive.batches import PairImages
from fmclip.contrastive.config import PretrainConfig, config_from
from fmclip.contrastive.embedding import embed_images, embed_texts
from fmclip.contrastive.index import make_index
from fmclip.contrastive.models import PairModel, synchronise_batch_norms
from fmclip.contrastive.pairs import Pair, PairSet, collect, numbered
from fmclip.contrastive.retrieval import both_directions, chance
from fmclip.contrastive.sources import list_pairs
from fmclip.contrastive.splits import SPLITS, Split, split_pairs
from fmclip.contrastive.trainer import OnEvent, Trainer
from fmclip.errors import PairError
from fmclip.evaluation import environment
from fmclip.scans import Scan
from fmclip.towers import Tower, get_tower

OnCount = Callable[[int, int], None]
PATIENCE_HOURS = 12
"""How long processes wait for the first one, which decodes every image before it draws a split."""


@dataclass(frozen=True)
class Data:
    """The pairs of a run in their parts.

    Attributes:
        found: All that can be used.
        split: Which goes where.
    """

    found: PairSet
    split: Split

    def part(self, name: str) -> list[Pair]:
        """Return the pairs of "train", "val", "test", or "all" in use."""
        if name == "all":
            return [pair for part in SPLITS for pair in self.part(part)]
        return self.split.part(self.found, name)


def run_folder(config: PretrainConfig) -> Path:
    """Return the folder of a run."""
    return Path(config.results) / config.name


def read_data(config: PretrainConfig, on_count: OnCount | None = None) -> Data:
    """List the pairs, and read or draw their split; see `split_pairs` for what is raised."""
    file = Path(config.pairs.split_file) if config.pairs.split_file else run_folder(config) / "splits.json"
    found, split = split_pairs(collect(list_pairs(config.pairs)), config.pairs, file, on_count)
    return Data(found, split)


def pretrain(
    config: PretrainConfig,
    *,
    device: str = "auto",
    resume: Path | None = None,
    on_count: OnCount | None = None,
    on_event: OnEvent | None = None,
) -> Path:
    """Train a tower on image-text pairs.

    Args:
        config: Everything about the run.
        device: "auto" leaves the choice to accelerate; "cpu", "cuda" or "cuda:1" insist on it.
        resume: Checkpoint to go on from, or the run's folder for its last one.
        on_count: Called with (images checked, images in all), before a new split is drawn.
        on_event: Gets each step and epoch.

    Returns:
        Folder of the run; `evaluate_run` measures it.

    Raises:
        PairError: Pairs, split, settings or checkpoint cannot be used, or the run is there already.
    """
    accelerator = make_accelerator(config, device)
    folder = run_folder(config)
    if resume is None and (folder / "checkpoints").is_dir():
        raise PairError("A run of this name is there already: give name=ANOTHER, or --resume to go on with it.")
    checkpoint = find_checkpoint(resume) if resume is not None else None
    folder.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():  # it draws the split, the others read it
        data = read_data(config, on_count if accelerator.is_main_process else None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = PairModel(config.model, config.optimisation, config.augment.size)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        model = synchronise_batch_norms(model)
    model.to(accelerator.device)
    trainer = Trainer(config, accelerator, model, data.part("train"), data.part("val"), folder)
    if checkpoint is not None:
        trainer.load_checkpoint(checkpoint)
    if accelerator.is_main_process:
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        _write_facts(config, data, folder, {"trained_parameters": trained, "processes": accelerator.num_processes})
    started = time.perf_counter()
    trainer.fit(on_event if accelerator.is_main_process else None)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        facts = {"seconds": round(time.perf_counter() - started, 2), "steps": trainer.step, "epochs": trainer.epoch}
        if trainer.val_pairs:
            facts["best_val_loss"] = trainer.stopping.best
        _write_facts(config, data, folder, facts)
    return folder


def make_accelerator(config: PretrainConfig, device: str = "auto") -> Any:
    """Make the accelerator: device, precision and the other processes, as `accelerate launch` set them up.

    Raises:
        PairError: The device is not there, or several processes cannot share it.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, is_initialized
    from accelerate.utils import InitProcessGroupKwargs

    if (
        is_initialized() and AcceleratorState().num_processes == 1
    ):  # else an earlier run's precision or device would stay
        AcceleratorState._reset_state(reset_partial_state=True)
    wanted = _wanted_device(device)
    if wanted is not None and wanted.index is not None:
        torch.cuda.set_device(wanted)
    waiting = InitProcessGroupKwargs(timeout=timedelta(hours=PATIENCE_HOURS))
    precision = config.optimisation.precision
    accelerator = Accelerator(mixed_precision=precision, cpu=device == "cpu", kwargs_handlers=[waiting])
    if wanted is not None and accelerator.device.type != wanted.type:
        raise PairError(f"Training would run on {accelerator.device.type}, not on {device}: leave --device out.")
    if wanted is not None and wanted.index is not None and accelerator.num_processes > 1:
        raise PairError("Each of several processes takes a GPU of its own: leave --device out, or give --device cuda.")
    return accelerator


def _wanted_device(device: str) -> torch.device | None:
    """What a device's name insists on; None for "auto"."""
    if device == "auto":
        return None
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise PairError(f"There is no device {device!r}: give auto, cpu, cuda or cuda:0.") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise PairError(f"There is no {device} here: {torch.cuda.device_count()} GPUs are found. Give --device cpu.")
    return wanted


def find_checkpoint(path: Path) -> Path:
    """Return a checkpoint file: the one named, or the last one of a run's folder.

    Raises:
        PairError: There is none.
    """
    if path.is_file():
        return path
    files = sorted((path / "checkpoints").glob("step-*.safetensors"))
    if not files:
        raise PairError("There is no checkpoint to go on from; leave --resume out to start anew.")
    return files[-1]


def load_run(folder: Path) -> PretrainConfig:
    """Read the config of a run that has been trained.

    Raises:
        PairError: The folder holds no run.
    """
    try:
        values = json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PairError("This folder holds no run: give one that `python -m fmclip pretrain` wrote.") from error
    if not (folder / "tower" / "model.safetensors").is_file():
        raise PairError("This run has no tower yet: let its first epoch end.")
    return config_from({**values, "results": str(folder.parent), "name": folder.name})


def run_tower(folder: Path, device: str = "cpu") -> Tower:
    """Load the tower of a run, frozen."""
    return get_tower(str(folder / "tower"), device=device)


def embed_scan(tower: Tower, scan: Scan, fit: str) -> Tensor:
    """Embed one scan [D] as the images of a run were."""
    pixels = torch.from_numpy(fit_image(scan, tower.image_size, fit)).permute(2, 0, 1)[None]  # [1, 3, S, S]
    with torch.no_grad():
        return tower.embed_images(pixels.to(tower.device))[0].cpu()


@dataclass(frozen=True)
class Embedded:
    """Pairs with their embeddings.

    Attributes:
        pairs: n pairs.
        image: [n, D].
        text: [n, D].
    """

    pairs: Sequence[Pair]
    image: Tensor
    text: Tensor


def embed_pairs(
    config: PretrainConfig, tower: str, pairs: Sequence[Pair], device: str = "auto", on_count: OnCount | None = None
) -> Embedded:
    """Embed pairs with any tower, by its name or the folder of a run."""
    accelerator = make_accelerator(config, device)
    own = replace(config.model, start=tower, image_weights="", text_weights="", dropout=0.0)
    model = PairModel(own, config.optimisation).to(accelerator.device)
    images = PairImages(pairs, config.augment, model.image_size, config.seed)
    size = config.optimisation.chunk_size or config.optimisation.batch_size
    image = embed_images(accelerator, model, images, size, config.workers, on_progress=on_count)
    return Embedded(pairs, image, embed_texts(model, [pair.text for pair in pairs], size))


def evaluate_run(
    folder: Path, *, part: str = "test", device: str = "auto", on_count: OnCount | None = None
) -> tuple[dict[str, Any], Embedded]:
    """Measure retrieval of a run's tower and write metrics.json and index.safetensors.

    Args:
        folder: Folder of the run.
        part: "train", "val", "test" or "all".
        device: As for `pretrain`.
        on_count: Called with (images done, images in all).

    Returns:
        What metrics.json holds, and the pairs of the part with their embeddings.

    Raises:
        PairError: The folder holds no run, or the part no pairs.
    """
    config = load_run(folder)
    data = read_data(config)
    pairs = data.part(part)
    if len(pairs) < 2:
        raise PairError(f"The {part} part holds {len(pairs)} pairs: too few to measure retrieval.")
    everything = data.part("all")
    whole = embed_pairs(config, str(folder), everything, device, on_count)
    keys = {pair.key for pair in pairs}
    rows = torch.tensor([place for place, pair in enumerate(everything) if pair.key in keys])
    embedded = Embedded([everything[place] for place in rows.tolist()], whole.image[rows], whole.text[rows])
    content = {"part": part, **measure(embedded)}
    (folder / "metrics.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    identity = run_tower(folder).identity
    texts = [pair.text for pair in everything]
    make_index(whole.image, whole.text, texts, identity, config.augment.fit).save(folder / "index.safetensors")
    return content, embedded


def measure(embedded: Embedded) -> dict[str, Any]:
    """Measure retrieval among pairs: both directions, and what chance gives, as metrics.json holds them."""
    labels = numbered([pair.text for pair in embedded.pairs])
    return {
        "pairs": len(embedded.pairs),
        "patients": len({pair.patient for pair in embedded.pairs}),
        "texts": len(set(labels)),
        **{name: one.to_dict() for name, one in both_directions(embedded.image, embedded.text, labels).items()},
        "chance": {name: one.to_dict() for name, one in chance(labels).items()},
    }


def _write_facts(config: PretrainConfig, data: Data, folder: Path, more: dict[str, Any]) -> None:
    """Write run.json, keeping what an earlier call wrote."""
    file = folder / "run.json"
    facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    facts |= {
        "config": config.to_dict(),
        "environment": environment(),
        "pairs": {name: len(data.part(name)) for name in SPLITS},
        "skipped": dict(data.found.skipped),
        **more,
    }
    file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
