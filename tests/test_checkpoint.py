"""Adapters on disk: what comes back, and what is refused."""

import json
import pickle
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import fmclip.checkpoint
import fmclip.detectors
from fmclip.calibration import Calibration
from fmclip.checkpoint import load_adapter, read_window, save_adapter
from fmclip.detectors import FusionMedCLIP, FusionMedCLIPConfig
from fmclip.detectors.base import Detector, DetectorConfig, Prediction
from fmclip.errors import CheckpointError, NotFittedError, TowerError
from fmclip.scans import Scan
from fmclip.towers import get_tower


@dataclass(frozen=True)
class MeanImageConfig(DetectorConfig):
    power: float = 1.0
    levels: tuple[int, ...] = (1, 2)


class MeanImage(Detector):
    """Distance to the mean brightness of the references: the smallest method with a state."""

    name = "mean_image"
    config_class = MeanImageConfig

    def fit(self, normals: Sequence[Scan], abnormals=None, *, on_event=None) -> "MeanImage":
        self.mean_ = torch.tensor([scan.pixels.mean() for scan in normals]).mean().reshape(1)
        self.reference_scores_ = tuple(self._score(scan) for scan in normals)
        return self

    def predict(self, scans: Sequence[Scan]) -> list[Prediction]:
        self._require_fit()
        return [Prediction(np.abs(scan.pixels - self.mean_.item()), self._score(scan), {}) for scan in scans]

    def state(self) -> dict[str, Tensor]:
        return {"mean": self.mean_}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if state.keys() != {"mean"} or state["mean"].shape != (1,):
            raise CheckpointError("wrong tensors")
        self.mean_ = state["mean"]

    def _score(self, scan: Scan) -> float:
        return float(abs(scan.pixels.mean() - self.mean_.item()) ** self.config.power)


@pytest.fixture(autouse=True)
def _register(monkeypatch):
    monkeypatch.setitem(fmclip.detectors.DETECTORS, MeanImage.name, MeanImage)


@pytest.fixture
def scans() -> list[Scan]:
    generator = np.random.default_rng(0)
    return [Scan(generator.random((20, 24), dtype=np.float32), f"scan {n}") for n in range(1, 5)]


@pytest.fixture
def fitted(tiny_tower, scans) -> tuple[Detector, Calibration]:
    detector = MeanImage(tiny_tower, MeanImageConfig(scan_type="knee X-ray", power=0.5, levels=(3,))).fit(scans)
    assert detector.reference_scores_ is not None
    return detector, detector.calibration()


@pytest.fixture
def adapter(fitted, tmp_path) -> Path:
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, *fitted)
    return path


def _rewrite(path: Path, tensors: dict[str, Tensor] | None = None, **changes: str) -> None:
    """Save the same adapter with other tensors or metadata."""
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), **changes}
    save_file(load_file(path) if tensors is None else tensors, path, metadata)


def _edited(path: Path, key: str, **changes: object) -> str:
    with safe_open(path, "pt") as file:
        return json.dumps({**json.loads(file.metadata()[key]), **changes})


def test_an_adapter_answers_the_same_after_loading(adapter, fitted, scans):
    detector, calibration = load_adapter(adapter)
    assert calibration == fitted[1]
    assert detector.config == fitted[0].config
    assert detector.reference_scores_ == fitted[0].reference_scores_
    for before, after in zip(fitted[0].predict(scans), detector.predict(scans), strict=True):
        assert before.score == after.score
        np.testing.assert_array_equal(before.map, after.map)


@pytest.mark.parametrize("method", ["patch_memory", "fusionmedclip"])
def test_real_methods_answer_the_same_after_loading(method, tiny_tower, scans, tmp_path):
    detector_class = fmclip.detectors.DETECTORS[method]
    short = {"stage2_epochs": 1, "stage3_epochs": 1} if method == "fusionmedclip" else {}
    config = detector_class.config_class.preset("fast", scan_type="brain MRI", **short)
    detector = detector_class(tiny_tower, config).fit(scans)
    save_adapter(tmp_path / "a.safetensors", detector, detector.calibration())
    loaded, _ = load_adapter(tmp_path / "a.safetensors", tower=tiny_tower)
    for before, after in zip(detector.predict(scans), loaded.predict(scans), strict=True):
        assert before.score == after.score
        np.testing.assert_array_equal(before.map, after.map)


def test_saving_replaces_the_file_and_leaves_no_other(adapter, fitted):
    save_adapter(adapter, *fitted)
    assert [path.name for path in adapter.parent.iterdir()] == [adapter.name]


def test_no_label_is_stored(adapter):
    assert b"scan 1" not in adapter.read_bytes()


def test_nothing_is_saved_before_adapting(tiny_tower, tmp_path):
    with pytest.raises(NotFittedError, match="nothing to save"):
        save_adapter(tmp_path / "a.safetensors", MeanImage(tiny_tower), Calibration((0.1, 0.2), 0.5))


def test_a_missing_folder_is_reported_without_its_name(fitted, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        save_adapter(tmp_path / "missing" / "a.safetensors", *fitted)
    assert "missing" not in str(caught.value)


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def _header(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"abc",
        np.random.default_rng(0).bytes(5000),
        pickle.dumps({"weights": _Bomb()}),
        _header(pickle.dumps(_Bomb())),
        _header(b"{}", length=2**60),
        _header(b"[" * 100_000),
        _header(b"[1, 2]"),
        _header(b'{"__metadata__": {"format": "other"}}'),
        _header(b'{"__metadata__": "fmclip-adapter"}'),
    ],
    ids=["empty", "short", "random", "pickle", "header pickle", "absurd header", "deep", "list", "other", "text"],
)
def test_files_that_are_no_adapter_are_refused(data, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not an adapter file"):
        load_adapter(path)


def test_a_torch_file_is_refused(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="not an adapter file"):
        load_adapter(tmp_path / "a.safetensors")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not found"):
        load_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_truncated_adapter_is_refused(adapter, keep):
    data = adapter.read_bytes()
    adapter.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        load_adapter(adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": "99"}, "format version 99"),
        ({"format_version": "2"}, "format version 2; this program reads version 8. Adapt again"),  # other levels
        ({"format_version": "3"}, "format version 3; this program reads version 8. Adapt again"),  # other scores
        ({"format_version": "5"}, "format version 5; this program reads version 8. Adapt again"),  # other scores
        ({"format_version": "6"}, "format version 6; this program reads version 8. Adapt again"),  # more views
        ({"method": "oracle"}, "method that this program does not have"),
        ({"config": "{"}, "damaged"),
        ({"config": "[1]"}, "damaged"),
        ({"config": '{"unknown": 1}'}, "damaged"),
        ({"config": '{"power": "high"}'}, "damaged"),
        ({"calibration": "{}"}, "damaged"),
        ({"calibration": "7"}, "damaged"),
    ],
)
def test_metadata_that_cannot_be_used_is_refused(adapter, changes, message):
    _rewrite(adapter, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(adapter)


@pytest.mark.parametrize(
    "tensors", [{"mean": torch.ones(2)}, {"other": torch.ones(1)}, {"mean": torch.full((1,), float("nan"))}]
)
def test_wrong_tensors_are_refused(adapter, tensors):
    _rewrite(adapter, tensors)
    with pytest.raises(CheckpointError, match="Download or save it again"):
        load_adapter(adapter)


def test_an_adapter_of_another_tower_is_refused(adapter):
    with pytest.raises(CheckpointError, match=r"another tower \(tiny\) than the one in use \(tiny-resnet\)"):
        load_adapter(adapter, tower=get_tower("tiny-resnet"))


def test_an_adapter_of_other_weights_is_refused(adapter):
    _rewrite(adapter, tower_identity="0" * 64)
    with pytest.raises(CheckpointError, match="other weights"):
        load_adapter(adapter)


def test_an_adapter_of_an_unknown_tower_is_refused(adapter):
    _rewrite(adapter, tower="no-such-tower")
    with pytest.raises(TowerError):
        load_adapter(adapter)


@pytest.mark.parametrize(
    "changes",
    [
        {"threshold": float("nan")},
        {"threshold": 1.5},
        {"reference_scores": [0.1, -0.2]},
        {"reference_scores": [0.1] * 65},
        {"reference_scores": [0.1, 10**400]},
    ],
)
def test_a_calibration_out_of_range_is_refused(adapter, changes):
    _rewrite(adapter, calibration=_edited(adapter, "calibration", **changes))
    with pytest.raises(CheckpointError, match="damaged"):
        load_adapter(adapter)


@pytest.fixture
def fusion_adapter(tiny_tower, scans, tmp_path) -> Path:
    config = FusionMedCLIPConfig.preset("fast", stage2_epochs=1, stage3_epochs=1, pool_size=8)
    detector = FusionMedCLIP(tiny_tower, config).fit(scans)
    assert detector.reference_scores_ is not None
    path = tmp_path / "fusion.safetensors"
    save_adapter(path, detector, detector.calibration(), window="lung")
    return path


ABSURD = {
    "seed": 2**70,
    "context_tokens": 10**9,
    "batch_size": 0,
    "stage2_epochs": -1,
    "prompt_lr": -1e-3,
    "lora_rank": 10**6,
    "lora_alpha": -1.0,
    "lora_dropout": 1.0,
    "lora_depth": 0.0,
    "block_bottleneck": 10**9,
    "temperature": 0.0,
    "pool_size": 10**12,
    "shrinkage": 2.0,
    "smoothing": 1e6,
    "scan_type": "x" * 2000,
}


def test_settings_out_of_range_are_refused_by_name_before_a_tensor_is_loaded(fusion_adapter, monkeypatch):
    def load(_path):
        pytest.fail("tensors were loaded")

    monkeypatch.setattr(fmclip.checkpoint, "load_file", load)
    with safe_open(fusion_adapter, "pt") as file:
        config = json.loads(file.metadata()["config"])
    data = fusion_adapter.read_bytes()
    for key, value in ABSURD.items():
        fusion_adapter.write_bytes(_with_metadata(data, config=json.dumps({**config, key: value})))
        with pytest.raises(CheckpointError, match=f"setting {key} must "):
            load_adapter(fusion_adapter)
    for key, text in {
        "smoothing": "NaN",
        "prompt_lr": "1e999",
        "lora_rank": "true",
        "seed": "null",
        "features": '"other"',
    }.items():
        changed = json.dumps({**config, key: "HERE"}).replace('"HERE"', text)
        fusion_adapter.write_bytes(_with_metadata(data, config=changed))
        with pytest.raises(CheckpointError, match="damaged"):
            load_adapter(fusion_adapter)


@pytest.mark.parametrize("levels", [[0.5], ["a"], [99]])
def test_levels_that_a_tower_cannot_have_are_refused(tiny_tower, scans, tmp_path, levels):
    detector = fmclip.detectors.DETECTORS["patch_memory"](tiny_tower).fit(scans)
    path = tmp_path / "memory.safetensors"
    save_adapter(path, detector, detector.calibration())
    _rewrite(path, config=_edited(path, "config", levels=levels))
    with pytest.raises(CheckpointError, match="levels that its tower does not have"):
        load_adapter(path, tower=tiny_tower)


@pytest.mark.parametrize("preset", ["fast", "full", "paper"])
def test_all_presets_lie_within_the_limits(adapter, preset):
    for method in fmclip.detectors.DETECTORS.keys() - {MeanImage.name}:
        config = fmclip.detectors.DETECTORS[method].config_class.preset(preset, scan_type="optical coherence tomogram")
        _rewrite(adapter, method=method, config=json.dumps(config.to_dict()))
        with pytest.raises(CheckpointError, match="does not fit its own description"):  # these are another's tensors
            load_adapter(adapter)


def _with_metadata(data: bytes, **changes: str) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"].update(changes)
    return _header(json.dumps(header).encode()) + data[8 + length :]


@pytest.mark.parametrize(
    "changes",
    [
        {"memory.bank.0": lambda bank: bank[:, :-1], "memory.whitening.0": lambda white: white[:-1, :-1]},
        {"memory.owner": lambda owner: owner[:-1]},
        {"memory.owner": lambda owner: owner.flip(0)},
        {
            "memory.owner": lambda owner: owner.repeat(9),
            **{f"memory.bank.{index}": lambda bank: bank.repeat(9, 1) for index in range(4)},
        },
        {"memory.place": lambda place: place[:-1]},
        {"memory.place": lambda place: -place - 1},
        {"memory.place": None},
        {"memory.owner": lambda owner: owner.clamp(max=2)},
        {"memory.owner": lambda owner: owner + 1},
        {"memory.scale": lambda scale: scale[:-1]},
        {"memory.scale": lambda scale: -scale},
        {"memory.bank.1": None},
        {"memory.bank.1": lambda bank: bank.double()},
    ],
    ids=[
        "width",
        "owner",
        "patches not scan by scan",
        "patches",
        "place",
        "place below 0",
        "no place",
        "no patch of a scan",
        "scan",
        "views",
        "scale",
        "missing",
        "double",
    ],
)
def test_a_patch_memory_that_does_not_fit_is_refused(fusion_adapter, changes):
    tensors = load_file(fusion_adapter)
    for name, change in changes.items():
        tensor = tensors.pop(name)
        if change is not None:
            tensors[name] = change(tensor).contiguous()
    _rewrite(fusion_adapter, tensors)
    with pytest.raises(CheckpointError, match="Download or save it again"):
        load_adapter(fusion_adapter)


def test_metadata_of_absurd_length_is_refused(adapter):
    _rewrite(adapter, remark="x" * 100_000)
    with pytest.raises(CheckpointError, match="no adapter needs"):
        load_adapter(adapter)


def test_the_window_of_the_references_is_kept(fusion_adapter, adapter):
    assert read_window(fusion_adapter) == "lung"
    assert read_window(adapter) is None
    _rewrite(adapter, window="-600,1500")
    assert read_window(adapter) == "lung"
    _rewrite(adapter, window="1e99,1e99")
    with pytest.raises(CheckpointError, match="damaged"):
        read_window(adapter)
