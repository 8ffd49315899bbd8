"""Training on pairs: what is learned, what stays frozen, and runs that must come out the same."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fmclip.contrastive.logs import EpochDone, StepDone, read_log
from fmclip.contrastive.models import PairModel
from fmclip.contrastive.runs import evaluate_run, find_checkpoint, pretrain, run_folder
from fmclip.contrastive.trainer import Trainer
from fmclip.errors import PairError, Stopped
from fmclip.towers import get_tower

STEADY = (
    "optimisation.eps=1e-3",
)  # else Adam makes whole steps of the rounding of gradients that are zero (key biases)


class Losses(list):
    """Listener that keeps the losses of the steps."""

    def __call__(self, event):
        if isinstance(event, StepDone):
            self.append(event.loss)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "tower" / "model.safetensors")


def run(config, **options):
    losses = Losses()
    folder = pretrain(config, device="cpu", on_event=losses, **options)
    return folder, losses


def test_it_learns_to_tell_the_pictures_apart(settings):
    folder, losses = run(settings("epochs=12", "lr=2e-3", "min_lr=1e-5", "augment.rotation=5", "crop_min=0.9"))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    metrics, _ = evaluate_run(folder, part="train", device="cpu")
    assert metrics["image_to_text"]["recall_1"] > 2 * metrics["chance"]["image_to_text"]["recall_1"]
    assert metrics["text_to_image"]["ndcg_10"] > metrics["chance"]["text_to_image"]["ndcg_10"]
    assert json.loads((folder / "metrics.json").read_text())["part"] == "train"
    facts = json.loads((folder / "run.json").read_text())
    assert facts["pairs"] == {"train": 28, "val": 6, "test": 6}
    assert facts["steps"] == len(losses) == 36
    assert facts["config"]["optimisation"]["epochs"] == 12
    assert "torch" in facts["environment"]


def test_the_result_is_a_tower(settings, tiny_tower):
    folder, _ = run(settings("epochs=1"))
    tower = get_tower(str(folder))
    assert tower is get_tower(str(folder / "tower"))
    assert tower.paired
    assert tower.layers == tiny_tower.layers
    assert tower.identity != tiny_tower.identity
    pixels = torch.rand(2, 3, 64, 64)
    assert tower.embed_images(pixels).shape == (2, 32)
    assert not torch.allclose(tower.features(pixels)[-1], tiny_tower.features(pixels)[-1])


def test_an_untrained_step_saves_the_tower_it_started_from(settings, tiny_tower):
    config = settings("epochs=1", "lr=1e-30", "min_lr=0", "weight_decay=0")
    tower = get_tower(str(run(config)[0]))
    pixels = torch.rand(2, 3, 64, 64)
    assert torch.allclose(tower.embed_images(pixels), tiny_tower.embed_images(pixels), atol=1e-6)
    assert torch.allclose(tower.embed_text(["a scan"]), tiny_tower.embed_text(["a scan"]), atol=1e-6)


@pytest.mark.parametrize(
    ("trained", "changes"),
    [
        (("train_image=all", "train_text=none"), {"image": True, "text": False}),
        (("train_image=none", "train_text=all"), {"image": False, "text": True}),
    ],
)
def test_frozen_halves_stay_as_they_are(settings, tiny_tower, trained, changes):
    folder, _ = run(settings("epochs=1", "lr=1e-2", *trained))
    new, old = weights(folder), tiny_tower.model.state_dict()
    image = torch.equal(new["visual.conv1.weight"], old["visual.conv1.weight"])
    text = torch.equal(new["token_embedding.weight"], old["token_embedding.weight"])
    assert {"image": not image, "text": not text} == changes


def test_projections_alone(settings, tiny_tower):
    folder, _ = run(settings("epochs=1", "lr=1e-2", "train_image=projection", "train_text=projection"))
    new, old = weights(folder), tiny_tower.model.state_dict()
    changed = {name for name, tensor in new.items() if name in old and not torch.equal(tensor, old[name])}
    assert changed == {"visual.proj", "text_projection", "logit_scale"}


@pytest.mark.parametrize(("checkpoint_steps", "text"), [(0, "none"), (1, "all")])
def test_a_resumed_run_is_the_run_that_was_never_stopped(settings, checkpoint_steps, text):
    hard = ("epochs=3", f"train_text={text}", "dropout=0.1", "mixup_alpha=0.4", "patience=0")
    hard += ("augment.jitter=0.3", "augment.rotation=9")
    whole, losses = run(settings("name=whole", *hard))
    config = settings("name=halves", f"checkpoint_steps={checkpoint_steps}", *hard)
    seen = Losses()

    def stop_in_the_second_epoch(event):
        seen(event)
        if len(seen) == 5:  # three steps an epoch
            raise Stopped

    with pytest.raises(Stopped):
        pretrain(config, device="cpu", on_event=stop_in_the_second_epoch)
    folder = run_folder(config)
    with pytest.raises(PairError, match="--resume"):
        pretrain(config, device="cpu")
    done = int(find_checkpoint(folder).stem.removeprefix("step-"))
    assert done == (4 if checkpoint_steps else 3)
    folder, rest = run(config, resume=find_checkpoint(folder))
    assert rest == losses[done:]
    assert len(rest) == 9 - done
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(folder)[name]), name
    logged = [
        (row["epoch"], row["step"], row["loss"], row["val_loss"], row["lr"]) for row in read_log(folder / "log.csv")
    ]
    wanted = [
        (row["epoch"], row["step"], row["loss"], row["val_loss"], row["lr"]) for row in read_log(whole / "log.csv")
    ]
    assert logged == wanted


def test_a_checkpoint_of_other_settings_is_refused(settings):
    folder, _ = run(settings("epochs=1"))
    with pytest.raises(PairError, match="other pairs or settings"):
        run(settings("epochs=1", "lr=5e-3"), resume=find_checkpoint(folder))
    table = run_folder(settings()).parent / "other.csv"
    lines = Path(settings().pairs.path).read_text().replace("round bright spot", "square bright spot")
    table.write_text(lines)
    with pytest.raises(PairError, match="other pairs or settings"):
        run(
            settings("epochs=1", f"pairs.path={table}", f"root={Path(settings().pairs.path).parent}"),
            resume=find_checkpoint(folder),
        )
    file = find_checkpoint(folder)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(PairError, match="damaged"):
        run(settings("epochs=1"), resume=file)


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_gradient_caching_changes_nothing_but_the_memory(settings, loss):
    extra = ("epochs=1", f"loss={loss}", "mixup_alpha=0.4", "lr=1e-2", *STEADY)
    whole, losses = run(settings("name=whole", *extra))
    parts, others = run(settings("name=parts", "chunk_size=3", *extra))
    assert others == pytest.approx(losses, rel=1e-5)
    for name, tensor in weights(whole).items():
        assert torch.allclose(tensor, weights(parts)[name], atol=2e-5), name


def test_gradient_caching_holds_a_chunk_at_a_time(settings, monkeypatch):
    sizes = []
    encode = PairModel.encode_images

    def watched(model, pixels):
        sizes.append(len(pixels))
        return encode(model, pixels)

    monkeypatch.setattr(PairModel, "encode_images", watched)
    run(settings("epochs=1", "chunk_size=3"))
    assert max(sizes) == 3
    assert sizes[:6] == [3, 3, 2] * 2  # without a graph, then each once more with one


def test_mixed_precision_learns_the_same_in_single_precision_weights(settings):
    extra = ("epochs=3", "lr=2e-3", "mixup_alpha=0.4")
    _, exact = run(settings("name=exact", *extra))
    folder, rounded = run(settings("name=rounded", "precision=bf16", *extra))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)
    assert {tensor.dtype for name, tensor in weights(folder).items() if "position" not in name} == {torch.float32}


@pytest.mark.slow
def test_two_processes_equal_one_with_the_whole_batch(settings, tmp_path):
    extra = ("epochs=2", "lr=1e-2", "mixup_alpha=0", *STEADY)
    alone, losses = run(settings("name=alone", f"split_file={tmp_path / 'split.json'}", *extra))
    config = settings("name=both", f"split_file={tmp_path / 'split.json'}", "chunk_size=2", *extra)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    run_two_processes(tmp_path / "config.json", tmp_path / "losses.json")
    told = json.loads((tmp_path / "losses.json").read_text())
    steps = [loss for place, loss in enumerate(told, start=1) if place % 4]  # three steps, then the epoch's mean
    assert steps == pytest.approx(losses, rel=1e-4)
    for name, tensor in weights(alone).items():
        assert torch.allclose(tensor, weights(run_folder(config))[name], atol=2e-5), name


def run_two_processes(*arguments: Path) -> None:
    """Start two processes as `accelerate launch` does, on the CPU, and wait for both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).with_name("two_processes.py")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    places = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            env={
                **os.environ,
                **shared,
                "RANK": rank,
                "LOCAL_RANK": rank,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": places,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][-2000:] + outputs[1][-2000:]


def test_early_stopping_keeps_the_best_tower(settings, monkeypatch):
    validation, epochs, towers = iter((2.0, 1.0, 1.5, 1.2, 0.5)), [], []
    monkeypatch.setattr(Trainer, "validation_loss", lambda _trainer: next(validation))
    config = settings("epochs=5", "patience=2")

    def note(event):
        if isinstance(event, EpochDone):
            epochs.append(event)
            towers.append(weights(run_folder(config)))

    folder = pretrain(config, device="cpu", on_event=note)
    assert [event.is_best for event in epochs] == [True, True, False, False]  # the fifth epoch is not begun
    assert json.loads((folder / "run.json").read_text())["best_val_loss"] == 1.0
    same = [all(torch.equal(weights(folder)[name], tower[name]) for name in tower) for tower in towers]
    assert same == [False, True, True, True]  # written after the second, and not again


def test_temperature_and_loss_are_logged(settings):
    folder, losses = run(settings("epochs=2", "temperature=0.05"))
    rows = read_log(folder / "log.csv")
    assert [float(row["loss"]) for row in rows if row["loss"]] == losses
    assert float(rows[0]["temperature"]) == pytest.approx(0.05, rel=0.02)
    assert all(float(row["pairs_per_second"]) > 0 for row in rows if row["loss"])
    assert sum(bool(row["val_loss"]) for row in rows) == 2


def test_tensorboard_gets_what_the_log_holds(settings, monkeypatch):
    written = []

    class Board:
        def __init__(self, folder, purge_step=None):
            written.append(("folder", Path(folder).name, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Board))
    _, losses = run(settings("epochs=2", "log=tensorboard"))
    assert written[0] == ("folder", "tensorboard", None)
    assert [entry for entry in written if entry[0] == "loss"] == [("loss", loss, n) for n, loss in enumerate(losses, 1)]
    assert [step for name, _, step in written[1:-1] if name == "val_loss"] == [3, 6]
    assert written[-1] == "closed"


def test_a_temperature_at_its_limit_can_leave_it_again():
    from fmclip.contrastive.config import load_config
    from fmclip.contrastive.step import contrastive_loss

    config = load_config("mini-align", ["start=tiny", "train_image=all", "train_text=all", "temperature=0.001"])
    model = PairModel(config.model, config.optimisation)
    assert model.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)
    image, text = torch.eye(4), torch.eye(4).roll(1, dims=0)  # all wrong: a lower scale would be better
    contrastive_loss(model, image, text, torch.arange(4), config.optimisation).backward()
    assert model.logit_scale.grad.item() > 0
    with torch.no_grad():
        model.logit_scale.add_(3)
    model.limit_temperature()
    assert model.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells of a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu"])
def test_a_device_that_is_not_there_is_refused(settings, device):
    with pytest.raises(PairError, match=r"There is no (device )?'?(cuda|gpu)"):
        pretrain(settings(), device=device)


def test_a_batch_that_does_not_divide_is_refused(settings, monkeypatch):
    from fmclip.contrastive import runs

    class Three:
        num_processes, process_index, is_main_process = 3, 0, True
        device = torch.device("cpu")

        def main_process_first(self):
            import contextlib

            return contextlib.nullcontext()

    monkeypatch.setattr(runs, "make_accelerator", lambda *_: Three())
    with pytest.raises(PairError, match="multiple of the 3 processes"):
        pretrain(settings("batch_size=8"), device="cpu")


def test_a_loss_that_is_no_number_ends_the_run(settings):
    with pytest.raises(PairError, match="no longer a number"):
        pretrain(settings("lr=1e30", "warmup_epochs=0", "grad_clip=0", "epochs=3"), device="cpu")
