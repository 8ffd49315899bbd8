"""Exported graphs answer as the detector does, without fmclip, and tell nothing of the scans or the machine."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fmclip.export
import fmclip.export_cli  # adds the command
from fmclip.calibration import Calibration
from fmclip.checkpoint import load_adapter, save_adapter
from fmclip.cli import app
from fmclip.detectors import DETECTORS, Detector, FusionMedCLIP, FusionMedCLIPConfig, PatchMemory
from fmclip.detectors.base import to_pixels
from fmclip.errors import ExportError, NotFittedError
from fmclip.export import export_detector
from fmclip.scans import Scan, read_scan

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SERVE = Path(__file__).parents[1] / "examples" / "serve_onnx.py"


def _scan(seed: int, height: int = 64, width: int = 64, label: str = "scan") -> Scan:
    texture = cv2.GaussianBlur(np.random.default_rng(seed).random((height, width), dtype=np.float32), (0, 0), 2)
    return Scan(np.clip(2 * texture - 0.5, 0, 1), label)


def _calibration(detector: Detector) -> Calibration:
    return detector.calibration()


@pytest.fixture(scope="module")
def adapter(tiny_tower, tmp_path_factory) -> Path:
    """FusionMedCLIP after both stages: memory, prompts, adapters and merged LoRA."""
    config = FusionMedCLIPConfig(scan_type="knee X-ray", stage2_epochs=2, stage3_epochs=2, pool_size=8, lora_lr=1e-2)
    detector = FusionMedCLIP(tiny_tower, config).fit([_scan(seed, label="Jane Doe") for seed in range(4)])
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    save_adapter(path, detector, _calibration(detector), window="as stored")
    return path


@pytest.fixture(scope="module")
def exported(adapter) -> tuple[Path, str]:
    """The file as the command writes it, and what the command said."""
    path = adapter.with_name("detector.onnx")
    result = CliRunner().invoke(app, ["export", str(adapter), "--to", "onnx", "--out", str(path)])
    assert result.exit_code == 0, result.stderr
    return path, result.stdout


@pytest.fixture(scope="module")
def memory(tiny_tower) -> PatchMemory:
    return PatchMemory(tiny_tower).fit([_scan(seed) for seed in range(3)])


@pytest.mark.parametrize("shapes", [[(64, 64)], [(50, 90), (200, 120), (64, 64), (31, 64), (64, 40)]])
def test_onnx_answers_as_the_detector_for_any_number_of_scans(exported, adapter, shapes):
    detector, _ = load_adapter(adapter)
    scans = [_scan(100 + place, *shape) for place, shape in enumerate(shapes)]
    pixels, content, boxes = to_pixels(scans, detector.tower)
    session = onnxruntime.InferenceSession(str(exported[0]))
    maps, scores = session.run(["map", "score"], {"pixels": pixels.numpy(), "content": content.numpy()})
    assert len(maps) == len(scores) == len(scans)
    for own, box, square, score in zip(detector.predict(scans), boxes, maps, scores, strict=True):
        np.testing.assert_allclose(box.restore(square), own.map, atol=1e-3)
        assert score == pytest.approx(own.score, abs=1e-3)
    assert np.std([own.score for own in detector.predict(scans)] + [0]) > 1e-2  # no constant answer passes


def test_the_command_says_how_far_the_file_is_from_the_detector(exported):
    difference = float(re.search(r"Largest difference .*: (\S+)\.$", exported[1].strip())[1])
    assert difference < 1e-3


def test_the_file_says_how_to_ask_it_and_what_its_numbers_mean(exported, adapter):
    _, calibration = load_adapter(adapter)
    session = onnxruntime.InferenceSession(str(exported[0]))
    about = session.get_modelmeta().custom_metadata_map
    assert float(about["threshold"]) == calibration.threshold
    assert json.loads(about["reference_scores"]) == list(calibration.reference_scores)
    assert (about["image_size"], about["tower"], about["method"]) == ("64", "tiny", "fusionmedclip")
    assert (about["scan_type"], about["window"]) == ("knee X-ray", "as stored")
    assert "Research use only" in about["research_use"]
    assert about["fmclip_version"]
    inputs = {one.name: one.shape for one in session.get_inputs()}
    assert inputs == {"pixels": ["batch", 3, 64, 64], "content": ["batch", 64, 64]}
    assert {one.name: one.shape for one in session.get_outputs()} == {"map": ["batch", 64, 64], "score": ["batch"]}


def test_no_path_and_no_label_stands_in_a_file(exported, memory, tmp_path):
    export_detector(tmp_path / "detector.pt2", memory, _calibration(memory), kind="torch")
    with zipfile.ZipFile(tmp_path / "detector.pt2") as archive:
        texts = [name.encode() + archive.read(name) for name in archive.namelist()]
    folders = {str(Path(fmclip.export.__file__).parents[1]), str(Path(torch.__file__).parents[1]), str(tmp_path)}
    for text in [exported[0].read_bytes(), *texts]:
        assert b"Jane" not in text
        assert not any(folder.encode() in text for folder in folders)


def _serve(exported: Path, picture: Path, heatmap: Path) -> subprocess.CompletedProcess:
    blocked = "import sys, runpy; sys.modules.update(fmclip=None, torch=None, cv2=None); sys.argv = sys.argv[1:]; "
    command = [sys.executable, "-c", f"{blocked}runpy.run_path(sys.argv[0])", SERVE, exported, picture, heatmap]
    return subprocess.run(command, capture_output=True, text=True, cwd=picture.parent, check=False)


def test_thirty_lines_serve_it_without_fmclip(exported, adapter, tmp_path):
    assert len(SERVE.read_text().splitlines()) <= 30
    picture, heatmap = tmp_path / "scan.png", tmp_path / "heat.png"
    cv2.imwrite(str(picture), np.uint8(255 * _scan(7, 150, 101).pixels))
    result = _serve(exported[0], picture, heatmap)
    assert result.returncode == 0, result.stderr
    detector, calibration = load_adapter(adapter)
    scan = read_scan(picture)
    (own,) = detector.predict([scan])
    score, verdict = re.match(r"score (\S+), threshold \S+: (.*)", result.stdout).groups()
    assert float(score) == pytest.approx(own.score, abs=1e-3)
    assert verdict == calibration.verdict(own.score)
    heat = own.map[..., None]
    shown = cv2.imread(str(heatmap))[..., ::-1] / 255
    np.testing.assert_allclose(shown, (1 - heat) * scan.pixels[..., None] + heat * [1, 0.3, 0], atol=2 / 255)


@pytest.mark.parametrize("shape", [(80, 64), (80, 64, 3)])
def test_pictures_that_the_thirty_lines_would_read_otherwise_are_refused(exported, tmp_path, shape):
    picture = tmp_path / "scan.png"
    cv2.imwrite(str(picture), np.random.default_rng(0).integers(2**16, size=shape, dtype=np.uint16))
    result = _serve(exported[0], picture, tmp_path / "heat.png")
    assert result.returncode != 0
    assert "8-bit grey or RGB" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_detector_that_learned_with_a_window_is_not_asked_about_plain_pictures(memory, tmp_path):
    picture = tmp_path / "scan.png"
    cv2.imwrite(str(picture), np.uint8(255 * _scan(7).pixels))
    export_detector(tmp_path / "lung.onnx", memory, _calibration(memory), kind="onnx", window="lung")
    assert "without a window" in _serve(tmp_path / "lung.onnx", picture, tmp_path / "heat.png").stderr


@pytest.mark.parametrize(
    ("broken", "error"), [("InferenceSession", RuntimeError("/home/someone/x.onnx")), ("_strip", ValueError("two"))]
)
def test_what_fails_after_the_recording_is_told_in_words_and_leaves_no_file(
    memory, tmp_path, monkeypatch, broken, error
):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(onnxruntime if broken == "InferenceSession" else fmclip.export, broken, fail)
    with pytest.raises(ExportError, match=f"could not be written or does not run .{type(error).__name__}.") as told:
        export_detector(tmp_path / "detector.onnx", memory, _calibration(memory), kind="onnx")
    assert "someone" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cosine", "two_layer", "madclip", "guided_memory", "fusionmedclip_published"])
def test_the_other_methods_are_recorded_too(name, tiny_tower, tmp_path):
    kind = DETECTORS[name]
    short = {"epochs": 1, "pool_size": 8} if "epochs" in kind.config_class().to_dict() else {}
    abnormals = [_scan(9), _scan(10)] if kind.uses_abnormals == "required" else None
    detector = kind(tiny_tower, kind.config_class.preset("fast", **short)).fit(
        [_scan(seed) for seed in range(3)], abnormals
    )
    path = tmp_path / "detector.pt2"
    assert export_detector(path, detector, _calibration(detector), kind="torch") < 1e-3
    scans = [_scan(20, 40, 64), _scan(21), _scan(22), _scan(23)]
    pixels, content, _ = to_pixels(scans, tiny_tower)
    maps, scores = torch.export.load(path).module()(pixels, content)
    np.testing.assert_allclose(scores, [own.score for own in detector.predict(scans)], atol=1e-3)
    np.testing.assert_allclose(maps[1], detector.predict(scans)[1].map, atol=1e-3)


def test_a_method_that_embeds_words_for_each_scan_is_refused_and_leaves_no_file(tiny_tower, tmp_path):
    kind = DETECTORS["conrad"]
    config = kind.config_class.preset("fast", epochs=1, pool_size=8)
    detector = kind(tiny_tower, config).fit([_scan(seed) for seed in range(3)])
    with pytest.raises(ExportError, match=r"conrad.*Choose another method"):
        export_detector(tmp_path / "detector.pt2", detector, _calibration(detector), kind="torch")
    assert not list(tmp_path.iterdir())


def test_a_file_that_answers_otherwise_is_dropped_and_the_older_one_stays(memory, tmp_path, monkeypatch):
    path = tmp_path / "detector.pt2"
    path.write_bytes(b"older")
    record = fmclip.export._record

    def otherwise(detector):
        other = PatchMemory(detector.tower).fit([_scan(seed) for seed in range(50, 53)])
        return record(other)

    monkeypatch.setattr(fmclip.export, "_record", otherwise)
    with pytest.raises(ExportError, match="dropped"):
        export_detector(path, memory, _calibration(memory), kind="torch")
    assert path.read_bytes() == b"older"
    assert [one.name for one in tmp_path.iterdir()] == ["detector.pt2"]


def test_without_the_extra_it_says_what_to_install(memory, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ExportError, match=r"pip install 'fmclip\[export\]'"):
        export_detector(tmp_path / "detector.onnx", memory, _calibration(memory), kind="onnx")


def test_nothing_learned_is_nothing_to_export(tiny_tower, memory, tmp_path):
    with pytest.raises(NotFittedError):
        export_detector(tmp_path / "x.pt2", PatchMemory(tiny_tower), _calibration(memory), kind="torch")


def test_a_name_that_hides_the_format_is_refused(adapter, tmp_path):
    result = CliRunner().invoke(app, ["export", str(adapter), "--to", "torch", "--out", str(tmp_path / "x.onnx")])
    assert result.exit_code == 1
    assert ".pt2" in result.stderr
