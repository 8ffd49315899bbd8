"""`python -m fmclip evaluate` and the quality benchmark, from folders to files."""

import json
from pathlib import Path

import cv2
import pytest
from typer.testing import CliRunner, Result

import benchmarks.quality
import fmclip.detectors.fusionmedclip
import fmclip.evaluation_cli
from fmclip.cli import app


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Train for a moment only."""
    short = {"stage2_epochs": 1, "stage3_epochs": 0, "pool_size": 8}
    monkeypatch.setattr(fmclip.detectors.fusionmedclip, "PRESETS", {"fast": short, "full": short})


@pytest.fixture
def root(make_folders, tmp_path) -> Path:
    make_folders(tmp_path / "data", normal=6, abnormal=3)
    return make_folders(tmp_path / "data", "others", normal=6, abnormal=3, seed=4)


def _evaluate(root: Path, *options: object) -> Result:
    result = CliRunner().invoke(app, ["evaluate", str(root), "--tower", "tiny", "--k", "3", *map(str, options)])
    assert result.exit_code == 0, result.stderr
    return result


def test_resume_table_and_figures(root, tmp_path):
    runs, table, figures = tmp_path / "runs.jsonl", tmp_path / "table.md", tmp_path / "figures"
    options = ("--dataset", "blobs", "--methods", "patch_memory", "--resume", runs)
    _evaluate(root, *options, "--seeds", 1)
    first = runs.read_text()
    result = _evaluate(root, *options, "--seeds", 2, "--table", table, "--figures", figures)
    assert runs.read_text().startswith(first)  # kept as it was; one run was added
    assert len(runs.read_text().splitlines()) == 2
    assert "| patch_memory | 3 | 2 |" in table.read_text()
    assert {path.name for path in figures.iterdir()} == {
        f"blobs_tiny_patch_memory_k3_{kind}.png" for kind in ("roc", "scores")
    }
    assert "have no heatmaps" in result.stderr  # the first seed was measured before figures were asked for


def test_all_methods_learn_from_another_dataset(root, tmp_path):
    file = tmp_path / "rows.json"
    options = ("--methods", "all", "--seeds", 1, "--preset", "fast", "--json", file)
    _evaluate(root, "--dataset", "blobs", "--fit-on", "others", *options)
    rows = json.loads(file.read_text())["rows"]
    assert {row["method"] for row in rows} >= {"fusionmedclip", "patch_memory"}
    assert {(row["dataset"], row["fit_on"], row["n_normal"]) for row in rows} == {("blobs", "others", 6)}


def test_a_scan_that_cannot_be_read_is_told_without_its_name(root):
    (root / "blobs/normal/1.png").rename(root / "blobs/normal/jane.png")
    (root / "blobs/normal/jane.png").write_text("no picture")
    result = _evaluate(root, "--dataset", "blobs", "--method", "patch_memory", "--seeds", 1)
    assert "blobs: 1 files that cannot be read" in result.stderr
    assert "jane" not in result.stderr + result.stdout


def test_a_copy_in_the_set_that_is_learned_from_is_not_tested(root, tmp_path):
    file = tmp_path / "rows.json"
    count = len(list((root / "others/normal").iterdir()))
    picture = cv2.imread(str(root / "others/normal/1.png"), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(root / "blobs/normal/1.png"), picture[:, ::-1])
    options = ("--dataset", "blobs", "--fit-on", "others", "--method", "patch_memory", "--seeds", 1, "--k", count)
    result = _evaluate(root, *options, "--json", file)
    assert "blobs: 1 scans look like scans of others" in " ".join(result.stderr.split())
    *_, row = json.loads(file.read_text())["rows"]
    assert (row["k"], row["n_twins"], row["n_normal"]) == (count, 1, 5)


@pytest.mark.parametrize("options", [(), ("--dataset", "blobs")])
def test_what_was_left_out_of_the_set_learned_from_is_told_once(root, options):
    (root / "others/normal/1.png").write_text("no picture")
    result = _evaluate(root, *options, "--fit-on", "others", "--method", "patch_memory", "--seeds", 1)
    assert result.stderr.count("others: 1 files that cannot be read") == 1


def test_a_dataset_is_a_root_of_its_own(root):
    assert "blobs" in _evaluate(root / "blobs", "--method", "patch_memory", "--seeds", 1, "--abnormal-k", 1).stdout


def test_the_benchmark_prints_the_command_that_repeats_it(root, tmp_path, monkeypatch, capsys):
    options = ["--tower", "tiny", "--k", "3", "--seeds", "1", "--half", "all", "--method", "patch_memory"]
    places = ["--out", str(tmp_path / "out"), "--resume", str(tmp_path / "runs.jsonl")]
    monkeypatch.setattr("sys.argv", ["quality", str(root), *options, *places])
    (tmp_path / "out").mkdir()
    benchmarks.quality.main()
    page = (tmp_path / "out/quality.md").read_text()
    command = "python -m benchmarks.quality ROOT --method patch_memory --tower tiny --half all --k 3 --seeds 1"
    assert f"`{command}`" in page
    assert str(tmp_path) not in page
    assert page.strip() in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out/quality.json").read_text())["rows"]) == 2
