"""A run done again from its run.json: with the same files it agrees, with others it says what is wrong."""

import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from scan_files import write_nifti
from typer.testing import CliRunner

import fmclip.detectors.fusionmedclip
import fmclip.replay_cli
from fmclip.calibration import Calibration
from fmclip.cli import app
from fmclip.errors import FmclipError
from fmclip.regions import NormalRegion
from fmclip.report import RunRecord, ScanRecord, replay
from fmclip.scans import find_scan_files, read_scan, read_scans, shrink
from fmclip.session import Preview, Session
from fmclip.towers import get_tower


def draw(path: Path, seed: int, shape: tuple[int, int] = (40, 50)) -> None:
    texture = cv2.GaussianBlur(np.random.default_rng(seed).normal(0, 1, shape), (0, 0), 1.5)
    cv2.imwrite(str(path), np.clip(90 + 25 * texture / texture.std(), 0, 255).astype(np.uint8))


@pytest.fixture
def folders(tmp_path) -> Path:
    for folder, seeds in (("normal", range(4)), ("query", (10, 11))):
        (tmp_path / folder).mkdir()
        for seed in seeds:
            draw(tmp_path / folder / f"{seed}.png", seed)
    return tmp_path


def files(folders: Path, name: str) -> list[Path]:
    return find_scan_files([folders / name])


def adapted(normals, queries, method: str = "patch_memory", **options) -> RunRecord:
    session = Session("tiny", "cpu")
    list(session.adapt(normals, method=method, **options))
    found = [ScanRecord.of(one.scan, one.score) for one in session.query(queries)]
    assert session.calibration is not None
    options = {"references": session.references, "window": session.window}
    return RunRecord.of(session.detector, session.calibration, found, **options)


def run(folders: Path, method: str = "patch_memory") -> RunRecord:
    return adapted(*(read_scans(files(folders, name))[0] for name in ("normal", "query")), method=method)


@pytest.mark.parametrize("method", ["patch_memory", "fusionmedclip"])
def test_the_same_files_under_other_names_give_the_same_scores(folders, monkeypatch, method):
    short = {"stage2_epochs": 2, "stage3_epochs": 1, "pool_size": 4}
    monkeypatch.setitem(fmclip.detectors.fusionmedclip.PRESETS, "full", short)
    record = RunRecord.from_json(run(folders, method).to_json())
    for place, path in enumerate(files(folders, "normal")):
        shutil.move(path, folders / "normal" / f"{'dbca'[place]}.bin")  # another order, too
    draw(folders / "normal" / "another.png", 99)
    result = replay(record, files(folders, "normal"), files(folders, "query"), get_tower("tiny"))
    assert result.agrees
    assert result.missing == ()
    assert [label for label, *_ in result.scores] == ["scan 1", "scan 2"]
    assert result.largest < 1e-6


def test_other_scores_do_not_agree(folders):
    record = run(folders)
    first, second = record.queries
    changed = replace(record, queries=(replace(first, score=first.score + 0.01), second))
    result = replay(changed, files(folders, "normal"), files(folders, "query"), get_tower("tiny"))
    assert not result.agrees
    assert result.largest == pytest.approx(0.01, rel=1e-3)
    scores = tuple(score + 0.01 for score in record.calibration.reference_scores)
    changed = replace(record, calibration=Calibration(scores, record.calibration.threshold))
    assert not replay(changed, files(folders, "normal"), files(folders, "query"), get_tower("tiny")).agrees


def test_a_changed_reference_is_refused_by_its_label(folders):
    record = run(folders)
    draw(folders / "normal" / "2.png", 77)
    with pytest.raises(FmclipError, match="their pixels differ: scan 3"):
        replay(record, files(folders, "normal"), files(folders, "query"), get_tower("tiny"))


def test_a_missing_query_is_named_and_the_others_go_on(folders):
    record = run(folders)
    (folders / "query" / "10.png").unlink()
    result = replay(record, files(folders, "normal"), files(folders, "query"), get_tower("tiny"))
    assert result.missing == ("scan 1",)
    assert [label for label, *_ in result.scores] == ["scan 2"]
    assert not result.agrees


def test_what_cannot_be_done_again_says_why_before_anything_is_learned(folders):
    record = replace(run(folders), not_repeatable="the training was stopped before its end")
    record = RunRecord.from_json(record.to_json())
    assert ("Cannot be done again", "the training was stopped before its end") in record.describe()
    with pytest.raises(FmclipError, match=r"cannot be done again.*stopped before its end"):
        replay(record, [], [], get_tower("tiny"))


def test_regions_and_an_unfinished_training_show_in_the_record(folders):
    normals, queries = (read_scans(files(folders, name))[0] for name in ("normal", "query"))
    session = Session("tiny", "cpu")
    list(session.adapt(normals, method="patch_memory"))
    session.mark_normal([NormalRegion(queries[0], np.ones((queries[0].height, queries[0].width), bool))])
    assert "regions" in RunRecord.of(session.detector, session.calibration, []).not_repeatable
    for event in session.adapt(normals, preset="fast"):
        if isinstance(event, Preview):  # the memory answers, stage 2 has not ended
            session.stop()
    assert session.detector.network_ is None
    assert "stopped" in RunRecord.of(session.detector, session.calibration, []).not_repeatable


def test_another_tower_is_refused(folders):
    with pytest.raises(FmclipError, match="not the tower of the run"):
        replay(run(folders), files(folders, "normal"), files(folders, "query"), get_tower("tiny-resnet"))


def test_slices_and_large_scans_are_found_again(tmp_path):
    generator = np.random.default_rng(0)
    write_nifti(tmp_path / "v.nii", 200 * generator.random((60, 50, 9), np.float32))
    draw(tmp_path / "large.png", 3, (1100, 900))
    normals = [read_scan(tmp_path / "v.nii", label=f"scan {z}", slice_index=z, window=(100, 150)) for z in (1, 4, 7)]
    queries = [shrink(read_scan(tmp_path / "large.png", label="scan 1"))]
    record = adapted(normals, queries, window="100,150")
    result = replay(record, [tmp_path / "v.nii"], [tmp_path / "large.png"], get_tower("tiny"))
    assert result.agrees


def call(*arguments: object):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_from_adapt_over_predict_to_replay(folders):
    adapter, out = folders / "a.safetensors", folders / "out"
    call("adapt", folders / "normal", "--out", adapter, "--tower", "tiny", "--method", "patch_memory", "--seed", 3)
    call("predict", adapter, folders / "query", "--out", out)
    where = ("--references", folders / "normal", "--queries", folders / "query")
    result = call("replay", out / "run.json", *where)
    assert result.exit_code == 0, result.stderr
    assert "The run agrees" in result.stdout
    text = (out / "run.json").read_text()
    assert str(folders) not in text
    assert ".png" not in text

    (folders / "normal" / "notes.txt").write_text("not a scan")
    result = call("replay", out / "run.json", *where)
    assert result.exit_code == 0, result.stderr
    assert "scan 5" in result.stderr
    assert "notes.txt" not in result.stderr

    draw(folders / "normal" / "0.png", 50)
    result = call("replay", out / "run.json", *where)
    assert result.exit_code == 1
    assert "does not agree" in result.stderr


def test_replay_reads_the_slice_that_adapt_read(tmp_path):
    volume = np.random.default_rng(0)
    for folder, count in (("normal", 4), ("query", 1)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            write_nifti(tmp_path / folder / f"{number}.nii", 200 * volume.random((40, 40, 6), np.float32))
    adapter, out = tmp_path / "a.safetensors", tmp_path / "out"
    call("adapt", tmp_path / "normal", "--out", adapter, "--tower", "tiny", "--method", "patch_memory", "--slice", 1)
    call("predict", adapter, tmp_path / "query", "--out", out, "--slice", 2)
    where = ("--references", tmp_path / "normal", "--queries", tmp_path / "query")
    assert "does not agree" in call("replay", out / "run.json", *where).stderr
    assert "The run agrees" in call("replay", out / "run.json", *where, "--slice", 1).stdout


def test_replay_says_what_is_no_run(folders):
    (folders / "run.json").write_text("{}")
    result = call("replay", folders / "run.json", "--references", folders, "--queries", folders)
    assert result.exit_code == 1
    assert "no run.json" in result.stderr
