"""Drift of an archive: the table is right, and the figure shows each scanner."""

import csv
import datetime
import json
import sys

import numpy as np
import pytest
from scipy.stats import ks_2samp
from typer.testing import CliRunner

import fmclip.archive_cli  # noqa: F401  (adds the command)
from fmclip.archive.drift import NO_SCANNER, ks_distance, read_drift
from fmclip.archive.drift_figure import drift_figure
from fmclip.archive.parts import FAILURES, MAPS, SCORES, Failure, Known, Scored, write_part
from fmclip.calibration import Calibration
from fmclip.cli import app

CALIBRATION = Calibration((0.2, 0.3, 0.25, 0.28), 0.5)
DAY = datetime.date(2026, 3, 1)


@pytest.fixture
def out(tmp_path):
    """Two finished parts: Alpha has two days, one scan of Beta has no date, one has neither; and an unfinished one."""
    for kind in (SCORES, FAILURES, MAPS):
        (tmp_path / kind).mkdir()
    record = {"format": "fmclip-archive", "version": 1, "threshold": 0.5, "rows": 12, "settings": {}}
    (tmp_path / "archive.json").write_text(json.dumps(record))
    alpha = [("Alpha", DAY, score) for score in (0.1, 0.2, 0.3, 0.4, 0.9)]
    parts = [
        ([*alpha, ("Beta", None, 0.7)], [("Alpha", DAY)]),
        ([("Alpha", DAY + datetime.timedelta(1), 0.6), (None, None, 0.2), ("Beta", DAY, 0.1)], [("Gamma", DAY)]),
        ([("Alpha", DAY, 0.99)], [("Alpha", DAY)]),
    ]
    for number, (scored, failed) in enumerate(parts):
        write_part(
            tmp_path,
            number,
            "run",
            [Scored(Known(0, None, *known), score, (1, 1), b"") for *known, score in scored],
            [Failure(Known(0, None, *known), "is empty") for known in failed],
            CALIBRATION,
            with_ids=False,
            with_maps=False,
        )
    (tmp_path / SCORES / "part-000002.parquet").unlink()
    return tmp_path


def test_scores_are_grouped_by_scanner_and_day(out):
    drift = read_drift(out)
    assert drift.scanners == ["Alpha", "Beta", "Gamma", NO_SCANNER]
    found = {
        (group.scanner, group.date): ([round(score, 3) for score in sorted(group.scores.tolist())], group.failed)
        for group in drift.groups
    }
    assert found == {
        ("Alpha", DAY): ([0.1, 0.2, 0.3, 0.4, 0.9], 1),
        ("Alpha", DAY + datetime.timedelta(1)): ([0.6], 0),
        ("Beta", None): ([0.7], 0),
        ("Beta", DAY): ([0.1], 0),
        ("Gamma", DAY): ([], 1),
        (NO_SCANNER, None): ([0.2], 0),
    }


def test_the_table_tells_quantiles_share_and_distance(out):
    result = CliRunner().invoke(app, ["archive-report", str(out)])
    assert result.exit_code == 0, result.stderr
    assert "9 scans of 4 scanners, 33.3 % above" in result.stdout
    assert (out / "drift.png").stat().st_size > 10_000
    with (out / "drift.csv").open() as file:
        first, second, *_, gamma, unknown = csv.DictReader(file)
    assert (first["scanner"], first["date"], first["scans"], first["failed"]) == ("Alpha", "2026-03-01", "5", "1")
    assert [first[name] for name in ("q05", "q25", "median", "q75", "q95")] == [
        f"{value:.4f}" for value in np.quantile([0.1, 0.2, 0.3, 0.4, 0.9], [0.05, 0.25, 0.5, 0.75, 0.95])
    ]
    assert (first["deviating"], first["share"], first["distance"]) == ("1", "0.2000", "0.800")
    assert (second["date"], second["median"], second["distance"]) == ("2026-03-02", "0.6000", "0.800")
    assert (gamma["scans"], gamma["failed"], gamma["median"], gamma["share"]) == ("0", "1", "", "")
    assert (unknown["scanner"], unknown["date"], unknown["distance"]) == (NO_SCANNER, "", "")


@pytest.mark.parametrize("seed", range(5))
def test_the_distance_is_that_of_kolmogorov_and_smirnov(seed):
    generator = np.random.default_rng(seed)
    some = generator.normal(0.3, 1, 30).round(1)  # with ties
    rest = generator.normal(0, 1, 200).round(1)
    found = ks_distance(some, np.sort(np.concatenate([some, rest])))
    assert found == pytest.approx(ks_2samp(some, rest).statistic)


def test_the_figure_has_a_row_for_each_scanner_and_joins_days_where_there_are_many(out):
    drift = read_drift(out)
    figure = drift_figure(drift)
    names = [axes.texts[0].get_text() for axes in figure.axes[::2]]
    assert names[0] == "Alpha, 6 scans and 1 that failed"
    assert len(figure.axes) == 2 * 4
    assert "each day" in figure.axes[0].get_title(loc="left")
    lines = figure.axes[0].get_lines()
    assert [line.get_ydata()[0] for line in lines] == [drift.threshold]
    assert figure.axes[1].get_ylim()[1] >= 1  # a share of 100 % is not cut off
    later = [DAY + datetime.timedelta(number) for number in range(0, 200, 40)]
    groups = tuple(type(drift.groups[0])("Alpha", day, np.full(3, 0.4, np.float32), 1) for day in later)
    joined = type(drift)(groups, 0.5).joined(90)
    assert [(group.date, group.scores.size, group.failed) for group in joined.groups] == [
        (DAY, 9, 3),
        (DAY + datetime.timedelta(90), 6, 2),
    ]
    assert "each week" in drift_figure(type(drift)(groups, 0.5)).axes[0].get_title(loc="left")


def test_an_archive_without_dates_has_a_table_only(out):
    for file in (out / SCORES / "part-000000.parquet", out / FAILURES / "part-000000.parquet"):
        file.unlink()
    scored = [Scored(Known(0, None, "Alpha", None), 0.4, (1, 1), b"")]
    write_part(out, 0, "run", scored, [], CALIBRATION, with_ids=False, with_maps=False)
    (out / SCORES / "part-000001.parquet").unlink()
    result = CliRunner().invoke(app, ["archive-report", str(out)])
    assert result.exit_code == 0
    assert "No scan has a date" in result.stderr
    assert not (out / "drift.png").exists()


def test_an_archive_in_which_no_scan_was_mapped_is_told_in_words(out):
    for file in (out / SCORES).iterdir():
        file.unlink()
    failures = [Failure(Known(row, None, "Alpha", DAY), "is empty") for row in range(3)]
    write_part(out, 0, "run", [], failures, CALIBRATION, with_ids=False, with_maps=False)
    result = CliRunner().invoke(app, ["archive-report", str(out)])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "No scan of this archive was mapped" in " ".join(result.stderr.split())


def test_without_the_extra_it_is_told_how_to_install_it(out, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = CliRunner().invoke(app, ["archive-report", str(out)])
    assert result.exit_code == 1
    assert "pip install 'fmclip[archive]'" in " ".join(result.stderr.split())


def test_a_folder_without_scores_is_told(tmp_path, out):
    for folder, words in ((tmp_path / "none", "holds no scores"), (out, "No part of this archive is finished")):
        for file in (out / SCORES).iterdir():
            file.unlink()
        result = CliRunner().invoke(app, ["archive-report", str(folder)])
        assert result.exit_code == 1
        assert words in " ".join(result.stderr.split())
