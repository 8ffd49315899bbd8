"""Methods from a shell: abnormal scans and masks, presets of their own, settings, and the list of them all."""

import inspect
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner, Result

import fmclip.evaluation_cli  # noqa: F401  (adds the command)
from fmclip.checkpoint import load_adapter
from fmclip.cli import app
from fmclip.detectors import DETECTORS
from fmclip.detectors.conrad import ConRADConfig
from fmclip.detectors.madclip import MadCLIP, MadCLIPConfig
from fmclip.detectors.published import PublishedConfig
from fmclip.detectors.two_layer import TwoLayer, TwoLayerConfig
from fmclip.report.record import ABNORMALS

SHORT = {"epochs": 1, "folds": 0, "copies": 0, "batch_size": 4, "pool_size": 8}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Train for a moment only."""
    monkeypatch.setitem(MadCLIPConfig.PRESETS, "full", {**SHORT, "synonyms": 1})
    monkeypatch.setitem(TwoLayerConfig.PRESETS, "full", SHORT)
    monkeypatch.setitem(ConRADConfig.PRESETS, "full", SHORT)
    monkeypatch.setitem(PublishedConfig.PRESETS, "row5", {**SHORT, "row": 5})


def _picture(path: Path, seed: int, *, has_blob: bool = False) -> None:
    texture = cv2.GaussianBlur(np.random.default_rng(seed).normal(0, 1, (40, 50)), (0, 0), 1.5)
    pixels = np.clip(90 + 25 * texture / texture.std(), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), cv2.circle(pixels, (35, 12), 7, 240, -1) if has_blob else pixels)


def _mask(path: Path, shape: tuple[int, int] = (40, 50), value: int = 255) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), cv2.circle(np.zeros(shape), (35, 12), 7, value, -1))


@pytest.fixture
def scans(tmp_path) -> Path:
    """Folders `normal` (four) and `abnormal` (a, b, c) of scans of 40 x 50 pixels; `masks` of a and b."""
    for seed in range(4):
        _picture(tmp_path / "normal" / f"n{seed}.png", seed)
    for seed, name in enumerate("abc", start=10):
        _picture(tmp_path / "abnormal" / f"{name}.png", seed, has_blob=True)
    _mask(tmp_path / "masks" / "a.png")
    _mask(tmp_path / "masks" / "b_mask.png", value=1)  # also saved so
    return tmp_path


def _run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def _adapt(scans: Path, method: str, *options: object) -> Result:
    out = scans / "out.safetensors"
    return _run("adapt", scans / "normal", "--out", out, "--tower", "tiny", "--method", method, *options)


def _config(scans: Path):
    return load_adapter(scans / "out.safetensors")[0].config


def _fails(message: str, result: Result) -> None:
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def taught(monkeypatch) -> dict:
    """What the last fit of MadCLIP or of the two layers was given."""
    given: dict = {}
    for detector in (MadCLIP, TwoLayer):

        def watch(self, normals, abnormals=None, *, abnormal_masks=None, on_event=None, fit=detector.fit):
            given.update(abnormals=abnormals, masks=abnormal_masks)
            return fit(self, normals, abnormals, abnormal_masks=abnormal_masks, on_event=on_event)

        monkeypatch.setattr(detector, "fit", watch)
    return given


def test_madclip_is_adapted_with_abnormal_scans_and_the_masks_of_some(scans, taught):
    result = _adapt(scans, "madclip", "--abnormal", scans / "abnormal", "--masks", scans / "masks")
    assert result.exit_code == 0, result.stderr
    assert [scan.label for scan in taught["abnormals"]] == [f"abnormal scan {number}" for number in (1, 2, 3)]
    first, second, third = taught["masks"]
    assert third is None
    for mask in (first, second):
        assert (mask.shape, mask.dtype) == ((40, 50), bool)
        assert mask[12, 35]
        assert 130 < mask.sum() < 180  # of a disc of radius 7
    out = scans / "maps"
    assert _run("predict", scans / "out.safetensors", scans / "abnormal", "--out", out).exit_code == 0
    assert (out / "a_map.png").exists()


def test_a_run_says_of_an_adapter_file_whether_abnormal_scans_taught_it(scans):
    said = []
    for options in (["--abnormal", scans / "abnormal"], []):
        assert _adapt(scans, "two_layer", *options).exit_code == 0
        assert _run("predict", scans / "out.safetensors", scans / "normal", "--out", scans / "maps").exit_code == 0
        said.append(json.loads((scans / "maps" / "run.json").read_text())["not_repeatable"])
    assert said == [ABNORMALS, ""]


def test_abnormal_scans_are_given_one_by_one_and_without_masks(scans, taught):
    one_by_one = [part for name in ("a.png", "c.png") for part in ("--abnormal", scans / "abnormal" / name)]
    assert _adapt(scans, "two_layer", *one_by_one).exit_code == 0
    assert len(taught["abnormals"]) == 2
    assert taught["masks"] == [None, None]
    assert _adapt(scans, "two_layer").exit_code == 0  # it learns without as well
    assert taught["abnormals"] is None
    assert _adapt(scans, "conrad", *one_by_one).exit_code == 0


def test_masks_may_lie_among_the_scans(scans, taught):
    _mask(scans / "abnormal" / "a_mask.png")
    folder = scans / "abnormal"
    assert _adapt(scans, "madclip", "--abnormal", folder, "--masks", folder).exit_code == 0
    assert len(taught["abnormals"]) == 3  # a mask is no scan
    assert [mask is None for mask in taught["masks"]] == [False, True, True]  # and no scan is its own mask


def test_pictures_that_are_called_masks_are_no_scans_and_several_of_one_scan_are_united(scans, taught):
    other = np.zeros((40, 50), np.uint8)
    other[30:35, 5:10] = 255
    _mask(scans / "abnormal" / "a_mask.png")
    cv2.imwrite(str(scans / "abnormal" / "a_mask_1.png"), other)
    folder = scans / "abnormal"
    assert _adapt(scans, "madclip", "--abnormal", folder, "--masks", folder).exit_code == 0
    assert len(taught["abnormals"]) == 3
    first = taught["masks"][0]
    assert first[12, 35]
    assert first[32, 7]
    for options in ((), ("--masks", scans / "masks")):  # no folder of masks, or another one
        result = _adapt(scans, "madclip", "--abnormal", folder, *options)
        assert len(taught["abnormals"]) == 3
        assert "2 pictures that are called masks were left out" in result.stderr


def test_two_masks_of_one_name_are_refused(scans):
    _mask(scans / "masks" / "more" / "a.png")
    result = _adapt(scans, "madclip", "--abnormal", scans / "abnormal", "--masks", scans / "masks")
    assert result.exit_code == 1
    assert "Two masks have the same name" in result.stderr


def test_an_abnormal_scan_that_cannot_be_read_and_an_idle_mask_are_told(scans, taught):
    (scans / "abnormal" / "b.png").write_text("no picture")
    _mask(scans / "masks" / "other.png")
    result = _adapt(scans, "madclip", "--abnormal", scans / "abnormal", "--masks", scans / "masks")
    assert result.exit_code == 0, result.stderr
    assert "abnormal scan 2 is" in result.stderr
    assert "1 of the masks fit no abnormal scan" in result.stderr
    assert [mask is None for mask in taught["masks"]] == [False, True]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("madclip", [], "learns from abnormal scans too: give some with --abnormal"),
        (
            "patch_memory",
            ["--abnormal", "abnormal"],
            "never learns from abnormal scans: leave them out, or choose guided_memory",
        ),
        ("madclip", ["--masks", "masks"], "give the abnormal scans too"),
        ("madclip", ["--abnormal", "abnormal", "--masks", "nowhere"], "folder of masks was not found"),
        ("madclip", ["--abnormal", "abnormal", "--masks", "normal"], "No mask of the folder fits"),
        ("madclip", ["--abnormal", "abnormal", "--masks", "large"], "has 60 x 40 pixels, and the scan 50 x 40"),
        ("madclip", ["--abnormal", "abnormal", "--masks", "black"], "abnormal scan 1 is black"),
        ("madclip", ["--abnormal", "abnormal", "--abnormal", "more", "--masks", "masks"], "have the same name"),
        ("madclip", ["--abnormal", "normal"], "scan 1 and abnormal scan 1 are the same picture"),
        ("madclip", ["--abnormal", "empty"], "None of the abnormal scans could be read"),
    ],
)
def test_abnormal_scans_and_masks_that_do_not_fit_are_refused(scans, method, options, message):
    _mask(scans / "large" / "a.png", (40, 60))
    _mask(scans / "black" / "a.png", value=0)
    _picture(scans / "more" / "a.png", 20)
    (scans / "empty").mkdir()
    _fails(message, _adapt(scans, method, *(part if part.startswith("--") else scans / part for part in options)))
    assert not (scans / "out.safetensors").exists()


def test_a_preset_of_the_method_alone_is_taken(scans):
    assert _adapt(scans, "fusionmedclip_published", "--preset", "row5").exit_code == 0
    assert _config(scans).row == 5
    _fails(
        "patch_memory has no preset 'row5'; there are fast, full, paper",
        _adapt(scans, "patch_memory", "--preset", "row5"),
    )


def test_settings_are_those_of_the_adapter(scans):
    options = ("--set", "over=patches", "--set", "coreset = 0.5", "--set", "levels=0, 1")
    assert _adapt(scans, "patch_memory", *options).exit_code == 0
    config = _config(scans)
    assert (config.over, config.coreset, config.levels) == ("patches", 0.5, (0, 1))
    options = ("--abnormal", scans / "abnormal", "--set", "opposite_signal=false", "--set", "context_tokens=2")
    assert _adapt(scans, "madclip", *options).exit_code == 0
    config = _config(scans)
    assert (config.opposite_signal, config.context_tokens, config.epochs) == (False, 2, 1)


@pytest.mark.parametrize(
    ("method", "text", "message"),
    [
        ("patch_memory", "cores=1", "No setting of patch_memory is called 'cores'; there are shrinkage, smoothing"),
        ("patch_memory", "coreset", "given as NAME=VALUE, not 'coreset'"),
        ("patch_memory", "coreset=half", "coreset must be a number, not 'half'"),
        ("patch_memory", "copies=1.5", "copies must be a whole number, not '1.5'"),
        ("patch_memory", "levels=0,x", "levels must be a whole number, not 'x'"),
        ("patch_memory", "levels=0,9", "level"),
        ("patch_memory", "over=all", "over must be references or patches, not 'all'"),
        ("patch_memory", "coreset=nan", "coreset lies above 0 and up to 1"),
        ("patch_memory", "levels=" + ",".join("0" * 65), "levels must have at most 64 parts"),
        ("two_layer", "lr=5", "lr must lie between 0 and 1"),
        ("patch_memory", "coreset=0.5", "set over=patches"),
        ("patch_memory", "seed=3", "No setting of patch_memory is called 'seed'"),
        ("two_layer", "epochs=-1", "epochs must lie between 0 and 10000"),
        ("conrad", "conditioned=yes", "conditioned must be true or false, not 'yes'"),
        ("fusionmedclip_published", "row=9", "Table 8 has rows 1 to 6"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(scans, method, text, message):
    _fails(message, _adapt(scans, method, "--set", text))


def _evaluate(scans: Path, *options: object) -> Result:
    root = scans / "root" / "blobs"
    if not root.exists():
        root.mkdir(parents=True)
        for name in ("normal", "abnormal", "masks"):
            (scans / name).rename(root / name)
    return _run("evaluate", root.parent, "--tower", "tiny", "--k", 2, "--seeds", 1, *options)


def test_runs_of_different_settings_are_not_mixed_when_an_evaluation_goes_on(scans):
    runs, table = scans / "runs.jsonl", scans / "rows.json"
    options = ("--methods", "cosine,patch_memory", "--resume", runs, "--json", table)
    counts = []
    for own in ((), ("--set", "copies=1"), ("--set", "copies=1"), ("--set", "copies=2"), ()):
        result = _evaluate(scans, *options, *own)
        assert result.exit_code == 0, result.stderr
        counts.append(len(runs.read_text().splitlines()))
        words = ", ".join(["full", *own[1:]])
        assert {row["preset"] for row in json.loads(table.read_text())["rows"]} == {words}  # one table, ranked together
    assert counts == [2, 3, 3, 4, 4]  # cosine has no such setting, and is not measured again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--methods", "cosine,patch_memory", "--set", "heads=common"],
            "No setting of cosine or patch_memory is called",
        ),
        (["--method", "patch_memory", "--set", "neighbours=2"], "patch_memory: coreset, neighbours and reweighting"),
        (["--method", "madclip", "--preset", "row5"], "madclip: Unknown preset 'row5'"),
        (["--fit-on", "blobs"], "No dataset but blobs is there to test on"),
    ],
)
def test_evaluate_says_before_it_begins_what_cannot_be(scans, options, message):
    _fails(message, _evaluate(scans, *options))


def test_the_methods_are_listed_each_with_a_line_of_its_own_and_its_presets():
    result = _run("methods")
    assert result.exit_code == 0
    for name, detector in DETECTORS.items():
        line = inspect.getdoc(sys.modules[detector.__module__]).splitlines()[0]
        about = f"{name}\n    {line}\n    abnormal scans: {detector.uses_abnormals}; presets: fast, full, "
        assert about in result.stdout
    assert "row1, row2, row3, row4, row5, row6, paper" in result.stdout


def test_the_settings_of_a_method_are_listed_as_they_are_given():
    told = _run("methods", "--method", "madclip").stdout
    assert "heads=separate  ablation f: one head for score and map (separate or common)" in told
    assert "opposite_signal=true  ablation d" in told
    assert "full sets epochs=1, batch_size=4, folds=0" in told
    assert "\n    seed=" not in told
    _fails("No method is called oracle", _run("methods", "--method", "oracle"))
