"""One visitor's session: previews, Stop, isolation, and what happens when something is missing."""

import threading
import time

import numpy as np
import pytest

from fmclip.detectors import DETECTORS, PatchMemory, StageStarted, Step
from fmclip.detectors import fusionmedclip as fusion
from fmclip.errors import CheckpointError, FmclipError, NotFittedError, ReferenceSetError, TowerError
from fmclip.scans import Scan
from fmclip.session import Adapted, Preview, Progress, Session

SIDE = 64


def make_scans(seed: int, count: int, *, lesion: bool = False) -> list[Scan]:
    """Discs with noise; with a patch of coarse noise if they are to be abnormal."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    scans = []
    for place in range(count):
        pixels = 0.5 * (np.hypot(rows - 32, columns - 32) < 26 + rng.uniform(-0.5, 0.5)) + rng.uniform(
            0, 0.1, (SIDE, SIDE)
        )
        if lesion:
            pixels[16:40, 24:48] = rng.uniform(0, 1, (24, 24))
        scans.append(Scan(pixels.astype(np.float32), f"scan {place + 1}"))
    return scans


@pytest.fixture(autouse=True)
def _short_training(monkeypatch):
    """All three stages, a few steps each."""
    monkeypatch.setitem(fusion.PRESETS, "fast", {"stage2_epochs": 4, "stage3_epochs": 0, "pool_size": 8})
    monkeypatch.setitem(fusion.PRESETS, "full", {"stage2_epochs": 4, "stage3_epochs": 4, "pool_size": 8})


class Gate:
    """Lets a test decide when a detector goes on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()


@pytest.fixture
def gated(monkeypatch):
    """A patch memory that waits at a gate, before anything is ready, then takes steps until it is stopped."""
    gate = Gate()

    class Gated(PatchMemory):
        name = "gated"

        def fit(self, normals, abnormals=None, *, on_event=None):
            on_event(StageStarted("waiting at the gate", 1))
            gate.reached.set()
            gate.opened.wait(timeout=20)
            on_event(Step("waiting at the gate", 1, 1, 0.5))
            return super().fit(normals, on_event=on_event)

    monkeypatch.setitem(DETECTORS, "gated", Gated)
    yield gate
    gate.opened.set()


def adapted(normals, *, preset="fast", seed=0, **options) -> Session:
    session = Session("tiny", "cpu")
    list(session.adapt(normals, preset=preset, seed=seed, **options))
    return session


def test_adapting_shows_first_answers_and_refines_them_to_what_query_then_says():
    session, queries = Session("tiny", "cpu"), make_scans(9, 2, lesion=True)
    events = list(session.adapt(make_scans(1, 4), preset="full", preview_queries=queries))
    previews = [event for event in events if isinstance(event, Preview)]
    assert [preview.stage for preview in previews] == ["patch memory", "stage 2", "stage 3"]
    assert isinstance(events[-1], Adapted)
    assert not events[-1].stopped
    for shown, asked in zip(previews[-1].findings, session.query(queries), strict=True):
        np.testing.assert_array_equal(shown.map, asked.map)
        assert shown.score == asked.score


def test_progress_counts_up_and_keeps_every_training_loss():
    events = list(Session("tiny", "cpu").adapt(make_scans(1, 4), preset="fast"))
    last = [event for event in events if isinstance(event, Progress)][-1]
    assert last.step == last.steps > 0
    assert len(last.loss_curve) == last.steps
    assert all(np.isfinite(loss) for _, loss in last.loss_curve)
    assert f"step {last.step} of {last.steps}" in last.message


def test_a_finding_is_worded_and_its_map_lies_on_the_scan():
    session = adapted(make_scans(1, 4), method="patch_memory")
    finding = session.query(make_scans(9, 1, lesion=True))[0]
    assert finding.is_abnormal
    assert finding.verdict == "deviates"
    assert finding.rank == "higher than all 4 reference scans"
    assert finding.map.shape == (SIDE, SIDE)
    assert len(finding.reference_scores) == 4


def test_two_visitors_in_turns_get_the_maps_that_each_gets_alone():
    sets = [make_scans(1, 4), make_scans(2, 4)]
    queries = make_scans(9, 2, lesion=True)
    alone = [adapted(normals, preset="full", seed=seed).query(queries) for seed, normals in enumerate(sets)]
    together: dict[int, list] = {}

    def visit(seed: int) -> None:
        session = Session("tiny", "cpu")
        for _ in session.adapt(sets[seed], preset="full", seed=seed, preview_queries=queries):
            if session.is_adapted:
                session.query(queries[:1])
        together[seed] = session.query(queries)

    threads = [threading.Thread(target=visit, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(2):
        for first, second in zip(alone[seed], together[seed], strict=True):
            np.testing.assert_array_equal(first.map, second.map)
            assert first.score == second.score


def test_a_second_visitor_is_told_to_wait_while_queries_of_others_are_answered(gated):
    first, second, third = Session("tiny", "cpu"), Session("tiny", "cpu"), adapted(make_scans(1, 4))
    running = threading.Thread(target=lambda: list(first.adapt(make_scans(1, 4), method="gated")))
    running.start()
    assert gated.reached.wait(timeout=20)
    waiting = second.adapt(make_scans(2, 4), preset="fast")
    assert "place 2 of 2" in next(waiting).message
    assert len(third.query(make_scans(9, 1))) == 1
    later = third.adapt(make_scans(3, 4), preset="fast")
    assert "place 3 of 3" in next(later).message
    assert "place 2 of 3" in next(waiting).message
    gated.opened.set()
    assert isinstance(list(waiting)[-1], Adapted)
    assert isinstance(list(later)[-1], Adapted)
    running.join()


def test_a_second_visitor_is_answered_and_done_while_the_fit_of_the_first_goes_on(gated, monkeypatch):
    class Endless(PatchMemory):
        name = "endless"

        def fit(self, normals, abnormals=None, *, on_event=None):
            gated.reached.set()
            step = 0
            while not gated.opened.wait(timeout=0.001):
                on_event(Step("endless", step := step + 1, 10**9, 0.5))
            return super().fit(normals, on_event=on_event)

    monkeypatch.setitem(DETECTORS, "endless", Endless)
    first, second, queries = Session("tiny", "cpu"), Session("tiny", "cpu"), make_scans(9, 2)
    running = threading.Thread(target=lambda: list(first.adapt(make_scans(1, 4), method="endless")))
    running.start()
    assert gated.reached.wait(timeout=20)
    events = list(second.adapt(make_scans(2, 4), preset="fast", preview_queries=queries))
    assert any("taking turns with another training" in getattr(event, "message", "") for event in events)
    assert [event.stage for event in events if isinstance(event, Preview)] == ["patch memory", "stage 2"]
    assert first.is_adapting
    assert not first.is_adapted
    gated.opened.set()
    running.join()
    assert first.is_adapted


def test_stop_is_quick_and_keeps_the_state_while_many_queries_are_being_mapped(gated, monkeypatch):
    class SlowToMap(PatchMemory):
        name = "slow to map"

        def predict(self, scans):
            gated.reached.set()
            gated.opened.wait(timeout=20)
            return super().predict(scans)

    monkeypatch.setitem(DETECTORS, "slow to map", SlowToMap)
    session, queries = Session("tiny", "cpu"), make_scans(9, 40)
    events, ends = session.adapt(make_scans(1, 4), method="slow to map", preview_queries=queries), []
    running = threading.Thread(target=lambda: ends.append(list(events)[-1]))
    running.start()
    assert gated.reached.wait(timeout=20)
    pressed = time.monotonic()
    session.stop()
    running.join()
    assert time.monotonic() - pressed < 2
    assert ends[0].stopped
    assert ends[0].stage == "patch memory"
    gated.opened.set()
    assert len(session.query(queries[:2])) == 2


def test_many_queries_are_previewed_a_few_at_a_time_and_all_of_them():
    session, queries = Session("tiny", "cpu"), make_scans(9, 20)
    events = session.adapt(make_scans(1, 4), method="patch_memory", preview_queries=queries)
    found = [event.findings for event in events if isinstance(event, Preview)]
    assert [len(part) for part in found] == [8, 8, 4]
    assert [finding.scan for part in found for finding in part] == queries


def test_an_adapter_is_not_loaded_in_the_middle_of_a_fit(gated, tmp_path):
    adapted(make_scans(1, 4)).save(tmp_path / "adapter.safetensors")
    session = Session("tiny", "cpu")
    events = session.adapt(make_scans(1, 4), method="gated")
    next(events)
    with pytest.raises(FmclipError, match="press Stop before you load"):
        session.load(tmp_path / "adapter.safetensors")
    gated.opened.set()
    list(events)
    session.load(tmp_path / "adapter.safetensors")
    assert session.is_adapted
    assert not session.is_adapting


def test_the_adapter_remembers_the_window_of_its_references_in_its_file_too(tmp_path):
    session, other = adapted(make_scans(1, 4), window="lung"), Session("tiny", "cpu")
    session.save(tmp_path / "adapter.safetensors")
    other.load(tmp_path / "adapter.safetensors")
    assert session.window == other.window == "lung"
    adapted(make_scans(1, 4)).save(tmp_path / "adapter.safetensors")
    other.load(tmp_path / "adapter.safetensors")
    assert other.window is None


def test_whatever_keeps_a_tower_from_loading_is_worded_without_its_text(monkeypatch):
    def fail(name, device):
        raise OSError("/home/someone/weights is not there")

    monkeypatch.setattr("fmclip.towers.get_tower", fail)
    with pytest.raises(TowerError, match="could not be loaded") as refused:
        list(Session("tiny", "cpu").adapt(make_scans(1, 4)))
    assert "someone" not in str(refused.value)


@pytest.mark.parametrize("is_stuck", [False, True])
def test_stop_before_anything_is_ready_keeps_the_former_adapter_and_is_quick(gated, is_stuck):
    session, queries = adapted(make_scans(1, 4)), make_scans(9, 2)
    before, events = session.query(queries), session.adapt(make_scans(2, 4), method="gated")
    next(events)
    assert gated.reached.wait(timeout=20)
    pressed = time.monotonic()
    session.stop()
    if not is_stuck:
        gated.opened.set()
    end = list(events)[-1]
    assert time.monotonic() - pressed < 2
    assert end.stopped
    for first, second in zip(before, session.query(queries), strict=True):
        np.testing.assert_array_equal(first.map, second.map)
    assert not session.is_adapting


def test_stop_keeps_the_last_good_state():
    session, queries = Session("tiny", "cpu"), make_scans(9, 2)
    first = None
    for event in session.adapt(make_scans(1, 4), preset="full", preview_queries=queries):
        if isinstance(event, Preview) and first is None:
            first = event
            session.stop()
    assert isinstance(event, Adapted)
    assert event.stopped
    assert event.calibration is not None
    assert len(session.query(queries)) == 2


def test_stop_while_nothing_runs_does_no_harm():
    session = adapted(make_scans(1, 4))
    session.stop()
    assert session.query(make_scans(9, 1))


def test_leaving_the_stream_ends_the_fit():
    session = Session("tiny", "cpu")
    events = session.adapt(make_scans(1, 4), preset="full")
    next(events)
    events.close()
    assert not session.is_adapting
    assert isinstance(list(session.adapt(make_scans(1, 4), preset="fast"))[-1], Adapted)


def test_queries_that_come_in_during_the_fit_are_previewed_too():
    session, queries = Session("tiny", "cpu"), []
    counts = []
    for event in session.adapt(make_scans(1, 4), preset="full", preview_queries=queries):
        if isinstance(event, Preview):
            counts.append(len(event.findings))
            if len(counts) == 1:
                queries.extend(make_scans(9, 2))
    assert counts[0] == 0
    assert counts[-1] == 2


def test_query_before_adapting_says_what_to_do():
    with pytest.raises(NotFittedError, match="adapt to normal reference scans"):
        Session("tiny", "cpu").query(make_scans(1, 1))


@pytest.mark.parametrize("count", [0, 1, 500])
def test_too_few_or_too_many_references_are_refused_and_the_former_adapter_stays(count):
    session = adapted(make_scans(1, 4))
    with pytest.raises(ReferenceSetError):
        list(session.adapt(make_scans(1, 1) * count))
    assert session.query(make_scans(9, 1))
    assert not session.is_adapting


def test_adapting_twice_at_once_is_refused(gated):
    session = Session("tiny", "cpu")
    events = session.adapt(make_scans(1, 4), method="gated")
    next(events)
    with pytest.raises(FmclipError, match="already"):
        next(session.adapt(make_scans(1, 4)))
    gated.opened.set()
    assert isinstance(list(events)[-1], Adapted)


def test_a_failing_fit_is_reported_and_leaves_the_session_usable(monkeypatch):
    class Failing(PatchMemory):
        name = "failing"

        def fit(self, normals, abnormals=None, *, on_event=None):
            raise FmclipError("this went wrong")

    monkeypatch.setitem(DETECTORS, "failing", Failing)
    session = adapted(make_scans(1, 4))
    with pytest.raises(FmclipError, match="this went wrong"):
        list(session.adapt(make_scans(2, 4), method="failing"))
    assert session.query(make_scans(9, 1))
    assert isinstance(list(session.adapt(make_scans(2, 4), preset="fast"))[-1], Adapted)


def test_duplicates_among_the_references_are_named():
    normals = make_scans(1, 4)
    twin = Scan(normals[0].pixels, "scan 5")
    session = Session("tiny", "cpu")
    end = list(session.adapt([*normals, twin], preset="fast"))[-1]
    assert any("scan 1 and scan 5" in warning.message for warning in end.warnings)
    assert session.warnings == end.warnings


def test_a_saved_adapter_gives_the_same_maps_in_another_session(tmp_path):
    session, queries = adapted(make_scans(1, 4), preset="full"), make_scans(9, 2)
    session.save(tmp_path / "adapter.safetensors")
    other = Session("tiny", "cpu")
    other.load(tmp_path / "adapter.safetensors")
    for first, second in zip(session.query(queries), other.query(queries), strict=True):
        np.testing.assert_array_equal(first.map, second.map)
        assert first.rank == second.rank


def test_a_refused_adapter_file_leaves_the_session_as_it_was(tmp_path):
    session = adapted(make_scans(1, 4))
    (tmp_path / "noise.safetensors").write_bytes(b"not an adapter")
    with pytest.raises(CheckpointError):
        session.load(tmp_path / "noise.safetensors")
    assert session.query(make_scans(9, 1))


def test_a_session_that_is_closed_in_the_middle_of_a_fit_takes_nothing_any_more():
    session = Session("tiny", "cpu")
    events = session.adapt(make_scans(1, 4))
    next(events)
    session.close()
    list(events)
    assert not session.is_adapted
    assert session.unfinished is None


def test_a_closed_session_holds_nothing():
    session = adapted(make_scans(1, 4))
    session.close()
    assert not session.is_adapted
    with pytest.raises(NotFittedError):
        session.query(make_scans(9, 1))
