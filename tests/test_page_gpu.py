"""On a host that lends its GPU each call runs in a forked process: what goes over, what comes back, and Stop."""

import os
import pickle
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from forked_gpu import fake_spaces

from fmclip import learning, shortage
from fmclip.acceleration import Acceleration
from fmclip.background import Ended, StopSignal, Turns
from fmclip.detectors import DETECTORS, PatchMemory, StageStarted, Step, Training
from fmclip.detectors import fusionmedclip as fusion
from fmclip.detectors.training import STAGE2, STAGE3
from fmclip.errors import FmclipError
from fmclip.job import Job
from fmclip.page import gpu
from fmclip.page.notes import outcome
from fmclip.regions import NormalRegion
from fmclip.scans import Scan
from fmclip.self_check import BUDGET_SECONDS
from fmclip.session import Adapted, Preview, Progress, Session


def make_scans(seed: int, count: int) -> list[Scan]:
    rng = np.random.default_rng(seed)
    return [Scan(rng.random((64, 64), dtype=np.float32), f"scan {place + 1}") for place in range(count)]


@pytest.fixture
def asked(monkeypatch):
    """A host that lends its GPU; what its calls asked for."""
    seconds: list[int] = []
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    monkeypatch.setitem(sys.modules, "spaces", fake_spaces(seconds))
    monkeypatch.setitem(fusion.PRESETS, "fast", {"stage2_epochs": 4, "stage3_epochs": 0, "pool_size": 8})
    return seconds


@pytest.fixture
def session(asked) -> Session:
    return gpu.session_maker("tiny", "cpu")()


class Endless(PatchMemory):
    """Good at once, then takes steps until it is stopped; each step tells the process it runs in."""

    name = "endless"

    def fit(self, normals, abnormals=None, *, on_event=None):
        super().fit(normals, on_event=on_event)
        on_event(StageStarted(f"process {os.getpid()}", 10**9))
        step, pause = 0, threading.Event()
        while True:
            step += 1
            on_event(Step(f"process {os.getpid()}", step, 10**9, 0.5))
            pause.wait(0.01)


def test_a_fit_in_another_process_gives_the_maps_that_it_gives_here(session, asked):
    queries, here = make_scans(9, 10), Session("tiny", "cpu")
    events = list(session.adapt(make_scans(1, 4), preset="fast", preview_queries=queries))
    list(here.adapt(make_scans(1, 4), preset="fast"))
    shown = [finding for event in events if isinstance(event, Preview) for finding in event.findings][-10:]
    for first, second, third in zip(here.query(queries), session.query(queries), shown, strict=True):
        np.testing.assert_array_equal(first.map, second.map)
        np.testing.assert_array_equal(first.map, third.map)
    assert [finding.scan for finding in shown] == queries
    assert len(asked) == 2


def test_stop_reaches_the_other_process_and_keeps_what_it_has_learned(session, monkeypatch):
    monkeypatch.setitem(DETECTORS, "endless", Endless)
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 60)  # this process is patient: the other one has to end
    queries, pressed, elsewhere = make_scans(9, 3), 0.0, ""
    for event in session.adapt(make_scans(1, 4), method="endless", preview_queries=queries):
        if isinstance(event, Progress) and event.step > 1 and not pressed:
            elsewhere, pressed = event.stage, time.monotonic()
            session.stop()
    assert time.monotonic() - pressed < 2
    assert elsewhere != f"process {os.getpid()}"
    assert isinstance(event, Adapted)
    assert event.stopped
    assert event.stage == "patch memory"
    assert len(session.query(queries)) == 3


def test_an_error_over_there_keeps_its_words(session, monkeypatch):
    class Failing(PatchMemory):
        name = "failing"

        def fit(self, normals, abnormals=None, *, on_event=None):
            raise FmclipError("this went wrong") if len(normals) == 4 else OSError("/home/someone/scan.png")

    monkeypatch.setitem(DETECTORS, "failing", Failing)
    with pytest.raises(FmclipError, match="this went wrong"):
        list(session.adapt(make_scans(1, 4), method="failing"))
    with pytest.raises(FmclipError, match="unexpected") as unexpected:
        list(session.adapt(make_scans(1, 5), method="failing"))
    assert "someone" not in str(unexpected.value)
    assert not session.is_adapting


def test_a_region_that_is_called_normal_there_joins_as_it_does_here(session, asked):
    here, odd = Session("tiny", "cpu"), make_scans(9, 1)[0]
    mask = np.zeros((64, 64), bool)
    mask[8:40, 8:40] = True
    for one in (here, session):
        list(one.adapt(make_scans(1, 4), method="patch_memory"))
    before = here.query([odd])[0].map
    asked.clear()
    for one in (here, session):
        one.mark_normal([NormalRegion(odd, mask)])
    assert len(asked) == 1
    assert here.query([odd])[0].map.mean() < before.mean()
    np.testing.assert_array_equal(session.query([odd])[0].map, here.query([odd])[0].map)
    list(session.adapt(make_scans(1, 4), method="cosine"))
    with pytest.raises(FmclipError, match="mark the whole scan"):
        session.mark_normal([NormalRegion(odd, mask)])


def test_a_gpu_that_is_not_lent_says_so(session, monkeypatch):
    def take_back(job, stop):
        raise TimeoutError

    monkeypatch.setattr(gpu, "learn", take_back)
    monkeypatch.setattr(gpu, "_portable", lambda error: error / 0)  # the host's own error, not one of ours
    with pytest.raises(FmclipError, match="did not lend its GPU"):
        list(session.adapt(make_scans(1, 4), method="patch_memory"))


def test_adapters_are_saved_and_loaded_without_asking_for_the_gpu(session, asked, tmp_path):
    list(session.adapt(make_scans(1, 4), method="patch_memory"))
    asked.clear()
    session.save(tmp_path / "adapter.safetensors")
    session.load(tmp_path / "adapter.safetensors")
    assert asked == []
    assert session.device == "cpu"


def test_more_references_longer_presets_and_queries_ask_for_more_time():
    job = Job("tiny", "cpu", "fusionmedclip", "fast", "scan", 0, make_scans(1, 4))
    longer = [
        replace(job, normals=make_scans(1, 16)),
        replace(job, normals=make_scans(1, 16), preset="full"),
        replace(job, normals=make_scans(1, 16), preset="paper"),
        replace(job, normals=make_scans(1, 16), preset="paper", queries=make_scans(9, 20)),
    ]
    seconds = [gpu.learn_seconds("cuda", one) for one in [job, *longer]]
    assert seconds == sorted(set(seconds))
    assert seconds[0] < 60


def test_more_steps_and_what_is_left_of_a_training_ask_for_their_own_time(asked):
    state = {}, {}, torch.empty(0), torch.empty(0)
    job = Job("tiny", "cpu", "fusionmedclip", "full", "scan", 0, make_scans(1, 32))
    nearly_over = replace(job, start=Training(STAGE3, 70, 80, True, *state))
    over = replace(job, start=Training(STAGE3, 80, 80, True, *state))
    longer = replace(over, times=8)
    whole, little, much = (gpu.learn_seconds("cuda", one) for one in (job, nearly_over, longer))
    assert little < whole < much
    assert gpu.learn_seconds("cuda", replace(job, method="patch_memory")) > BUDGET_SECONDS


@pytest.fixture
def fast_path(monkeypatch):
    """As if the device liked static steps and painted the anomalies; both run on a CPU too."""
    how = Acceleration(on_device=True, static_steps=True)
    monkeypatch.setattr(Acceleration, "of", classmethod(lambda cls, device: how))


def test_stop_reaches_a_training_with_static_steps_and_its_state_comes_back(session, monkeypatch, fast_path):
    endless = {"stage2_epochs": 10**4, "stage3_epochs": 0, "pool_size": 8, "batch_size": 4}
    monkeypatch.setitem(fusion.PRESETS, "fast", endless)
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 60)
    for event in session.adapt(make_scans(1, 4), preset="fast"):
        if isinstance(event, Progress) and event.stage == STAGE2 and event.step > 2:
            session.stop()
    assert isinstance(event, Adapted)
    assert event.stopped
    assert event.stage == "patch memory"
    training = session.unfinished.training
    assert training.stage == STAGE2
    assert 2 < training.step < training.steps


def test_a_shortage_of_memory_over_there_is_told_here(session, monkeypatch, fast_path):
    short = {"stage2_epochs": 2, "stage3_epochs": 2, "pool_size": 8, "batch_size": 4}
    monkeypatch.setitem(fusion.PRESETS, "fast", short)
    train = fusion.train_stage3

    def full(*arguments):
        if arguments[-1].parts < 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return train(*arguments)

    monkeypatch.setattr(fusion, "train_stage3", full)
    events = list(session.adapt(make_scans(1, 4), preset="fast"))
    assert events[-1].stage == "stage 3"
    (notice,) = events[-1].notices
    assert "batches in 2 parts" in notice
    assert notice in [event.message for event in events if isinstance(event, Progress)]
    assert notice in outcome(None, replace(events[-1], stopped=True))


def test_a_gpu_that_holds_no_fit_at_all_hands_it_to_the_processor(session, asked, monkeypatch, fast_path):
    here = Session("tiny", "cpu")
    list(here.adapt(make_scans(1, 4), method="patch_memory"))
    fit, page = PatchMemory.fit, os.getpid()

    def full(self, *arguments, **named):
        if os.getpid() != page:  # lent for the time that a GPU needs, which a processor would overdraw
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return fit(self, *arguments, **named)

    monkeypatch.setattr(PatchMemory, "fit", full)
    monkeypatch.setattr(shortage, "is_on_gpu", lambda tower: True)
    events = list(session.adapt(make_scans(1, 4), method="patch_memory"))
    assert events[-1].notices == (shortage.ON_CPU,)
    assert len(asked) == 1
    query = make_scans(9, 1)
    np.testing.assert_array_equal(session.query(query)[0].map, here.query(query)[0].map)


def test_what_is_lent_can_be_named_in_another_process_and_the_page_itself_leaves_the_gpu_alone(session, monkeypatch):
    for task in (gpu._learn_there, gpu._answer_there, gpu._extend_there):
        assert pickle.loads(pickle.dumps(task)) is task

    def touched():
        raise AssertionError("a process that forks later must not start CUDA")

    monkeypatch.setattr(torch.cuda, "_lazy_init", touched)
    list(session.adapt(make_scans(1, 4), preset="fast"))
    session.query(make_scans(9, 1))


def test_what_the_page_itself_has_built_and_who_waits_there_stay_there(session, monkeypatch):
    """The page's own detectors lie on the CPU around a tower that the other process moves away."""
    list(session.adapt(make_scans(1, 4), method="patch_memory"))
    query = make_scans(9, 1)
    expected = session.query(query)[0].map
    session.attention(query[0])  # builds the detector here, and keeps it
    page, build = os.getpid(), learning.Adapter.build

    def build_there(self, *where):
        if os.getpid() != page:
            raise FmclipError("built anew")
        return build(self, *where)

    monkeypatch.setattr(learning.Adapter, "build", build_there)
    with pytest.raises(FmclipError, match="built anew"):
        session.query(query)
    monkeypatch.undo()
    turns = learning._turns.setdefault("cpu", Turns())
    with turns.taken(lambda event: None, Ended(StopSignal())):  # as another visitor's fit that the GPU could not hold
        again = list(session.adapt(make_scans(1, 4), method="patch_memory"))
        with learning._keeping:
            found = session.query(query)[0].map
    np.testing.assert_array_equal(found, expected)
    assert isinstance(again[-1], Adapted)


def test_elsewhere_nothing_is_forked():
    events = list(gpu.session_maker("tiny", "cpu")().adapt(make_scans(1, 4), method="patch_memory"))
    assert isinstance(events[-1], Adapted)
