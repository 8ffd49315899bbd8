"""What makes training fast on a GPU gives, where it can be run without one, what the plain way gives."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from detector_scans import normal_scan
from torch.utils._python_dispatch import TorchDispatchMode

from fmclip.acceleration import Acceleration
from fmclip.detectors import FusionMedCLIP, FusionMedCLIPConfig, Notice, PatchMemory, Ready, Step, training
from fmclip.detectors import fusionmedclip as module
from fmclip.detectors.step import TrainingStep, adamw
from fmclip.detectors.training import STAGE2, STAGE3, SYNTHESIS, count_steps
from fmclip.errors import Stopped
from fmclip.towers import get_tower

CONFIG = FusionMedCLIPConfig(stage2_epochs=4, stage3_epochs=4, pool_size=12, batch_size=4)
WITHOUT_DROPOUT = FusionMedCLIPConfig(
    stage2_epochs=4, stage3_epochs=8, pool_size=12, batch_size=4, lora_dropout=0.0, block_dropout=0.0, lora_lr=1e-3
)
MAP_BOUND = 0.02  # of the full range, between float32 and bfloat16
TRAINED_BOUND = 0.05  # the same after 8 steps of stage 3 with thirty times the learning rate of LoRA
NORMALS = [normal_scan(seed) for seed in range(4)]
QUERIES = [normal_scan(seed) for seed in range(20, 23)]


def fitted(how: Acceleration, config=CONFIG, tower=None, on_event=None) -> FusionMedCLIP:
    detector = FusionMedCLIP(tower or get_tower("tiny"), config)
    detector.acceleration = how
    return detector.fit(NORMALS, on_event=on_event)


def apart(one, other) -> float:
    pairs = zip(one.predict(QUERIES), other.predict(QUERIES), strict=True)
    return max(float(np.abs(first.map - second.map).max()) for first, second in pairs)


def test_static_steps_are_the_steps_of_the_plain_loop():
    plain, static = fitted(Acceleration()), fitted(Acceleration(static_steps=True))
    state = static.state()
    for name, value in plain.state().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0, msg=name)


def test_a_pool_painted_on_the_device_teaches_the_same():
    assert apart(fitted(Acceleration()), fitted(Acceleration(on_device=True))) < 0.005


def test_painting_on_the_device_says_how_far_it_is_and_hears_a_stop_in_between():
    painted = []

    def listen(event) -> None:
        if isinstance(event, Step) and event.stage == SYNTHESIS:
            painted.append((event.step, event.steps))
            if event.step == stop_at:
                raise Stopped

    longer, stop_at = replace(CONFIG, pool_size=72, stage2_epochs=1, stage3_epochs=0), 0
    fitted(Acceleration(on_device=True), longer, on_event=listen)
    assert painted == [(32, 72), (64, 72), (72, 72)]
    painted, stop_at = [], 32
    detector = fitted(Acceleration(on_device=True), longer, on_event=listen)
    assert painted == [(32, 72)]
    assert detector.network_ is None
    assert len(detector.predict(QUERIES)) == len(QUERIES)


def test_halves_of_a_batch_and_frozen_norms_on_a_cpu_teach_the_same():
    config, tower = replace(WITHOUT_DROPOUT, lora_depth=0.5), get_tower("tiny-resnet")
    how = Acceleration.of(tower.device)
    assert how.parts == 2
    plain, halves = fitted(Acceleration(), config, tower), fitted(how, config, tower)
    assert any(float(value.abs().max()) > 1e-3 for name, value in halves.state().items() if name.endswith("lora_B"))
    assert apart(plain, halves) < 0.005


@pytest.mark.parametrize("how", [Acceleration(parts=2), Acceleration(parts=4, checkpointing=True)])
def test_smaller_parts_and_checkpointing_learn_what_whole_batches_learn(how):
    plain, frugal = fitted(Acceleration(), WITHOUT_DROPOUT), fitted(how, WITHOUT_DROPOUT)
    assert plain.network_.lora_state
    for name, value in plain.network_.lora_state.items():
        torch.testing.assert_close(frugal.network_.lora_state[name], value, rtol=0, atol=2e-4, msg=name)
    assert apart(plain, frugal) < 0.005


def test_bfloat16_gives_the_maps_of_float32_within_the_bound():
    tower = get_tower("tiny")
    half = tower.with_bf16(True)
    exact, rounded = tower.features(to_square(QUERIES, tower)), half.features(to_square(QUERIES, tower))
    for one, other in zip(exact, rounded, strict=True):
        assert other.dtype == torch.float32
        assert not torch.equal(one, other)
        assert (one - other).norm() < 0.01 * one.norm()
    memory = [PatchMemory(own).fit(NORMALS) for own in (tower, half)]
    assert 0 < apart(*memory) < MAP_BOUND


def test_training_in_bfloat16_keeps_float32_masters_and_the_maps_within_the_bound():
    tower = get_tower("tiny")
    plain = fitted(Acceleration(), WITHOUT_DROPOUT)
    half = fitted(Acceleration(), WITHOUT_DROPOUT, tower.with_bf16(True))
    assert {value.dtype for value in half.network_.lora_state.values()} == {torch.float32}
    assert {value.dtype for value in half.network_.state_dict().values()} == {torch.float32}
    assert all(weight.dtype == torch.float32 for weight in half.adapted_.model.visual.parameters())
    assert 0 < apart(plain, half) < TRAINED_BOUND


def test_the_backward_pass_ends_at_the_first_block_with_lora():
    tower = get_tower("tiny")
    adapted = tower.with_layers(tower.all_layers).with_lora(4, generator=torch.Generator(), depth=0.5)
    levels = adapted.features(to_square(QUERIES, tower))
    assert [level.requires_grad for level in levels] == [False, False, True, True]


class TF32(TorchDispatchMode):
    """Products of float32 numbers as a GPU makes them with TF32: 10 bits behind the point go in, float32 comes out."""

    rounded = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"):
            args = torch.utils._pytree.tree_map_only(torch.Tensor, self._round, args)
        return func(*args, **(kwargs or {}))

    def _round(self, value):
        if value.dtype != torch.float32:
            return value
        self.rounded += 1
        return ((value.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_steps_with_tf32_teach_the_same_within_the_bound(monkeypatch):
    plain, run, mode = fitted(Acceleration(), WITHOUT_DROPOUT), TrainingStep._run, TF32()

    def rounding(self, rows):
        with mode:
            return run(self, rows)

    monkeypatch.setattr(TrainingStep, "_run", rounding)
    with_tf32 = fitted(Acceleration(), WITHOUT_DROPOUT)
    assert mode.rounded > 1000
    assert 0 < apart(plain, with_tf32) < MAP_BOUND


def test_later_looks_along_the_first_axes_teach_the_same_within_the_bound(monkeypatch):
    monkeypatch.setattr(training, "MEMORY_REFRESH", 2)
    plain, kept = (fitted(Acceleration(keeps_axes=on), WITHOUT_DROPOUT) for on in (False, True))
    assert 0 < apart(plain, kept) < TRAINED_BOUND


def test_the_prompts_are_embedded_once_a_step(monkeypatch):
    tower, steps = get_tower("tiny"), []
    embed, lengths = type(tower).embed_prompts, []

    def count(self, prompts):
        lengths.append(len(prompts))
        return embed(self, prompts)

    def listen(event) -> None:
        if isinstance(event, Step) and event.stage in (STAGE2, STAGE3):
            steps.append(len(lengths))

    monkeypatch.setattr(type(tower), "embed_prompts", count)
    fitted(Acceleration(), CONFIG, on_event=listen)
    stage2 = steps[:4]
    assert [after - before for before, after in itertools.pairwise(stage2)] == [1, 1, 1]
    assert set(lengths) == {2}  # normal and abnormal


def test_a_gpu_gets_the_fast_path_by_itself(monkeypatch):
    how = Acceleration.of(torch.device("cuda"))
    assert (how.on_device, how.static_steps, how.keeps_axes) == (True, True, True)
    assert Acceleration.of(torch.device("cpu")) == Acceleration(parts=2)
    seen = []
    monkeypatch.setattr(Acceleration, "of", classmethod(lambda cls, device: seen.append(device) or Acceleration()))
    FusionMedCLIP(get_tower("tiny"), CONFIG).fit(NORMALS)
    assert seen == [torch.device("cpu")]


def to_square(scans, tower):
    from fmclip.detectors.base import to_pixels

    return to_pixels(scans, tower)[0]


def test_larger_batches_see_as_many_scans():
    for batch in (8, 16, 32):
        assert batch * count_steps(16, 200, batch) == 3200


def test_a_step_counts_a_batch_once_however_it_is_cut():
    def losses(parts: int, is_static: bool) -> tuple[list[float], torch.Tensor]:
        weight = torch.nn.Parameter(torch.ones(3))
        data = torch.arange(30.0).view(10, 3) / 30
        optimiser = adamw([{"params": [weight], "lr": 0.1}], 0.0, weight.device)
        step = TrainingStep(
            lambda rows, doubled: ((data[rows] * doubled).sum(dim=1) ** 2 + weight.sum()).mean(),
            optimiser,
            weight.device,
            is_static=is_static,
            parts=parts,
            shared=lambda: calls.append(parts) or 2 * weight,
        )
        batches = torch.randperm(10, generator=torch.Generator().manual_seed(0)).view(2, 5)
        return [float(step(rows)) for rows in batches], weight.detach()

    calls: list[int] = []
    expected, weight = losses(1, False)
    for parts, is_static in ((1, True), (2, False), (3, True)):
        found, other = losses(parts, is_static)
        assert found == pytest.approx(expected)
        torch.testing.assert_close(other, weight)
    assert calls == [1, 1, 1, 1, 2, 2, 3, 3]  # once a step, however many parts there are


class Full:
    """A device that is out of memory as long as a condition holds."""

    def __init__(self, monkeypatch, is_full) -> None:
        self.tried: list[Acceleration] = []
        train = module.train_stage3

        def short(*arguments):
            *_, how = arguments
            self.tried.append(how)
            if is_full(how, len(self.tried)):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return train(*arguments)

        monkeypatch.setattr(module, "train_stage3", short)


def test_without_memory_for_whole_batches_training_goes_on_in_parts_and_says_so(monkeypatch):
    full, events = Full(monkeypatch, lambda how, _: how.parts < 4), []
    detector = fitted(Acceleration(), WITHOUT_DROPOUT, on_event=events.append)
    assert [how.parts for how in full.tried] == [1, 2, 4]
    texts = [event.text for event in events if isinstance(event, Notice)]
    assert len(texts) == 2
    assert "batches in 4 parts" in texts[-1]
    monkeypatch.undo()
    assert apart(detector, fitted(Acceleration(), WITHOUT_DROPOUT)) < 0.005


def test_checkpointing_comes_after_the_smallest_parts(monkeypatch):
    full = Full(monkeypatch, lambda how, _: not how.checkpointing)
    assert fitted(Acceleration()).network_.lora_state
    assert full.tried[-1] == Acceleration(parts=4, keeps_frozen=False, checkpointing=True)


def test_where_nothing_fits_stage_2_is_kept_and_answers(monkeypatch):
    Full(monkeypatch, lambda how, _: True)
    events = []
    detector = fitted(Acceleration(), on_event=events.append)
    assert [event.stage for event in events if isinstance(event, Ready)] == ["patch memory", "stage 2"]
    assert "stage 2 is kept" in [event.text for event in events if isinstance(event, Notice)][-1]
    monkeypatch.undo()
    short = FusionMedCLIPConfig(stage2_epochs=4, stage3_epochs=0, pool_size=12, batch_size=4)
    assert apart(detector, fitted(Acceleration(), short)) == 0


def test_a_shortage_in_the_middle_goes_on_from_the_last_kept_step(monkeypatch):
    monkeypatch.setattr(training, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(training, "KEEP_SHARE", 1e9)
    run = TrainingStep._run

    def short(self, rows):
        if self._parts == 1 and len(steps) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, rows)

    steps: list[int] = []

    def listen(event) -> None:
        if isinstance(event, Step) and event.stage == STAGE3:
            steps.append(event.step)

    monkeypatch.setattr(TrainingStep, "_run", short)
    fitted(Acceleration(), WITHOUT_DROPOUT, on_event=listen)
    assert steps == list(range(1, 9))


def test_what_a_failed_attempt_has_half_trained_does_not_reach_the_next_one(monkeypatch):
    monkeypatch.setattr(training, "KEEP_SECONDS", 1e9)  # nothing is kept before the shortage
    expected = fitted(Acceleration(parts=2), CONFIG)
    run, taken = TrainingStep._run, []

    def short(self, rows):
        taken.append(self._parts)
        if self._parts == 1 and len(taken) == 8:  # the last of 4 steps of stage 3, after as many of stage 2
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, rows)

    monkeypatch.setattr(TrainingStep, "_run", short)
    found = fitted(Acceleration(), CONFIG)
    assert taken == [1] * 8 + [2] * 4
    state = found.state()
    for name, value in expected.state().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0, msg=name)
    assert apart(found, expected) == 0


def test_other_errors_are_not_taken_for_a_shortage(monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(module, "train_stage3", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        fitted(Acceleration())
