"""One part after another in this process: the scores are those of single scans, and what fails is told."""

import datetime
import json
from pathlib import Path

import numpy as np
import pytest
from archive_scans import (
    BROKEN,
    COUNT,
    MISSING,
    SCANNERS,
    SECRET,
    all_text,
    draw,
    read_all,
    rows,
    table_of,
    write_manifest,
    write_shard,
)
from pyarrow import parquet
from scan_files import write_nifti

import fmclip.archive.scorer
from fmclip.archive.manifest import KEY_COLUMN, Columns, Source
from fmclip.archive.parts import ATTEMPTS, FAILURES, MAPS, SCORES, PartCount, count_part, part_file, read_map
from fmclip.archive.scorer import Job, Scorer
from fmclip.checkpoint import load_adapter
from fmclip.errors import ArchiveError
from fmclip.scans import read_scan, resize


@pytest.fixture
def out(tmp_path) -> Path:
    for kind in (SCORES, FAILURES, MAPS, ATTEMPTS):
        (tmp_path / "out" / kind).mkdir(parents=True)
    record = {"format": "fmclip-archive", "version": 1, "threshold": 0.5, "rows": COUNT, "settings": {"part_size": 5}}
    (tmp_path / "out" / "archive.json").write_text(json.dumps(record))
    return tmp_path / "out"


def score(job: Job, part_size: int = 5) -> list[PartCount]:
    scorer = Scorer(job)
    return [scorer.score(part) for part in job.source.plan(part_size)[0]]


def test_scores_are_those_of_each_scan_alone(adapter, manifest, out):
    counts = score(Job(out, adapter, table_of(manifest), "run"))
    assert counts == [(5, 0), (4, 1), (4, 1), (5, 0), (2, 0)]
    detector, calibration = load_adapter(adapter)
    found = read_all(out, SCORES)
    assert [row["row"] for row in found] == [row for row in range(COUNT) if row not in (BROKEN, MISSING)]
    for row in found:
        scan = read_scan(manifest.parent / f"{SECRET}-{row['row']:03d}.png")
        (prediction,) = detector.predict([scan])
        assert row["score"] == pytest.approx(prediction.score, abs=1e-6)
        assert row["deviates"] == calibration.is_abnormal(row["score"])
        assert row["rank"] == calibration.rank(row["score"])
        assert (row["p_value"] < 0.1) == row["deviates"]  # the threshold is where one of ten normal scans lies above
        assert row["scanner"] == SCANNERS[row["row"] % 2]
        assert row["date"] == datetime.date(2026, 1, 1 + row["row"] // 4)
        kept = read_map(out, row["row"])
        assert np.abs(kept - prediction.map).max() < 0.5 / 255 + 1e-6
    assert {row["deviates"] for row in found} == {True, False}


def test_maps_are_made_small_and_are_kept_in_16_bits_or_not_at_all(adapter, manifest, out):
    detector, _ = load_adapter(adapter)
    (prediction,) = detector.predict([read_scan(manifest.parent / f"{SECRET}-000.png")])
    score(Job(out, adapter, table_of(manifest), "16", maps="uint16", map_side=25))
    kept = read_map(out, 0)
    assert kept.shape == (20, 25)
    assert np.abs(kept - resize(prediction.map, 0.5)).max() < 1e-4
    first = read_all(out, MAPS)[0]
    assert (first["row"], first["height"], first["width"]) == (0, 40, 50)
    with pytest.raises(ArchiveError, match="could not be read"):
        read_map(out, BROKEN)
    part_file(out, MAPS, 0).unlink()
    score(Job(out, adapter, table_of(manifest), "none", maps="none"))
    assert not part_file(out, MAPS, 0).exists()
    with pytest.raises(ArchiveError, match="maps were left out"):
        read_map(out, 0)


def test_what_cannot_be_read_is_told_row_by_row_and_nothing_names_a_file(adapter, manifest, out):
    listed = rows(COUNT)
    listed[2]["path"] = ""
    write_manifest(manifest, listed)
    score(Job(out, adapter, table_of(manifest), "run"))
    failures = read_all(out, FAILURES)
    assert [row["row"] for row in failures] == [2, BROKEN, MISSING]
    assert [row["scanner"] for row in failures] == [SCANNERS[0], SCANNERS[1], SCANNERS[0]]
    for row, words in zip(failures, ("no path", "is a text file", "not found"), strict=True):
        assert words in row["reason"], row
    assert SECRET not in all_text(out)
    assert "id" not in failures[0]


def test_an_id_column_is_copied_where_it_is_asked_for(adapter, manifest, out):
    score(Job(out, adapter, table_of(manifest, id="accession", scanner="", date=""), "run"))
    assert [row["id"] for row in read_all(out, SCORES)][:3] == [f"{SECRET}A{number}" for number in range(3)]
    assert read_all(out, FAILURES)[0]["id"] == f"{SECRET}A{BROKEN}"
    assert {(row["scanner"], row["date"]) for row in read_all(out, SCORES)} == {(None, None)}


def test_volumes_in_files_and_in_shards_are_read_through_the_window_and_at_the_slice(adapter, tmp_path, out):
    volume = np.random.default_rng(0).normal(0, 300, (40, 50, 4)).astype(np.float32)
    file = write_nifti(tmp_path / "v.nii.gz", volume)
    write_shard(tmp_path / "v.tar", [("a.nii.gz", file.read_bytes())])
    detector, _ = load_adapter(adapter)
    (wanted,) = detector.predict([read_scan(file, slice_index=1, window=(40.0, 400.0))])
    assert wanted.score != pytest.approx(detector.predict([read_scan(file)])[0].score, abs=1e-4)
    manifest = write_manifest(tmp_path / "m.csv", [{"path": "v.nii.gz"}])
    for run, path in enumerate((manifest, tmp_path / "v.tar")):
        source = Source(path, Columns(id=KEY_COLUMN))
        score(Job(out, adapter, source, str(run), window=(40.0, 400.0), slice_index=1))
        assert read_all(out, SCORES)[0]["score"] == pytest.approx(wanted.score, abs=1e-6)
    assert read_all(out, SCORES)[0]["id"] == "a"


def test_a_finished_part_is_left_alone_and_a_damaged_or_foreign_one_made_again(adapter, manifest, out):
    job = Job(out, adapter, table_of(manifest), "run")
    score(job)
    file = part_file(out, SCORES, 1)
    before = file.stat().st_mtime_ns, part_file(out, MAPS, 1).stat().st_mtime_ns
    score(job)
    assert (file.stat().st_mtime_ns, part_file(out, MAPS, 1).stat().st_mtime_ns) == before
    whole = parquet.read_table(file)
    file.write_bytes(file.read_bytes()[:-20])
    assert count_part(out, 1, "run") is None
    score(job)
    assert parquet.read_table(file) == whole
    assert count_part(out, 1, "another run") is None


def test_a_scan_that_can_be_read_the_second_time_is_no_failure_any_more(adapter, manifest, out):
    job = Job(out, adapter, table_of(manifest), "run")
    score(job)
    draw(manifest.parent / f"{SECRET}-{BROKEN:03d}.png", 5)
    part_file(out, SCORES, BROKEN // 5).unlink()
    score(job)
    assert [row["row"] for row in read_all(out, FAILURES)] == [MISSING]
    assert BROKEN in [row["row"] for row in read_all(out, SCORES)]


class Killed(BaseException):
    """Stands for the end of the process: nothing in the worker may catch it."""


@pytest.mark.parametrize("where", ["read", "mapped"])
def test_a_scan_that_ends_the_process_becomes_a_failure_after_three_attempts(
    adapter, manifest, out, monkeypatch, where
):
    job = Job(out, adapter, table_of(manifest), "run")
    part = job.source.plan(5)[0][0]
    scorer = Scorer(job)
    predict = scorer.detector.predict

    def read(path, **options):
        if where == "read" and Path(path).name == f"{SECRET}-003.png":
            raise Killed
        return read_scan(path, **options)

    def mapped(scans):
        if where == "mapped" and any(scan.label == "row 3" for scan in scans):
            raise Killed
        return predict(scans)

    monkeypatch.setattr("fmclip.contrastive.pairs.read_scan", read)
    monkeypatch.setattr(scorer.detector, "predict", mapped)
    for _ in range(3):
        with pytest.raises(Killed):
            scorer.score(part)
        assert not part_file(out, SCORES, 0).exists()
    assert scorer.score(part) == (4, 1)
    (failure,) = read_all(out, FAILURES)
    assert failure["row"] == 3
    assert "ended the program" in failure["reason"]
    assert [row["row"] for row in read_all(out, SCORES)] == [0, 1, 2, 4]
    assert not list((out / ATTEMPTS).iterdir())


def test_a_disk_that_is_full_is_no_fault_of_the_last_scan(adapter, manifest, out, monkeypatch):
    job = Job(out, adapter, table_of(manifest), "run")
    part = job.source.plan(5)[0][0]
    scorer = Scorer(job)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(scorer.detector, "predict", lambda scans: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            scorer.score(part)  # from now on, scans are begun one by one, with notes
    with monkeypatch.context() as patch:
        patch.setattr("fmclip.archive.scorer.write_part", full)
        for _ in range(4):
            with pytest.raises(OSError, match="No space"):
                scorer.score(part)
    assert scorer.score(part) == (5, 0)


def test_a_part_that_is_tried_again_keeps_its_files_until_the_new_ones_are_whole(adapter, manifest, out, monkeypatch):
    job = Job(out, adapter, table_of(manifest), "run", retry_failures=True)
    part = job.source.plan(5)[0][BROKEN // 5]
    assert Scorer(job).score(part) == (4, 1)
    before = {file: file.read_bytes() for file in out.rglob("*.parquet")}
    assert len(before) == 3
    draw(manifest.parent / f"{SECRET}-{BROKEN:03d}.png", 5)
    with monkeypatch.context() as patch:
        synced = iter([None])  # the scores are whole, the maps are not

        def fsync(descriptor):
            if next(synced, "full") == "full":
                raise OSError(28, "No space left on device")

        patch.setattr("fmclip.archive.parts.os.fsync", fsync)
        with pytest.raises(OSError, match="No space"):
            Scorer(job).score(part)
    assert {file: file.read_bytes() for kind in (SCORES, FAILURES, MAPS) for file in (out / kind).iterdir()} == before
    for number in range(5, 10):
        if number != BROKEN:
            (manifest.parent / f"{SECRET}-{number:03d}.png").rename(manifest.parent / f"{number}.away")
    assert Scorer(job).score(part) == (4, 1), "fewer scans can be mapped than before: what is there stays"
    for number in range(5, 10):
        if number != BROKEN:
            (manifest.parent / f"{number}.away").rename(manifest.parent / f"{SECRET}-{number:03d}.png")
    assert Scorer(job).score(part) == (5, 0)
    assert not list((out / FAILURES).iterdir())


def test_a_scan_that_the_memory_is_too_small_for_does_not_take_others_with_it(adapter, manifest, out, monkeypatch):
    job = Job(out, adapter, table_of(manifest), "run")
    scorer = Scorer(job)
    predict = scorer.detector.predict

    def small(scans):
        if any(scan.label == "row 1" for scan in scans):
            raise MemoryError
        return predict(scans)

    monkeypatch.setattr(scorer.detector, "predict", small)
    assert scorer.score(job.source.plan(5)[0][0]) == (4, 1)
    (failure,) = read_all(out, FAILURES)
    assert (failure["row"], "memory" in failure["reason"]) == (1, True)


def test_no_more_scans_are_held_than_fit(adapter, manifest, out, monkeypatch):
    monkeypatch.setattr(fmclip.archive.scorer, "MAX_VALUES", 2 * 40 * 50 - 1)
    scorer = Scorer(Job(out, adapter, table_of(manifest), "run"))
    predict, sizes = scorer.detector.predict, []
    monkeypatch.setattr(scorer.detector, "predict", lambda scans: sizes.append(len(scans)) or predict(scans))
    scorer.score(scorer.job.source.plan(5)[0][0])
    assert sizes == [2, 2, 1]
