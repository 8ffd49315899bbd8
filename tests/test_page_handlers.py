"""The handlers of the page on the tiny tower, without a browser: what a visitor sees after each click."""

import logging
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from page_scans import CPU, ME, PLAIN, event, pictures, save_picture, shown
from scan_files import write_nifti

from fmclip.detectors import DETECTORS, PatchMemory, StageStarted, Step
from fmclip.errors import FmclipError
from fmclip.page import answers
from fmclip.page.cases import Case
from fmclip.page.handlers import Handlers
from fmclip.page.reviewing import Reviewing
from fmclip.page.visitors import Visitors
from fmclip.session import Session

RESTING = ("adapt", "load", "clear_references", "remove_marked", "remove_suspects", "case-discs")


class Fast(PatchMemory):
    """The default method, as fast as can be; stops at a gate if a test has closed it."""

    name = "fusionmedclip"
    gate: threading.Event
    reached: threading.Event

    def fit(self, normals, abnormals=None, *, on_event=None):
        on_event(StageStarted("training", 1))
        super().fit(normals, on_event=on_event)
        self.reached.set()
        while not self.gate.wait(0.01):
            on_event(Step("training", 1, 2, 0.5))
        return self


@pytest.fixture
def gate(monkeypatch):
    """Open, unless a test closes it: fits go on only while it is open."""
    gate = threading.Event()
    gate.set()
    Fast.gate, Fast.reached = gate, threading.Event()
    monkeypatch.setitem(DETECTORS, "fusionmedclip", Fast)
    yield gate
    gate.set()


@pytest.fixture
def visitors(gate) -> Visitors:
    return Visitors(lambda: Session("tiny", "cpu"))


@pytest.fixture
def handlers(visitors, cache, tmp_path) -> Handlers:
    files = [tmp_path / f"{name}.png" for name in ("a", "b", "c", "d", "e", "f")]
    for seed, path in enumerate(files):
        save_picture(path, seed)
    case = Case("discs", "Discs", "brain MRI", "Made up.", tuple(files[:4]), tuple(files[4:]), ("normal", "a lesion"))
    return Handlers(visitors, [case], CPU)


def damaged(cache) -> str:
    path = cache / "bad" / "Erika_Mustermann.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not a picture")
    return str(path)


def volumes(cache, *seeds: int) -> list[str]:
    """CT volumes in Hounsfield units, all within the lung window, of which soft tissue shows only a part."""
    paths = []
    for seed in seeds:
        path = cache / f"volume{seed}" / f"Mustermann{seed}.nii"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(seed).uniform(-900, 100, (40, 40, 5))
        paths.append(str(write_nifti(path, values.astype(np.float32))))
    return paths


def start(handlers: Handlers) -> tuple[threading.Thread, list[dict]]:
    """Adapt in the background."""
    updates: list[dict] = []
    thread = threading.Thread(target=lambda: updates.extend(handlers.adapt("brain MRI", "fast", ME)))
    thread.start()
    assert Fast.reached.wait(timeout=20)
    return thread, updates


def test_from_the_example_case_to_answers_and_a_download(handlers):
    page = shown(handlers.load_case("discs", ME))
    assert page["references"].count("<img") == 4
    assert answers.NOT_ADAPTED in page["waiting"]
    page = shown(handlers.adapt("brain MRI", "fast", ME))
    assert "Adapted to 4 reference scans" in page["status"]
    assert page["cards"].count("fm-card") >= 2
    assert page["answers"]["visible"] is True
    assert page["waiting"] == ""
    assert "Known truth" in page["verdict"]
    assert page["download"]["value"].endswith(".safetensors")


def test_buttons_rest_while_a_fit_runs_and_come_back_after_it(handlers):
    handlers.load_case("discs", ME)
    updates = list(handlers.adapt("brain MRI", "fast", ME))
    busy = next(update for update in updates if "adapt" in update)
    assert all(busy[name]["interactive"] is False for name in RESTING)
    assert busy["stop"]["interactive"] is True
    page = shown(updates)
    assert all(page[name]["interactive"] is True for name in RESTING)
    assert page["stop"]["interactive"] is False


@pytest.mark.parametrize("error", [FmclipError("this went wrong"), OSError("/home/Mustermann/scan.png")])
def test_buttons_come_back_after_an_error_and_no_path_is_told(handlers, monkeypatch, caplog, error):
    def fail(self, normals, abnormals=None, *, on_event=None):
        on_event(StageStarted("training", 1))
        raise error

    monkeypatch.setattr(Fast, "fit", fail)
    handlers.load_case("discs", ME)
    with caplog.at_level(logging.DEBUG):
        page = shown(handlers.adapt("brain MRI", "fast", ME))
    assert ("this went wrong" if isinstance(error, FmclipError) else "Something unexpected") in page["status"]
    assert all(page[name]["interactive"] is True for name in RESTING)
    assert "Mustermann" not in caplog.text + page["status"]


def test_what_fails_while_drawing_ends_the_fit_and_the_next_one_works(handlers, visitors, monkeypatch):
    handlers.load_case("discs", ME)
    with monkeypatch.context() as broken:
        broken.setattr(answers, "slider_pair", lambda *arguments: 1 / 0)
        page = shown(handlers.adapt("brain MRI", "fast", ME))
    assert "Something unexpected" in page["status"]
    assert page["adapt"]["interactive"] is True
    assert "Adapted to 4" in shown(handlers.adapt("brain MRI", "fast", ME))["status"]


def test_references_and_adapters_cannot_be_changed_while_they_are_learned_from(handlers, visitors, gate, cache):
    handlers.load_case("discs", ME)
    gate.clear()
    thread, updates = start(handlers)
    uploaded = pictures(cache, 11)
    refused = [
        handlers.load_case("discs", ME),
        handlers.add_references(uploaded, *PLAIN, ME),
        handlers.clear_references(ME),
        handlers.remove_marked(ME),
    ]
    assert all("press Stop" in page["reference_note"] for page in refused)
    assert all("adapt" not in page for page in refused)  # the buttons go on resting
    assert not list(cache.rglob("*Mustermann*"))
    assert "press Stop" in shown(handlers.load_adapter(None, ME))["status"]
    assert len(visitors.get(ME).references) == 4
    gate.set()
    thread.join()
    assert "Adapted to 4" in shown(updates)["status"]


def test_stop_gives_control_back_at_once_while_many_queries_wait_to_be_mapped(handlers, monkeypatch, cache):
    mapping, go_on = threading.Event(), threading.Event()

    def slow(self, scans):
        mapping.set()
        go_on.wait(timeout=20)
        return PatchMemory.predict(self, scans)

    monkeypatch.setattr(Fast, "predict", slow)
    shown(handlers.add_references(pictures(cache, *range(4)), *PLAIN, ME))
    shown(handlers.add_queries(pictures(cache, *range(20, 60)), *PLAIN, ME))
    back, page = threading.Event(), {}

    def adapt() -> None:
        for update in handlers.adapt("brain MRI", "fast", ME):
            page.update(shown(page, update))
            if "Stopped after" in page.get("status", ""):
                back.set()

    thread = threading.Thread(target=adapt)
    thread.start()
    assert mapping.wait(timeout=20)
    handlers.stop(ME)
    assert back.wait(timeout=2)
    assert page["adapt"]["interactive"] is True
    assert "the state after patch memory is kept" in page["status"]
    go_on.set()
    thread.join()
    assert page["cards"].count('class="fm-card"') == 40  # they follow by themselves
    assert page["waiting"] == ""


def test_numbers_stay_right_after_refused_files_and_no_file_is_named(handlers, visitors, cache, caplog):
    with caplog.at_level(logging.DEBUG):
        files = pictures(cache, 1, 2)
        page = shown(handlers.add_references([files[0], damaged(cache), files[1]], *PLAIN, ME))
        handlers.add_references([damaged(cache)], *PLAIN, ME)
        handlers.add_references(pictures(cache, 3), *PLAIN, ME)
        queries = shown(handlers.add_queries([damaged(cache), *pictures(cache, 4)], *PLAIN, ME))
    assert [scan.label for scan in visitors.get(ME).references] == ["scan 1", "scan 3", "scan 5"]
    assert [scan.label for scan in visitors.get(ME).queries] == ["scan 2"]
    assert "2 scans read, 1 refused" in page["reference_note"]
    assert "scan 2" in page["reference_note"]
    assert "scan 1" in queries["query_note"]
    assert "Mustermann" not in caplog.text + page["reference_note"] + queries["query_note"]


def test_selected_reference_scans_are_removed_and_the_others_keep_their_numbers(handlers, visitors, cache):
    handlers.add_references(pictures(cache, 1, 2, 3, 4), *PLAIN, ME)
    handlers.mark_references(event(pressed=[1, 2]), ME)
    page = shown(handlers.mark_references(event(pressed=[2, 99]), ME))
    assert page["remove_marked"]["value"] == "Remove 1 selected"
    page = shown(handlers.remove_marked(ME))
    assert [scan.label for scan in visitors.get(ME).references] == ["scan 1", "scan 2", "scan 4"]
    assert page["references"].count("<img") == 3
    assert page["remove_marked"]["visible"] == "hidden"
    assert "Removed scan 3" in page["reference_note"]
    shown(handlers.add_references(pictures(cache, 5), *PLAIN, ME))
    assert visitors.get(ME).references[-1].label == "scan 5"


def test_copies_that_a_warning_names_go_with_one_click(handlers, visitors, cache):
    copy = save_picture(cache / "copy" / "x.png", 2)
    page = shown(handlers.add_references([*pictures(cache, 1, 2, 3), copy], *PLAIN, ME))
    assert "scan 2 and scan 4 are the same picture" in page["reference_note"]
    assert page["remove_suspects"] == {"__type__": "update", "value": "Remove scan 4", "visible": True}
    page = shown(handlers.remove_suspects(ME))
    assert [scan.label for scan in visitors.get(ME).references] == ["scan 1", "scan 2", "scan 3"]
    assert page["remove_suspects"]["visible"] == "hidden"
    assert "same picture" not in page["reference_note"]


def test_slice_and_window_reach_references_and_queries_alike_and_stand_by_the_answer(handlers, visitors, cache):
    page = shown(handlers.add_references(volumes(cache, 1, 2, 3, 4), "1", "lung", ME))
    assert page["window"]["interactive"] is False
    assert page["window"]["value"] == "lung"
    handlers.add_references(volumes(cache, 5), "1", "bone", ME)  # the set keeps one window
    assert {visitors.get(ME).windows[scan] for scan in visitors.get(ME).references} == {"lung"}
    shown(handlers.adapt("chest CT", "fast", ME))
    assert visitors.get(ME).session.window == "lung"
    page = shown(handlers.add_queries(volumes(cache, 1), "1", "bone", ME))
    assert "Read with the window lung" in page["query_note"]
    assert "slice 1 is shown" in page["verdict"]
    assert "lung: centre -600, width 1500 HU" in page["verdict"]
    assert visitors.get(ME).queries[0].digest == visitors.get(ME).references[0].digest
    shown(handlers.add_queries(volumes(cache, 1), "3", "lung", ME))
    assert visitors.get(ME).queries[1].digest != visitors.get(ME).queries[0].digest


@pytest.mark.parametrize("text", ["-1", "second", "1.5", "²"])
def test_a_slice_that_is_no_number_is_refused_and_the_files_are_deleted(handlers, visitors, cache, text):
    page = shown(handlers.add_references(volumes(cache, 1), text, "lung", ME))
    assert "whole number from 0" in page["reference_note"]
    assert "whole number from 0" in shown(handlers.add_queries(volumes(cache, 1), text, "lung", ME))["query_note"]
    assert visitors.get(ME).references == []
    assert not list(cache.rglob("*Mustermann*"))


def test_after_adapting_with_another_window_older_queries_are_not_compared(handlers, visitors, cache):
    handlers.add_references(volumes(cache, 1, 2, 3, 4), "", "lung", ME)
    shown(handlers.adapt("chest CT", "fast", ME))
    shown(handlers.add_queries(volumes(cache, 9), "", "lung", ME))
    assert len(visitors.get(ME).findings) == 1
    assert shown(handlers.clear_references(ME))["window"]["interactive"] is True
    handlers.add_references(volumes(cache, 1, 2, 3, 4), "", "soft tissue", ME)
    page = shown(handlers.adapt("chest CT", "fast", ME))
    assert visitors.get(ME).findings == []
    assert page["answers"]["visible"] is False
    assert "Not compared: scan 1" in page["waiting"]
    page = shown(handlers.add_queries(volumes(cache, 9), "", "lung", ME))
    assert [finding.label for finding in visitors.get(ME).findings] == ["scan 2"]
    assert "soft tissue" in page["verdict"]


def test_a_file_that_is_no_volume_has_no_window(handlers, visitors, cache):
    page = shown(handlers.add_references(pictures(cache, 1, 2), "3", "bone", ME))
    assert visitors.get(ME).window is None
    assert page["window"]["interactive"] is True


def test_an_adapter_answers_the_same_for_another_visitor_and_keeps_its_window(handlers, visitors, cache, tmp_path):
    handlers.add_references(volumes(cache, 1, 2, 3, 4), "", "lung", ME)
    path = shown(handlers.adapt("chest CT", "fast", ME))["download"]["value"]
    mine = shown(handlers.add_queries(volumes(cache, 9), "", "lung", ME))["cards"]
    copy = tmp_path / "mine.safetensors"
    copy.write_bytes(Path(path).read_bytes())
    page = shown(handlers.load_adapter(str(copy), "other"))
    assert "learned from 4 reference scans" in page["status"]
    assert "window lung" in page["status"]
    assert shown(handlers.add_queries(volumes(cache, 9), "", "bone", "other"))["cards"] == mine
    assert visitors.get("other").references == []


def test_a_refused_adapter_file_is_deleted_and_the_page_goes_on(handlers, cache):
    path = cache / "x" / "noise.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"noise" * 100)
    page = shown(handlers.load_adapter(str(path), ME))
    assert "not an adapter file" in page["status"]
    assert page["adapt"]["interactive"] is True
    assert not path.exists()


def test_training_as_in_the_paper_is_offered_where_there_is_a_gpu_and_refused_elsewhere(handlers, visitors):
    handlers.load_case("discs", ME)
    assert "preset" not in shown(handlers.arrive(ME))
    assert "needs a GPU" in shown(handlers.adapt("brain MRI", "paper", ME))["status"]
    on_gpu = Handlers(visitors, [], SimpleNamespace(has_gpu=True, describe=lambda: "a tower"))
    assert "paper" in [value for _, value in shown(on_gpu.arrive(ME))["preset"]["choices"]]
    assert "Adapted" in shown(on_gpu.adapt("brain MRI", "paper", ME))["status"]


def test_a_query_that_is_chosen_stays_chosen_and_a_threshold_by_hand_is_taken_back(handlers, visitors):
    handlers.load_case("discs", ME)
    shown(handlers.adapt("brain MRI", "fast", ME))
    labels = [finding.label for finding in visitors.get(ME).findings]
    for place, label in enumerate(labels):
        assert f"{label.capitalize()} " in shown(handlers.select(event(index=place), ME))["verdict"]
    reviewing = Reviewing(handlers)
    reviewing.set_threshold(1.0, ME)
    page = shown(reviewing.set_opacity(0.3, ME))  # heard later: it says nothing of the threshold
    assert "set by hand" in page["verdict"]
    assert f"{labels[-1].capitalize()} " in page["verdict"]
    assert "threshold" not in page  # the slider that is being moved is left alone
    page = shown(reviewing.reset_threshold(ME))
    assert "set by hand" not in page["verdict"]
    assert page["threshold"] == round(visitors.get(ME).session.calibration.threshold, 2)


def test_clearing_queries_and_own_uploads_after_an_example_leave_nothing_behind(handlers, visitors, cache):
    handlers.load_case("discs", ME)
    shown(handlers.adapt("brain MRI", "fast", ME))
    page = shown(handlers.add_references(pictures(cache, 7, 8), *PLAIN, ME))
    assert [scan.label for scan in visitors.get(ME).references] == ["scan 1", "scan 2"]
    assert visitors.get(ME).queries == []
    assert answers.NO_QUERIES in page["waiting"]
    shown(handlers.add_queries(pictures(cache, 9), *PLAIN, ME))
    assert len(visitors.get(ME).findings) == 1
    page = shown(handlers.clear_queries(ME))
    assert visitors.get(ME).findings == []
    assert page["answers"]["visible"] is False


def test_leaving_ends_the_fit(handlers, visitors, gate):
    handlers.load_case("discs", ME)
    gate.clear()
    thread, _ = start(handlers)
    pressed = time.monotonic()
    handlers.leave(ME)
    thread.join(timeout=20)
    assert time.monotonic() - pressed < 2
    assert len(visitors) == 0
