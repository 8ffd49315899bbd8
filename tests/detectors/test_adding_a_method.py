"""The method that docs/adding-a-method.md adds in one file and one line is found by everything that knows methods."""

import csv
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from detector_scans import lesion_scan, normal_scan
from typer.testing import CliRunner

import fmclip.evaluation_cli  # noqa: F401  (adds the command)
from fmclip.cli import app
from fmclip.detectors import DETECTORS
from fmclip.figures import save_picture
from fmclip.page import methods
from fmclip.page.visitors import Visitor
from fmclip.session import Session

DOCS = Path(__file__).parents[2] / "docs" / "adding-a-method.md"


@pytest.fixture(autouse=True)
def _added(monkeypatch, tmp_path):
    source, line = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    file = tmp_path / "mean_picture.py"
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mean_picture", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mean_picture", module)
    spec.loader.exec_module(module)
    (registered,) = eval(f"{{{line.strip()}}}", vars(module)).items()
    monkeypatch.setitem(DETECTORS, *registered)


@pytest.fixture
def folder(tmp_path):
    """One data set `discs`: ten normal scans, four with a lesion and its mask."""
    for kind, draw, seeds in (("normal", normal_scan, range(10)), ("abnormal", lesion_scan, range(20, 24))):
        (tmp_path / "discs" / kind).mkdir(parents=True)
        for seed in seeds:
            _save(tmp_path / "discs" / kind / f"{seed}.png", draw(seed).pixels)
    (tmp_path / "discs" / "masks").mkdir()
    for seed in range(20, 24):
        rows, columns = np.mgrid[:64, :64]
        _save(tmp_path / "discs" / "masks" / f"{seed}.png", (rows - 24) ** 2 + (columns - 38) ** 2 < 49)
    return tmp_path / "discs"


def _save(path, pixels):
    save_picture(path, np.repeat((255 * pixels).astype(np.uint8)[:, :, None], 3, axis=2))


def _run(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output


def test_it_adapts_predicts_and_is_measured_from_the_shell(folder, tmp_path):
    adapter, out, rows = tmp_path / "a.safetensors", tmp_path / "out", tmp_path / "rows.json"
    _run("adapt", folder / "normal", "--method", "mean_picture", "--tower", "tiny", "--out", adapter)
    _run("predict", adapter, folder / "abnormal", "--tower", "tiny", "--out", out)
    with (out / "scores.csv").open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 4
    assert all(float(row["score"]) > float(row["threshold"]) for row in found)
    options = ("--method", "mean_picture", "--tower", "tiny", "--k", 5, "--seeds", 1, "--json", rows)
    _run("evaluate", folder, *options)
    (row,) = json.loads(rows.read_text())["rows"]
    assert (row["method"], row["n_normal"], row["n_abnormal"]) == ("mean_picture", 5, 4)
    assert row["image_auroc"] == 1.0
    assert row["pixel_auroc"] > 0.9


def test_two_references_do(tmp_path, folder):
    for seed in range(2, 10):
        (folder / "normal" / f"{seed}.png").unlink()
    _run("adapt", folder / "normal", "--method", "mean_picture", "--tower", "tiny", "--out", tmp_path / "a.safetensors")


def test_the_page_offers_it():
    choices = methods.offer(Visitor(Session("tiny", "cpu")))["method"]["choices"]
    assert ("Mean picture", "mean_picture") in choices
