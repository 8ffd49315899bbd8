"""Step 3's downloads by their handlers: what lies in the files, where they lie, and when they go."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fmclip.page import answers, exports, uploads
from fmclip.page.handlers import Handlers
from fmclip.page.visitors import Visitors
from fmclip.regions import NormalRegion
from fmclip.report import RunRecord
from fmclip.scans import Scan
from fmclip.session import Session

ME = "me"


@pytest.fixture
def visitors(tmp_path, monkeypatch) -> Visitors:
    """One visitor with an adapter and two answered queries."""
    monkeypatch.setattr(uploads, "get_upload_folder", lambda: str(tmp_path / "cache"))
    visitors = Visitors(lambda: Session("tiny", "cpu"))
    visitor = visitors.get(ME)
    scans = [Scan(np.random.default_rng(seed).random((64, 64), dtype=np.float32), f"scan {seed}") for seed in range(6)]
    visitor.references = scans[:4]
    list(visitor.session.adapt(visitor.references, method="patch_memory", window="lung"))
    visitor.queries[:] = scans[4:]
    answers.take(visitor, visitor.session.query(visitor.queries))
    return visitors


@pytest.fixture
def handlers(visitors) -> Handlers:
    return Handlers(visitors, [], None)


def taken(handlers: Handlers, name: str) -> Path:
    *_, last = handlers.take_away(name, ME)
    return Path(last[f"{name}_file"]["value"])


def test_the_report_is_a_pdf_with_a_name_that_nobody_guesses(handlers, tmp_path):
    file = taken(handlers, "report")
    assert file.read_bytes().startswith(b"%PDF")
    assert file.name.startswith("fmclip-report-")
    assert len(file.parent.name) == 32
    assert tmp_path / "cache" in file.parents


def test_the_zip_is_judged_by_the_threshold_that_the_visitor_sees(handlers, visitors):
    visitor = visitors.get(ME)
    visitor.threshold = 0.999
    with zipfile.ZipFile(taken(handlers, "everything")) as archive:
        rows = archive.read("scores.csv").decode().splitlines()[1:]
        record = json.loads(archive.read("run.json"))
    assert len(rows) == 2
    assert all(",0.999000,within the references," in row for row in rows)
    assert record["window"] == "lung"
    assert record["calibration"]["threshold"] == visitor.session.calibration.threshold
    assert [one["digest"] for one in record["references"]] == [scan.digest for scan in visitor.references]


def test_a_new_file_replaces_the_one_before_and_all_go_with_the_visitor(handlers, visitors):
    first, second = taken(handlers, "report"), taken(handlers, "report")
    everything = taken(handlers, "everything")
    assert not first.exists()
    assert second.exists()
    visitors.leave(ME)
    assert not second.exists()
    assert not everything.exists()


def test_answers_of_a_former_adapter_stay_out(handlers, visitors):
    visitor = visitors.get(ME)
    visitor.findings[0] = replace(visitor.findings[0], adapter="a former one")
    with zipfile.ZipFile(taken(handlers, "everything")) as archive:
        assert len(archive.read("scores.csv").decode().splitlines()[1:]) == 1
        assert len(json.loads(archive.read("run.json"))["queries"]) == 1


def test_an_adapter_that_is_replaced_meanwhile_is_no_mixture(handlers, visitors, monkeypatch):
    visitor = visitors.get(ME)
    taken_before = RunRecord.of

    def replace_adapter(*args, **options):
        list(visitor.session.adapt(visitor.references, method="cosine"))
        return taken_before(*args, **options)

    monkeypatch.setattr(RunRecord, "of", replace_adapter)
    updates = list(handlers.take_away("report", ME))
    assert "try again" in updates[-1]["export_note"]
    assert not visitor.exports


def test_the_record_says_what_cannot_be_done_again(handlers, visitors):
    visitor = visitors.get(ME)
    image = visitor.queries[0]
    visitor.session.mark_normal([NormalRegion(image, np.ones((image.height, image.width), bool))])
    answers.take(visitor, visitor.session.query(visitor.queries))
    *_, last = handlers.take_away("everything", ME)
    assert "cannot be done again" in last["export_note"]
    with zipfile.ZipFile(last["everything_file"]["value"]) as archive:
        assert "regions" in json.loads(archive.read("run.json"))["not_repeatable"]


def test_abnormal_scans_count_for_methods_that_use_them(handlers, visitors):
    visitor = visitors.get(ME)
    visitor.abnormals = [visitor.queries[0]]
    with zipfile.ZipFile(taken(handlers, "everything")) as archive:
        assert json.loads(archive.read("run.json"))["not_repeatable"] == ""  # patch_memory does not
    list(visitor.session.adapt(visitor.references, method="two_layer", preset="fast", abnormals=visitor.abnormals))
    answers.take(visitor, visitor.session.query(visitor.queries))
    with zipfile.ZipFile(taken(handlers, "everything")) as archive:
        assert "abnormal" in json.loads(archive.read("run.json"))["not_repeatable"]
    visitor.abnormals = []  # it has learned from them all the same
    with zipfile.ZipFile(taken(handlers, "everything")) as archive:
        assert "abnormal" in json.loads(archive.read("run.json"))["not_repeatable"]


def test_half_a_file_is_deleted(handlers, monkeypatch, tmp_path):
    def break_off(file, *_args):
        file.write_bytes(b"%PDF")
        raise OSError("No space left on device")

    monkeypatch.setattr("fmclip.report.write_report", break_off)
    assert "unexpected" in list(handlers.take_away("report", ME))[-1]["export_note"]
    assert not list((tmp_path / "cache").rglob("*.pdf"))


def test_the_button_rests_while_the_file_is_made_and_comes_back(handlers):
    first, *_, last = handlers.take_away("report", ME)
    assert first["report"]["interactive"] is False
    assert last["report"]["interactive"] is True


def test_without_answers_there_is_nothing_to_take(handlers, visitors):
    visitors.get(ME).findings = []
    updates = list(handlers.take_away("everything", ME))
    assert "nothing to take away yet" in updates[-1]["export_note"]
    assert updates[0]["everything"]["interactive"] is True


def test_a_disk_that_refuses_gives_the_button_back(handlers, monkeypatch):
    def refuse(*_args):
        raise OSError("No space left on device")

    monkeypatch.setattr(exports, "new_file", refuse)
    updates = list(handlers.take_away("report", ME))
    assert updates[-2]["report"]["interactive"] is True
    assert "unexpected" in updates[-1]["export_note"]
