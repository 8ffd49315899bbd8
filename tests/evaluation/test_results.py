"""Resuming, tables and figures of an evaluation."""

import json
from dataclasses import replace

import cv2
import pytest

import fmclip.evaluation.runner
from fmclip.detectors import PatchMemory
from fmclip.evaluation import Dataset, DatasetError, Journal, Plan, Results, Skipped, load_datasets, run_plan, summarise
from fmclip.evaluation.intervals import TestScores
from fmclip.evaluation.plots import methods_by_k, save_by_k
from fmclip.evaluation.rows import Run
from fmclip.evaluation.tables import by_k, markdown


@pytest.fixture
def plan(make_folders, tmp_path) -> Plan:
    return Plan(load_datasets(make_folders(tmp_path / "data")), ["patch_memory"], [4], [0, 1], "full")


@pytest.fixture
def fits(monkeypatch) -> list[int]:
    """Count the scans of each fit."""
    counts: list[int] = []
    fit = PatchMemory.fit
    monkeypatch.setattr(PatchMemory, "fit", lambda self, scans, **options: counts.append(1) or fit(self, scans))
    return counts


@pytest.fixture
def run(plan, tiny_tower) -> Run:
    return next(iter(run_plan(plan, tiny_tower)))


def _resume(plan, tower, file):
    return list(run_plan(plan, tower, journal=Journal(file)))


def test_what_was_measured_is_not_measured_again(plan, tiny_tower, tmp_path, fits):
    file = tmp_path / "new" / "runs.jsonl"
    first = _resume(replace(plan, seeds=[0]), tiny_tower, file)
    both = _resume(plan, tiny_tower, file)
    assert len(fits) == 2
    assert both[0].row == first[0].row
    assert both[0].scores == first[0].scores
    assert len(file.read_text().splitlines()) == 2


def test_a_line_that_was_cut_short_is_measured_again(plan, tiny_tower, tmp_path, fits):
    file = tmp_path / "runs.jsonl"
    _resume(plan, tiny_tower, file)
    file.write_bytes(file.read_bytes()[:-20])
    assert len(_resume(plan, tiny_tower, file)) == 2
    assert len(fits) == 3
    _resume(plan, tiny_tower, file)
    assert len(fits) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"preset": "fast"},
        {"ks": [3]},
        {"abnormal_k": 1},
        {"half": fmclip.evaluation.Half.REPORT, "ks": [2]},
        {"protocol": fmclip.evaluation.Protocol.RAW},
    ],
)
def test_other_settings_are_measured_anew(plan, tiny_tower, tmp_path, fits, change):
    file = tmp_path / "runs.jsonl"
    plan = replace(plan, seeds=[0])
    _resume(plan, tiny_tower, file)
    _resume(replace(plan, **change), tiny_tower, file)
    assert len(fits) == 2


def test_other_code_or_data_is_measured_anew(plan, tiny_tower, tmp_path, fits, monkeypatch):
    file = tmp_path / "runs.jsonl"
    plan = replace(plan, seeds=[0])
    _resume(plan, tiny_tower, file)
    fewer = replace(plan.datasets[0], cases=plan.datasets[0].cases[:-1])
    _resume(replace(plan, datasets=[fewer]), tiny_tower, file)
    monkeypatch.setattr(fmclip.evaluation.runner, "code_digest", lambda: "another")
    _resume(plan, tiny_tower, file)
    assert len(fits) == 3


def test_files_are_asked_about_once_for_all_runs_and_may_be_missing(plan, tiny_tower, tmp_path, fits, monkeypatch):
    asked: list[str] = []
    fingerprint = Dataset.fingerprint
    monkeypatch.setattr(Dataset, "fingerprint", lambda self: asked.append(self.name) or fingerprint(self))
    plan.datasets[0].cases[0].path.unlink()
    first = _resume(plan, tiny_tower, tmp_path / "runs.jsonl")
    assert [result.row.n_unreadable for result in first] == [1, 1]
    assert asked == ["blobs"]
    assert [result.row for result in _resume(plan, tiny_tower, tmp_path / "runs.jsonl")] == [one.row for one in first]
    assert len(fits) == 2


def test_a_file_of_another_kind_is_not_resumed_from_nor_written_over(tmp_path):
    (tmp_path / "notes.txt").write_text("my notes\n")
    with pytest.raises(DatasetError, match="not written by an evaluation"):
        Journal(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "my notes\n"


def test_no_file_name_of_a_scan_is_written(plan, tiny_tower, tmp_path):
    for path in (tmp_path / "data/blobs").glob("*/*.png"):
        path.rename(path.with_name(f"DOE_JANE_{path.name}"))
    plan = replace(plan, datasets=load_datasets(tmp_path / "data"), seeds=[0], examples=True)
    results = Results(tmp_path / "rows.json", tmp_path / "table.md", tmp_path / "figures")
    for result in run_plan(plan, tiny_tower, journal=Journal(tmp_path / "runs.jsonl")):
        results.add(result)
    results.draw()
    written = [path for name in ("rows.json", "table.md", "runs.jsonl", "figures/*") for path in tmp_path.glob(name)]
    assert len(written) == 6
    for path in written:
        assert b"DOE_JANE" not in path.read_bytes()
        assert "DOE" not in path.name
    content = json.loads((tmp_path / "rows.json").read_text())
    assert set(content) == {"rows", "environment"}


def test_figures_are_written_for_each_dataset_method_and_k(plan, tiny_tower, tmp_path):
    results = Results(figures=tmp_path / "figures")
    for result in run_plan(replace(plan, ks=[3, 4], examples=True), tiny_tower):
        results.add(result)
    results.draw()
    names = {f"blobs_tiny_patch_memory_k{k}_{kind}.png" for k in (3, 4) for kind in ("scores", "roc", "examples")}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == names
    grid = cv2.imread(str(tmp_path / "figures/blobs_tiny_patch_memory_k3_examples.png"))
    assert grid.shape[1] > grid.shape[0] > 500


def test_the_halves_are_drawn_apart(run, tmp_path):
    results = Results(figures=tmp_path)
    for half in ("tuning", "report"):
        results.add(replace(run, row=replace(run.row, half=half)))
    results.draw()
    assert {path.name for path in tmp_path.glob("*_roc.png")} == {
        "blobs_tiny_patch_memory_k4_tuning_roc.png",
        "blobs_tiny_patch_memory_k4_report_roc.png",
    }


def test_methods_and_towers_are_drawn_side_by_side(run, tmp_path):
    results = Results(figures=tmp_path)
    for tower in ("mini", "other"):
        for method in ("patch_memory", "cosine"):
            results.add(replace(run, row=replace(run.row, tower=tower, method=method)))
    results.add(replace(run, row=replace(run.row, tower="mini", k=8)))  # nothing beside it
    results.draw()
    assert {path.name for path in tmp_path.glob("*_methods.png")} == {
        "blobs_k4_methods.png",
        "blobs_other_k4_methods.png",
    }
    assert (tmp_path / "blobs_patch_memory_k4_roc.png").is_file()
    assert (tmp_path / "blobs_other_patch_memory_k4_roc.png").is_file()


def test_seeds_are_summed_up(run):
    values = (0.90, 0.92, 0.94)
    runs = [replace(run, row=replace(run.row, seed=seed, image_auroc=value)) for seed, value in enumerate(values)]
    runs.append(replace(run, row=replace(run.row, k=8, image_auroc=0.95, pixel_auroc=None)))
    first, second = summarise(runs)
    assert first.seeds == 3
    assert first.metrics["image_auroc"] == pytest.approx((0.92, 0.02))
    assert "pixel_auroc" not in second.metrics
    assert second.metrics["image_auroc"] == (0.95, None)


def _with_method(run: Run, method: str, auroc: float, abnormal_k: int = 0) -> Run:
    row = replace(run.row, method=method, image_auroc=auroc, abnormal_k=abnormal_k, seed=0)
    return replace(run, row=row)


def test_the_table_ranks_methods_and_compares_them_with_the_default(run):
    numbers = tuple(range(40))
    good = TestScores(numbers, numbers, (True, False) * 20, (0.9, 0.1) * 20, 0.5)
    poor = replace(good, score=(0.1, 0.9) * 20)
    runs = [
        replace(_with_method(run, "patch_memory", 0.5), scores=poor),
        replace(_with_method(run, "fusionmedclip", 0.9), scores=good),
    ]
    lines = markdown(runs).splitlines()
    rows = [line for line in lines if line.startswith(("| fusion", "| patch"))]
    assert rows[0].startswith("| fusionmedclip | 4 | 1 | 90.0 | 100.0 to 100.0 | – |")
    assert rows[1].startswith("| patch_memory | 4 | 1 | 50.0 | 0.0 to 0.0 | -100.0 (p < 0.01) |")


def test_methods_that_saw_abnormal_scans_stand_in_a_table_of_their_own(run):
    runs = [_with_method(run, "fusionmedclip", 0.9), _with_method(run, "madclip", 0.99, abnormal_k=4)]
    text = markdown(runs)
    first, second = text.split("Learned from k normal and 4 abnormal scans:")
    assert "fusionmedclip" in first
    assert "madclip" not in first
    assert "madclip" in second
    assert "fusionmedclip" not in second
    assert summarise(runs)[1].comparison is None


def test_what_was_skipped_is_named_once_with_its_reason(run):
    skipped = [Skipped("blobs", "conrad", "tiny", k, seed, "needs a transformer") for k in (4, 8) for seed in (0, 1)]
    assert markdown([run], skipped).count("conrad") == 1
    assert "- blobs, conrad, k = 4, 8: needs a transformer" in markdown([run], skipped)


def test_methods_against_k_are_one_line_each_and_leave_out_abnormal_scans(run, tmp_path):
    def made(method: str, k: int, auroc: float, abnormal_k: int = 0) -> Run:
        return replace(run, row=replace(run.row, method=method, k=k, image_auroc=auroc, abnormal_k=abnormal_k))

    runs = [made("cosine", 8, 0.7), made("cosine", 4, 0.6), made("patch_memory", 4, 0.9), made("two_layer", 4, 0.8, 4)]
    (compared,) = by_k(runs)
    assert {(own.method, own.k) for own in compared} == {("cosine", 8), ("cosine", 4), ("patch_memory", 4)}
    assert by_k(runs[1:]) == []  # one k only
    lines = {line.get_label(): line.get_xydata().tolist() for line in methods_by_k(compared, "").axes[0].lines}
    assert lines["cosine"] == [[4, 60], [8, 70]]
    assert lines["patch_memory"] == [[4, 90]]
    save_by_k(tmp_path, compared)
    assert [file.name for file in tmp_path.glob("*by-k*")] == [f"{run.row.dataset}_{run.row.tower}_by-k_methods.png"]
