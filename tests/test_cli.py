"""The three commands, from files to files."""

import csv
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scan_files import write_nifti
from typer.testing import CliRunner, Result

import fmclip.cli
import fmclip.detectors.fusionmedclip
import fmclip.evaluation_cli
from fmclip import shortage
from fmclip.cli import app
from fmclip.detectors import FusionMedCLIP


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Train for a moment only."""
    short = {"stage2_epochs": 1, "stage3_epochs": 0, "pool_size": 8}
    monkeypatch.setattr(fmclip.detectors.fusionmedclip, "PRESETS", dict.fromkeys(("fast", "full", "paper"), short))


@pytest.fixture
def scans(tmp_path) -> Path:
    """Folders `normal` (n0 ... n5) and `query` (plain, blob) of simulated scans, 40 x 50 pixels."""
    generator = np.random.default_rng(0)
    for folder, names in (("normal", [f"n{i}" for i in range(6)]), ("query", ["plain", "blob"])):
        (tmp_path / folder).mkdir()
        for name in names:
            texture = cv2.GaussianBlur(generator.normal(0, 1, (40, 50)), (0, 0), 1.5)
            pixels = np.clip(90 + 25 * texture / texture.std(), 0, 255).astype(np.uint8)
            if name == "blob":
                cv2.circle(pixels, (35, 12), 7, 240, -1)
            cv2.imwrite(str(tmp_path / folder / f"{name}.png"), pixels)
    return tmp_path


def _run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def _fails(message: str, *arguments: object) -> None:
    result = _run(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not result.stdout.strip()


def _adapt(scans: Path) -> Path:
    adapter = scans / "out" / "adapter.safetensors"
    result = _run("adapt", scans / "normal", "--out", adapter, "--tower", "tiny", "--scan-type", "knee X-ray")
    assert result.exit_code == 0, result.stderr
    return adapter


@pytest.fixture
def adapter(scans) -> Path:
    return _adapt(scans)


def _rows(out: Path) -> list[dict]:
    with (out / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_adapt_then_predict(scans, adapter):
    out = scans / "maps"
    result = _run("predict", adapter, scans / "query", "--out", out)
    assert result.exit_code == 0, result.stderr
    blob, plain = _rows(out)
    assert list(blob) == ["file", "score", "threshold", "verdict", "rank"]
    assert Path(blob["file"]) == scans / "query" / "blob.png"
    assert float(blob["score"]) > float(plain["score"])
    assert blob["rank"] in {f"higher than {count} of 6 reference scans" for count in (4, 5)} | {
        "higher than all 6 reference scans"
    }  # a random tower: in the upper part of the references, worded as a rank
    for row in (blob, plain):
        is_above = float(row["score"]) > float(row["threshold"])
        assert row["verdict"] == ("deviates" if is_above else "within the references")
    assert {path.name for path in out.iterdir()} == {
        "scores.csv",
        "run.json",
        "blob_overlay.png",
        "blob_map.png",
        "plain_overlay.png",
        "plain_map.png",
    }
    anomaly_map = cv2.imread(str(out / "blob_map.png"), cv2.IMREAD_UNCHANGED)
    assert anomaly_map.dtype == np.uint16
    assert anomaly_map.shape == (40, 50)
    assert anomaly_map[12, 35] > np.median(anomaly_map)
    assert cv2.imread(str(out / "blob_overlay.png")).shape == (40, 50, 3)


def test_a_seed_repeats_its_adapter(scans, adapter):
    first = load_file(adapter)
    second = load_file(_adapt(scans))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_equal_stems_do_not_overwrite_each_other(scans, adapter):
    other = scans / "query" / "other"
    other.mkdir()
    (other / "Blob.PNG").write_bytes((scans / "query" / "plain.png").read_bytes())
    out = scans / "maps"
    _run("predict", adapter, scans / "query", "--out", out)
    assert len(_rows(out)) == 3
    assert {path.name.lower() for path in out.glob("*_map.png")} == {"blob_map.png", "blob-2_map.png", "plain_map.png"}


def test_files_that_cannot_be_read_are_told_and_the_others_go_on(scans, adapter):
    (scans / "query" / "broken.png").write_text("no picture")
    out = scans / "maps"
    result = _run("predict", adapter, scans / "query", "--out", out)
    assert result.exit_code == 0
    assert "scan 2" in result.stderr
    assert "broken" not in result.stderr  # names may tell who the patient is
    assert len(_rows(out)) == 2


def test_adapt_names_what_is_odd_about_the_references(scans):
    (scans / "normal" / "copy.png").write_bytes((scans / "normal" / "n0.png").read_bytes())
    result = _run("adapt", scans / "normal", "--out", scans / "a.safetensors", "--tower", "tiny")
    assert result.exit_code == 0
    assert "scan 1 and scan 2 are the same picture" in result.stderr


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "No normal scan was given"),
        (["normal/n0.png"], "Only one normal scan was given"),
        (["normal/n0.png"] * 65, "65 normal scans were given"),
        (["normal/n0.png", "missing.png"], "scan 2 was not found"),
    ],
)
def test_adapt_refuses_sets_that_are_too_small_or_too_large(scans, files, message):
    (scans / "empty").mkdir()
    paths = [scans / name for name in files] or [scans / "empty"]
    tower = "no-such-tower"  # the scans are looked at before a tower is loaded, which may take long
    _fails(message, "adapt", *paths, "--out", scans / "a.safetensors", "--tower", tower)
    assert not (scans / "a.safetensors").exists()


def test_adapt_refuses_an_unknown_tower(scans):
    _fails("Error:", "adapt", scans / "normal", "--out", scans / "a.safetensors", "--tower", "no-such-tower")


def test_adapt_refuses_an_unknown_device(scans):
    arguments = ("adapt", scans / "normal", "--out", scans / "a.safetensors", "--tower", "tiny")
    _fails("no such device", *arguments, "--device", "cuda:99")


def test_adapt_does_not_write_over_a_folder(scans):
    _fails("--out is a folder", "adapt", scans / "normal", "--out", scans, "--tower", "tiny")


def test_outputs_that_cannot_be_written_are_told(scans, adapter):
    (scans / "taken").write_text("a file where a folder should be")
    _fails("could not be read or written", "predict", adapter, scans / "query", "--out", scans / "taken")


@pytest.mark.parametrize("data", [b"random bytes" * 10, pickle.dumps([1, 2, 3])])
def test_predict_refuses_what_is_no_adapter(scans, data):
    (scans / "a.safetensors").write_bytes(data)
    _fails("not an adapter file", "predict", scans / "a.safetensors", scans / "query", "--out", scans / "maps")


def test_predict_without_any_readable_scan_fails(scans, adapter):
    (scans / "notes.txt").write_text("nothing to see")
    _fails("None of the files", "predict", adapter, scans / "notes.txt", "--out", scans / "maps")


def test_a_folder_that_takes_no_file_is_told_before_the_training(scans):
    _fails("could not be", "adapt", scans / "normal", "--out", "/proc/a.safetensors", "--tower", "no-such-tower")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_told(scans, adapter):
    out = scans / "maps"
    out.mkdir()
    (out / "scores.csv").symlink_to("/dev/full")
    _fails("No space left", "predict", adapter, scans / "query", "--out", out)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_too_little_memory_is_told(scans, monkeypatch, error):
    def read_scans(*_args, **_options):
        raise error

    monkeypatch.setattr(fmclip.cli, "read_scans", read_scans)
    _fails("The memory ran out", "adapt", scans / "normal", "--out", scans / "a.safetensors")


def test_adapting_goes_on_on_the_processor_when_the_graphics_card_is_full(scans, monkeypatch):
    fit, tried = FusionMedCLIP.fit, []

    def short(self, *arguments, **named):
        tried.append(self)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fit(self, *arguments, **named)

    monkeypatch.setattr(FusionMedCLIP, "fit", short)
    monkeypatch.setattr(shortage, "is_on_gpu", lambda tower: True)
    result = _run("adapt", scans / "normal", "--out", scans / "a.safetensors", "--tower", "tiny", "--preset", "fast")
    assert result.exit_code == 0, result.stderr
    assert "begins again on the processor" in result.stderr
    assert (scans / "a.safetensors").exists()


def test_a_file_name_that_is_no_text_is_listed(scans, adapter):
    try:
        Path(os.fsdecode(bytes(scans / "query") + b"/\xff.png")).write_bytes((scans / "query/plain.png").read_bytes())
    except OSError:
        pytest.skip("this file system takes text only")
    result = _run("predict", adapter, scans / "query", "--out", scans / "maps")
    assert result.exit_code == 0, result.stderr
    assert len(_rows(scans / "maps")) == 3


def test_the_preset_of_the_paper_is_known(scans):
    options = ("--out", scans / "a.safetensors", "--tower", "tiny", "--preset", "paper")
    assert _run("adapt", scans / "normal", *options).exit_code == 0


@pytest.fixture
def volumes(tmp_path) -> Path:
    """Folder `ct` with volumes [50, 40, 3] in Hounsfield units: noise of water, air around; q has a blob in slice 2."""
    generator = np.random.default_rng(0)
    (tmp_path / "ct").mkdir()
    for name in ("n0", "n1", "n2", "n3", "n4", "q"):
        noise = cv2.GaussianBlur(generator.normal(0, 1, (50, 40, 3)), (0, 0), 1.5)
        values = (40 * noise / noise.std()).astype(np.int16)
        values[:4], values[-4:] = -1000, -1000
        if name == "q":
            values[20:32, 14:26, 2] = 250
        write_nifti(tmp_path / "ct" / f"{name}.nii", values)
    return tmp_path


def _adapt_volumes(volumes: Path, *options: object) -> Result:
    files = [volumes / "ct" / f"n{place}.nii" for place in range(5)]
    return _run("adapt", *files, "--out", volumes / "ct.safetensors", "--tower", "tiny", *options)


def _score(volumes: Path, *options: object) -> float:
    out = volumes / "maps"
    result = _run("predict", volumes / "ct.safetensors", volumes / "ct" / "q.nii", "--out", out, *options)
    assert result.exit_code == 0, result.stderr
    return float(_rows(out)[0]["score"])


def test_a_slice_is_chosen(volumes):
    assert _adapt_volumes(volumes, "--window", "soft-tissue", "--slice", 0).exit_code == 0
    assert _score(volumes, "--slice", 2) > _score(volumes, "--slice", 0)
    assert _score(volumes) == _score(volumes, "--slice", 1)  # the middle one
    arguments = ("predict", volumes / "ct.safetensors", volumes / "ct" / "q.nii", "--out", volumes / "maps")
    _fails("has no slice 9: its slices are 0 to 2", *arguments, "--slice", 9)


def test_the_window_of_the_references_is_that_of_the_queries(volumes):
    assert _adapt_volumes(volumes, "--window", "40,400").exit_code == 0
    narrow = _score(volumes, "--slice", 2)
    assert _score(volumes, "--slice", 2, "--window", "soft-tissue") == narrow  # the same one by its name
    arguments = ("predict", volumes / "ct.safetensors", volumes / "ct" / "q.nii", "--out", volumes / "maps")
    for other in ("lung", "-600,1500", "as-stored"):
        _fails("read with the window soft tissue", *arguments, "--window", other)
    assert _adapt_volumes(volumes).exit_code == 0
    assert _score(volumes, "--slice", 2, "--window", "as-stored") != narrow
    _fails("read with the window as stored", *arguments, "--window", "lung")


@pytest.mark.parametrize("window", ["lungs", "40", "40,0", "40,-400", "nan,400", "1e99,1", "1,2,3"])
def test_a_window_that_is_none_is_refused(scans, window):
    out = scans / "a.safetensors"
    _fails("Choose soft-tissue, lung", "adapt", scans / "normal", "--out", out, "--window", window)


def _dataset(scans: Path) -> Path:
    """Make ROOT/blobs/{normal,abnormal,masks} of the same scans."""
    root = scans / "root"
    (root / "blobs" / "abnormal").mkdir(parents=True)
    (root / "blobs" / "masks").mkdir()
    (scans / "normal").rename(root / "blobs" / "normal")
    (scans / "query" / "blob.png").rename(root / "blobs" / "abnormal" / "blob.png")
    cv2.imwrite(str(root / "blobs" / "masks" / "blob.png"), cv2.circle(np.zeros((40, 50)), (35, 12), 7, 255, -1))
    return root


def test_evaluate_writes_the_rows_as_json(scans):
    file = scans / "results" / "rows.json"
    options = ("--tower", "tiny", "--k", 3, "--k", 4, "--seeds", 2, "--preset", "fast", "--json", file)
    result = _run("evaluate", _dataset(scans), *options)
    assert result.exit_code == 0, result.stderr
    content = json.loads(file.read_text())
    assert set(content) == {"rows", "environment"}
    assert len(content["rows"]) == 2 * 2 * 2
    assert {row["method"] for row in content["rows"]} == {"fusionmedclip", "patch_memory"}
    row = content["rows"][0]
    wanted = "dataset method tower k seed protocol image_auroc pixel_auroc fit_seconds ms_per_scan n_normal n_abnormal"
    assert set(wanted.split()) <= set(row)
    assert (row["dataset"], row["tower"], row["k"], row["seed"], row["protocol"]) == ("blobs", "tiny", 3, 0, "unique")
    assert 0 <= row["image_auroc"] <= 1
    assert row["pixel_auroc"] > 0.5
    assert content["environment"]["torch"]
    assert "patch_memory" in result.stdout
    assert [path.name for path in file.parent.iterdir()] == ["rows.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "other"], "No dataset is called other; there are blobs"),
        (["--method", "oracle"], "No method is called oracle; there are fusionmedclip, patch_memory"),
        (["--k", "1"], "--k must lie between"),
        (["--k", "30"], "Nothing was measured"),
    ],
)
def test_evaluate_says_what_cannot_be_measured(scans, options, message):
    _fails(message, "evaluate", _dataset(scans), "--tower", "tiny", *options)


@pytest.mark.parametrize(
    "manifest",
    [
        "dataset,path,label\nk\u00f6rper,a.png,normal\n".encode("latin-1"),
        b"dataset,path,label,mask,group\nknee,,normal\n,a.png",
        b"label,dataset,path\nnormal,knee\n",
        b"dataset,path,label\nknee," + b"x" * 200_000 + b",normal\n",
        b"\x00\xff\xfe",
    ],
    ids=["latin-1", "no label", "short row", "long field", "binary"],
)
def test_evaluate_refuses_a_manifest_that_cannot_be_read(scans, manifest):
    (scans / "manifest.csv").write_bytes(manifest)
    _fails("manifest", "evaluate", scans, "--tower", "tiny")


@pytest.mark.slow
def test_errors_of_the_real_program_show_no_traceback(tmp_path):
    command = [sys.executable, "-m", "fmclip", "predict", "missing.safetensors", "scan.png", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: The adapter file was not found")
    assert "Traceback" not in result.stderr
