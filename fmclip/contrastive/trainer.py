"""The training loop: epochs, validation, checkpoints that a run goes on from exactly, early stopping."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmclip.contrastive.batches import TEST, Batch, PairImages, epoch_batches, load, share_of
from fmclip.contrastive.config import PretrainConfig
from fmclip.contrastive.embedding import embed_images, embed_texts
from fmclip.contrastive.logs import EpochDone, RunLog, StepDone
from fmclip.contrastive.models import PairModel, save_tower
from fmclip.contrastive.optimisation import EarlyStopping, learning_rate, make_optimiser, set_rate
from fmclip.contrastive.pairs import Pair, fingerprint, numbered
from fmclip.contrastive.step import backward, contrastive_loss
from fmclip.errors import PairError

OnEvent = Callable[[StepDone | EpochDone], None]
KEPT_CHECKPOINTS = 3


@dataclass(frozen=True)
class Frozen:
    """What stays the same in all epochs; None where it does not.

    Attributes:
        images: What the image projection reads, [n, C].
        texts: What the text projection reads, or the texts' embeddings, [n, C].
    """

    images: Tensor | None
    texts: Tensor | None


class Trainer:
    """Trains a model on pairs; everything that a step depends on follows from the config and the step's number.

    Args:
        config: Everything about the run.
        accelerator: Device, precision and the other processes (`accelerate.Accelerator`).
        model: The model, on the device.
        train: Pairs to learn from.
        val: Pairs for early stopping; may be empty.
        folder: Folder of the run.
    """

    def __init__(
        self,
        config: PretrainConfig,
        accelerator: Any,
        model: PairModel,
        train: Sequence[Pair],
        val: Sequence[Pair],
        folder: Path,
    ) -> None:
        own = config.optimisation
        world = accelerator.num_processes
        if own.batch_size % world:
            raise PairError(f"optimisation.batch_size ({own.batch_size}) must be a multiple of the {world} processes.")
        if len(train) < max(2, world):
            raise PairError(f"{len(train)} pairs are too few to train on.")
        self.config, self.accelerator, self.model, self.folder = config, accelerator, model, folder
        self.train_pairs, self.val_pairs = list(train), list(val)
        self.images = self._images_of(self.train_pairs)
        self.groups = torch.tensor(numbered([pair.text for pair in self.train_pairs]))  # [n]
        self.optimiser = accelerator.prepare(make_optimiser(model, own))
        self.steps_per_epoch = len(epoch_batches(len(self.train_pairs), own.batch_size, config.seed, 0))
        self.stopping = EarlyStopping(own.patience if self.val_pairs else 0, own.min_delta)
        self.step = 0
        self._kept: dict[str, Frozen] = {}

    @property
    def epoch(self) -> int:
        """The epoch of the next step, counted from 0."""
        return self.step // self.steps_per_epoch

    def fit(self, on_event: OnEvent | None = None) -> Trainer:
        """Train until the last epoch or until validation no longer gets better.

        Args:
            on_event: Gets each step and epoch; raising `Stopped` from it ends the run, which can go on later.

        Returns:
            Itself.

        Raises:
            PairError: The loss is no longer a number.
        """
        own = self.config.optimisation
        log = RunLog(self.folder, self.config.log, self.step) if self.accelerator.is_main_process else None

        def note(event: StepDone | EpochDone) -> None:
            if log is not None:
                log.write(event)
            if on_event is not None:
                on_event(event)

        try:
            while self.epoch < own.epochs and not self.stopping.is_over:
                self._run_epoch(note)
        finally:
            if log is not None:
                log.close()
        return self

    def _frozen(self, part: str) -> Frozen:
        """Run once what all epochs share: frozen texts, and frozen images that nothing is drawn for."""
        if part not in self._kept:
            model, size, plain = self.model, self.config.optimisation.batch_size, self.config.augment.is_plain
            images = self.images if part == "train" else self._images_of(self.val_pairs)
            seen = said = None
            if model.has_frozen_text_features:
                said = embed_texts(model, [pair.text for pair in images.pairs], size, model.text_features)
            if model.has_frozen_image_features and (plain or part == "val"):
                workers = self.config.workers
                seen = embed_images(self.accelerator, model, images, size, workers, model.image_features)
            self._kept[part] = Frozen(seen, said)
        return self._kept[part]

    def _images_of(self, pairs: Sequence[Pair]) -> PairImages:
        return PairImages(pairs, self.config.augment, self.model.image_size, self.config.seed)

    def _load(self, shares: list[list[int]], epoch: int) -> Iterator[Batch]:
        """Read the images of each step, or take what was kept of them."""
        kept = self._frozen("train").images
        if kept is None:
            seen = TEST if self.config.augment.is_plain else epoch
            return load(self.images, shares, seen, workers=self.config.workers)
        return (Batch(torch.tensor(share), kept[share]) for share in shares)

    def _run_epoch(self, note: OnEvent) -> None:
        own, epoch = self.config.optimisation, self.epoch
        first = self.step % self.steps_per_epoch
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        batches = epoch_batches(len(self.train_pairs), own.batch_size, self.config.seed, epoch)[first:]
        shares = [share_of(batch[: len(batch) // world * world], rank, world) for batch in batches]
        losses = []
        self._frozen("train")  # the first time it embeds, in evaluation mode
        self.model.train()
        started = time.perf_counter()
        for batch in self._load(shares, epoch):
            rate = learning_rate(own, self.step, self.steps_per_epoch)
            loss = self._train_step(batch, epoch, rate)
            losses.append(loss)
            self.step += 1
            ended = time.perf_counter()
            speed = len(batch.places) * world / (ended - started)
            started = ended
            temperature = float(torch.exp(-self.model.logit_scale.detach()))
            note(StepDone(epoch, self.step, own.epochs * self.steps_per_epoch, loss, rate, temperature, speed))
            every = self.config.checkpoint_steps
            if every and self.step % every == 0 and self.step % self.steps_per_epoch:
                self.save_checkpoint()
        val_loss = self.validation_loss()
        is_best = self.stopping.better(val_loss) if self.val_pairs else True
        if is_best and self.accelerator.is_main_process:
            save_tower(self.model, self.folder / "tower")
        self.save_checkpoint()
        note(EpochDone(epoch, self.step, sum(losses) / max(1, len(losses)), val_loss, is_best))

    def _train_step(self, batch: Batch, epoch: int, rate: float) -> float:
        own, device = self.config.optimisation, self.accelerator.device
        set_rate(self.optimiser, rate)
        text: Tensor | list[str]
        kept = self._frozen("train").texts
        if kept is not None:
            text = kept[batch.places].to(device)  # [n, C]
        else:
            text = [self.train_pairs[place].text for place in batch.places.tolist()]
        loss = backward(
            self.accelerator,
            self.model,
            batch.pixels.to(device, non_blocking=True),
            text,
            self.groups[batch.places].to(device),
            own,
            seeds=(self.config.seed, epoch, self.step),
        ).item()
        if not math.isfinite(loss):
            raise PairError("The loss is no longer a number: lower the learning rate, or train with precision=no.")
        if own.grad_clip:
            self.accelerator.clip_grad_norm_(self.model.parameters(), own.grad_clip)
        self.optimiser.step()
        self.model.limit_temperature()
        self.optimiser.zero_grad(set_to_none=True)
        return loss

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Loss of the validation pairs, in batches as in training, nothing changed at random; NaN without any."""
        if not self.val_pairs:
            return math.nan
        own, model = self.config.optimisation, self.model
        kept, device, size = self._frozen("val"), self.accelerator.device, own.chunk_size or own.batch_size
        texts = [pair.text for pair in self.val_pairs]
        model.eval()
        if kept.images is not None:
            image = model.encode_images(kept.images.to(device)).cpu()
        else:
            images = self._images_of(self.val_pairs)
            image = embed_images(self.accelerator, model, images, size, self.config.workers)
        if kept.texts is not None:
            text = model.encode_texts(kept.texts.to(device)).cpu()
        else:
            text = embed_texts(model, texts, size)
        groups = torch.tensor(numbered(texts))
        total, count = 0.0, 0
        for first in range(0, len(texts), own.batch_size):
            part = slice(first, first + own.batch_size)
            size = len(texts[part])
            seen, said, numbers = (one[part].to(self.accelerator.device) for one in (image, text, groups))
            total += size * float(contrastive_loss(model, seen, said, numbers, own))
            count += size
        self.model.train()
        return total / count

    def save_checkpoint(self) -> None:
        """Write all that the next step depends on to checkpoints/step-N.safetensors; the oldest ones go."""
        from safetensors.torch import save_file

        if not self.accelerator.is_main_process:
            return
        tensors = {f"model/{name}": tensor for name, tensor in self._trained().items()}
        for place, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{place}/{key}": torch.as_tensor(value) for key, value in state.items()}
        scaler = self.accelerator.scaler
        facts = {
            "step": self.step,
            "best": self.stopping.best,
            "stale": self.stopping.stale,
            "pairs": fingerprint(self.train_pairs),
            "processes": self.accelerator.num_processes,
            "config": self.config.to_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
        }
        folder = self.folder / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"step-{self.step:08d}.safetensors"
        part = file.with_suffix(".part")
        whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(whole, part, {"fmclip": json.dumps(facts)})
        part.replace(file)  # never half a checkpoint under the name of a whole one
        for old in sorted(folder.glob("step-*.safetensors"))[:-KEPT_CHECKPOINTS]:
            old.unlink()

    def load_checkpoint(self, file: Path) -> None:
        """Go on from a checkpoint: the next steps are those that would have followed.

        Raises:
            PairError: It is damaged or of another run.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as stored:
                facts = json.loads(stored.metadata()["fmclip"])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (no mapping)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise PairError("The checkpoint is damaged or not one of this program; take an earlier one.") from error
        same = ("model", "augment", "optimisation", "seed")
        now = self.config.to_dict()
        is_same = facts.get("pairs") == fingerprint(self.train_pairs)
        if not is_same or any(facts["config"][key] != now[key] for key in same):
            raise PairError("The checkpoint belongs to other pairs or settings; resume with those it was made with.")
        if facts.get("processes") != self.accelerator.num_processes:
            raise PairError(f"The checkpoint was made by {facts.get('processes')} processes; resume with as many.")
        own = self._trained()
        stored_model = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
        if stored_model.keys() != own.keys():
            raise PairError("The checkpoint belongs to another model.")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(stored_model[name])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser/"):
                _, place, key = name.split("/")
                state.setdefault(int(place), {})[key] = tensor
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})
        if self.accelerator.scaler is not None and facts["scaler"]:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        self.step = int(facts["step"])
        self.stopping.best, self.stopping.stale = float(facts["best"]), int(facts["stale"])

    def _trained(self) -> dict[str, Tensor]:
        """What training changes: parameters with a gradient, and statistics of norms."""
        weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        kept = {name for name in self.model.state_dict() if name.endswith(("running_mean", "running_var"))}
        return weights | {name: buffer for name, buffer in self.model.named_buffers() if name in kept}
