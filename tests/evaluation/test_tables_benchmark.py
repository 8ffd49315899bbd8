"""One command rebuilds the committed tables: each of them says the very command that it runs."""

import argparse
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

import benchmarks.tables
from benchmarks import quality
from benchmarks.tables import IN_ONE_GO, TABLES, WITHOUT_MARKS, commands

RESULTS = Path(benchmarks.tables.__file__).parent / "results"


@pytest.fixture
def options(tmp_path) -> argparse.Namespace:
    return argparse.Namespace(transformer="vit.json:vit.safetensors", keep=tmp_path / "runs", out=tmp_path)


@pytest.mark.parametrize("name", TABLES)
def test_a_committed_table_says_the_command_that_rebuilds_it(name):
    page = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    found = re.search(r"`python -m benchmarks\.(\w+) ROOT (.*?)`", page)
    assert found is not None
    module, *words = TABLES[name]
    assert found[1] == module
    said = shlex.split(found[2])
    if "TRANSFORMER" in words:
        said[said.index("--transformer") + 1] = "TRANSFORMER"
    assert said == words


def test_each_table_is_written_where_the_committed_one_lies(options, tmp_path):
    for name in TABLES:
        *before, last = commands(name, Path("DATA"), tmp_path, options)
        assert len(before) == (name == WITHOUT_MARKS)
        assert last[last.index("--out") + 1] == str(tmp_path)
        stem = last[last.index("--name") + 1] if "--name" in last else last[0].removeprefix("benchmarks.")
        assert stem == name
        kept = [f"{options.keep / name}.jsonl"] if name not in IN_ONE_GO else []
        assert [word for word in last if word.endswith(".jsonl")] == kept


def test_the_table_without_marks_asks_about_the_copy_without_them(options, tmp_path):
    marks, quality = commands(WITHOUT_MARKS, Path("DATA"), tmp_path, options)
    assert marks[:2] == ["benchmarks.marks", "DATA"]
    assert quality[1] == marks[2]


def test_the_second_tower_is_passed_on_and_asked_for(options, tmp_path, monkeypatch, capsys):
    (command,) = commands("methods", Path("DATA"), tmp_path, options)
    assert command[command.index("--transformer") + 1] == "vit.json:vit.safetensors"
    monkeypatch.setattr("sys.argv", ["tables", "DATA", "--only", "methods"])
    with pytest.raises(SystemExit):
        benchmarks.tables.main()
    assert "--transformer" in capsys.readouterr().err


def test_published_figures_of_normal_scans_stand_beside_such_only(monkeypatch):
    monkeypatch.setattr(quality, "markdown", lambda runs, skipped: "")

    def page(abnormal_k: int) -> str:
        row = SimpleNamespace(dataset="busi", abnormal_k=abnormal_k)
        return quality._page(SimpleNamespace(runs=[SimpleNamespace(row=row)], skipped=[]), "command")

    assert "| busi | FusionMedCLIP | 88.8 |" in page(0)
    assert "FusionMedCLIP" not in page(16)
