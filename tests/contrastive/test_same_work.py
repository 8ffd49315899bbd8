"""A step of this trainer is a step of open_clip's own: the speed of the two is compared on the same work."""

import math
from types import SimpleNamespace

import open_clip
import pytest
import torch
from accelerate import Accelerator

from fmclip.contrastive.config import load_config
from fmclip.contrastive.models import PairModel, pack_attention, save_tower
from fmclip.contrastive.optimisation import make_optimiser, set_rate
from fmclip.contrastive.step import backward

RATE = 1e-2
TEXTS = ("a round bright spot", "stripes", "nothing", "a dark lower half of the field")


class Batches(list):
    """A loader as open_clip's loop wants it."""

    @property
    def num_batches(self) -> int:
        return len(self)

    num_samples = 8


def open_clips_optimiser(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW as `open_clip_train.main` builds it."""
    plain = [weight for name, weight in model.named_parameters() if weight.ndim < 2 or "logit_scale" in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim >= 2]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.2}]
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-3)


@pytest.mark.parametrize("text", ["short", "whole context"])
def test_two_steps_change_the_weights_as_open_clips_trainer_does(tmp_path, text):
    from open_clip_train.train import train_one_epoch

    settings = ["start=tiny", "train_image=all", "train_text=all", "label_smoothing=0", "same_text_matches=false"]
    settings += [f"lr={RATE}", "beta2=0.98", "eps=1e-3", "weight_decay=0.2", "layer_decay=1", "mixup_alpha=0"]
    config = load_config("mini-align", settings)
    ours = PairModel(config.model, config.optimisation)
    with torch.no_grad():
        ours.logit_scale.fill_(math.log(1 / 0.07))
    save_tower(ours, tmp_path)
    theirs = open_clip.create_model(f"local-dir:{tmp_path}", output_dict=True)
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    texts = [f"{one} {' lung' * (0 if text == 'short' else 90)}" for one in TEXTS]
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand(4, 3, ours.image_size, ours.image_size, generator=generator) for _ in range(2)]

    optimiser = make_optimiser(ours, config.optimisation)
    set_rate(optimiser, RATE)
    accelerator = Accelerator(cpu=True)
    ours.train()
    for pixels in pictures:
        backward(accelerator, ours, pixels, texts, torch.arange(4), config.optimisation, seeds=(0, 0, 0))
        accelerator.clip_grad_norm_(ours.parameters(), 1.0)
        optimiser.step()
        ours.limit_temperature()
        optimiser.zero_grad()

    tokens = ours.tokenizer(texts)
    loader = Batches(((pixels - ours.mean) / ours.std, tokens) for pixels in pictures)
    data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda _epoch: None)}
    arguments = {"device": "cpu", "precision": "fp32", "distill": False, "accum_freq": 1, "skip_scheduler": True}
    arguments |= {"grad_clip_norm": 1.0, "log_every_n_steps": 10**9, "batch_size": 4, "world_size": 1, "rank": 0}
    arguments |= {"local_rank": 0, "horovod": False, "wandb": False}
    optimiser = open_clips_optimiser(theirs)
    train_one_epoch(theirs, data, open_clip.ClipLoss(), 0, optimiser, None, None, None, SimpleNamespace(**arguments))

    found = pack_attention(ours.model.state_dict()) | {"logit_scale": ours.logit_scale.detach()}
    wanted = theirs.state_dict()
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], atol=2e-5), name
    changed = [name for name in wanted if (wanted[name] - before[name]).abs().max() > 1e-3]
    assert len(changed) > len(wanted) / 2, "the steps were too small to tell"
