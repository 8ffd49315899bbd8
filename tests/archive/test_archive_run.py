"""The command with real workers: whole runs, killed workers and drivers, what is refused. One Ray for all of them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from archive_scans import BROKEN, COUNT, MISSING, SECRET, all_text, draw, read_all, rows, table_of, write_manifest
from typer.testing import CliRunner

import fmclip.archive_cli  # noqa: F401  (adds the command)
from benchmarks.archive import scoring_processes
from fmclip.archive.cluster import Workers, count_workers, require_ray
from fmclip.archive.parts import ATTEMPTS, FAILURES, MAPS, SCORES, UNFINISHED
from fmclip.archive.run import ADAPTER, Progress, _alone_in, _Worker, score_archive
from fmclip.archive.scorer import Job, Scorer
from fmclip.cli import app
from fmclip.errors import ArchiveError

pytestmark = pytest.mark.slow
TOKEN = "FMCLIP_TEST_CLUSTER"
READABLE = [row for row in range(COUNT) if row not in (BROKEN, MISSING)]


class Cluster:
    """A Ray of this machine; the environment of its processes tells them from those of others."""

    def __init__(self, ray) -> None:
        self.token = f"{TOKEN}={os.environ[TOKEN]}"
        context = ray.init(
            address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20
        )
        self.address = context.address_info["gcs_address"]
        self.logs = Path(context.address_info["session_dir"]) / "logs"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    ray = require_ray()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN, uuid.uuid4().hex)
        yield Cluster(ray)
        ray.shutdown()


@pytest.fixture
def alone(adapter, manifest, tmp_path) -> list[dict]:
    """The scores as one process makes them, all scans in one part."""
    out = tmp_path / "alone"
    for kind in (SCORES, FAILURES, MAPS, ATTEMPTS):
        (out / kind).mkdir(parents=True)
    job = Job(out, adapter, table_of(manifest), "run")
    Scorer(job).score(job.source.plan(1000)[0][0])
    return read_all(out, SCORES)


def agree(out: Path, alone: list[dict]) -> None:
    """Scores, maps and failures are those of one process: no row is lost, none is there twice."""
    found = read_all(out, SCORES)
    assert [row["row"] for row in found] == [row["row"] for row in read_all(out, MAPS)] == READABLE
    assert [row["row"] for row in read_all(out, FAILURES)] == [BROKEN, MISSING]
    for one, other in zip(found, alone, strict=True):
        assert one.pop("score") == pytest.approx(other["score"], abs=1e-6)
        assert one.pop("p_value") == pytest.approx(other["p_value"], abs=1e-4)
        assert one == {name: other[name] for name in one}


def command(*arguments: object):
    result = CliRunner().invoke(app, ["score-archive", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_two_workers_score_as_one_process_does_and_tell_no_name(cluster, adapter, manifest, alone, tmp_path):
    out = tmp_path / "out"
    options = ("--out", out, "--workers", 2, "--part-size", 3)
    result = command(adapter, manifest, *options)
    assert result.exit_code == 0, result.stderr
    assert "20 of 22 scans mapped" in result.stdout
    assert "2 of 22 scans could not be mapped" in " ".join(result.stderr.split())
    agree(out, alone)
    record = json.loads((out / "archive.json").read_text())
    assert (record["rows"], record["method"], record["tower"]) == (COUNT, "patch_memory", "tiny")
    assert SECRET not in all_text(out)
    assert SECRET not in result.output
    logged = [file.read_text(errors="replace") for file in cluster.logs.rglob("*") if file.is_file()]
    assert any("_Worker" in text for text in logged), "these are the logs of the run"
    assert not any(SECRET in text for text in logged)


def test_a_killed_worker_loses_no_row_and_doubles_none(cluster, adapter, manifest, alone, tmp_path):
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        if progress.parts_done == 2:
            for process in scoring_processes(cluster.token):
                os.kill(process, signal.SIGKILL)
                killed.append(process)

    out = tmp_path / "out"
    workers = Workers(count=1)
    done = score_archive(adapter, table_of(manifest), out, workers=workers, part_size=1, on_progress=kill)
    assert len(killed) == 1
    assert (done.parts_done, done.scans_done, done.failed) == (COUNT, COUNT, 2)
    agree(out, alone)


def test_a_killed_driver_is_gone_on_from(cluster, adapter, manifest, alone, tmp_path):
    out = tmp_path / "out"
    driver = [sys.executable, str(Path(__file__).with_name("driver.py")), cluster.address]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [*driver, str(adapter), str(manifest), str(out)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        told = [line.strip() for line in iter(process.stdout.readline, "3\n")]  # ends once three parts are finished
        process.kill()
    assert told == ["0", "1", "2"]
    (out / SCORES / f"part-000010-ab{UNFINISHED}").write_bytes(b"half")
    seen: list[Progress] = []
    score_archive(adapter, table_of(manifest), out, workers=Workers(count=1), part_size=2, on_progress=seen.append)
    assert 3 <= seen[0].parts_done < seen[0].parts == 11
    assert seen[0].scans_done >= 6
    agree(out, alone)
    assert not list(out.rglob(f"*{UNFINISHED}"))


@pytest.fixture
def in_process(monkeypatch) -> list[int]:
    """No Ray: one worker in this process; lists the parts that it is given."""
    given: list[int] = []

    def receipts(ray, job, parts, workers):
        worker = _Worker(job)
        given.extend(part.number for part in parts)
        return (worker(part._asdict()) for part in parts)

    monkeypatch.setattr("fmclip.archive.run._receipts", receipts)
    monkeypatch.setattr("fmclip.archive.run.connected", lambda ray, workers: contextlib.nullcontext())
    return given


def test_a_finished_archive_is_not_scored_again_and_other_settings_are_refused(adapter, manifest, tmp_path, in_process):
    out = tmp_path / "out"
    options = ("--out", out, "--part-size", 11)
    assert command(adapter, manifest, *options).exit_code == 0
    assert "20 of 22 scans mapped" in command(adapter, manifest, *options).stdout
    changes = {"part_size": ("--part-size", 5), "maps, map_side": ("--maps", "none"), "slice": ("--slice", 2)}
    for words, changed in changes.items():
        refused = command(adapter, manifest, *options, *changed)
        assert refused.exit_code == 1
        assert f"another run: {words} changed" in " ".join(refused.stderr.split())
    write_manifest(manifest, rows(COUNT - 1))
    refused = command(adapter, manifest, *options)
    assert "another run: manifest changed" in " ".join(refused.stderr.split())
    assert in_process == [0, 1]


def test_another_folder_device_or_copy_of_the_adapter_is_refused(adapter, manifest, tmp_path, in_process):
    out = tmp_path / "out"
    options = (adapter, manifest, "--out", out, "--part-size", 11)
    command(*options)
    assert SECRET not in (out / "archive.json").read_text(), "the folder of the scans is not named"
    for words, changed in {"root": ("--root", tmp_path), "device": ("--gpus", 1)}.items():
        refused = command(*options, *changed)
        assert f"another run: {words} changed" in " ".join(refused.stderr.split())
    (out / ADAPTER).write_bytes(b"another")
    assert f"{ADAPTER} in the folder is damaged" in " ".join(command(*options).stderr.split())
    (out / ADAPTER).unlink()
    assert command(*options).exit_code == 0
    assert (out / ADAPTER).read_bytes() == adapter.read_bytes()
    assert in_process == [0, 1]


def test_workers_that_there_is_no_room_for_are_refused_and_not_waited_for():
    machine = {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}
    nodes = [machine, {"Alive": True, "Resources": {"CPU": 4.0}}, {**machine, "Alive": False}]
    assert count_workers(nodes, Workers()) == 12
    assert count_workers(nodes, Workers(cpus=3)) == 3
    assert count_workers(nodes, Workers(gpus=0.5)) == 2
    assert count_workers(nodes, Workers(count=1, gpus=1)) == 1
    for asked in (Workers(cpus=12), Workers(gpus=2), Workers(count=2, gpus=1), Workers(count=13)):
        with pytest.raises(ArchiveError, match="There is room for"):
            count_workers(nodes, asked)


def test_failures_are_tried_again_on_request(adapter, manifest, tmp_path, in_process):
    options = (adapter, manifest, "--out", tmp_path / "out", "--part-size", 3)
    command(*options)
    in_process.clear()
    draw(manifest.parent / f"{SECRET}-{MISSING:03d}.png", 1)  # a mount that was gone is back
    assert "21 of 22 scans mapped" in command(*options, "--retry-failures").stdout
    assert in_process == [BROKEN // 3, MISSING // 3]
    assert [row["row"] for row in read_all(tmp_path / "out", FAILURES)] == [BROKEN]
    assert [row["row"] for row in read_all(tmp_path / "out", SCORES)] == sorted([*READABLE, MISSING])


def test_what_stops_a_worker_is_handed_back_in_words(adapter, manifest, tmp_path, monkeypatch):
    other = tmp_path / "other.safetensors"
    other.write_bytes(adapter.read_bytes().replace(b'"tower":"tiny"', b'"tower":"tinY"'))
    source = table_of(manifest)
    row = source.plan(5)[0][0]._asdict()
    job = Job(tmp_path / "out", adapter, source, "run")
    (tmp_path / "out" / ATTEMPTS).mkdir(parents=True)
    assert "tinY" in _Worker(replace(job, adapter=other))(row)["error"]
    worker = _Worker(job)
    assert "No such file or directory" in worker(row)["error"]  # the folder for scores, such as after a mount was gone
    monkeypatch.setattr(worker.scorer, "score", lambda part: {}[SECRET])
    told = worker(row)["error"]
    assert "KeyError in test_archive_run.py" in told
    assert SECRET not in told


def test_two_runs_do_not_work_in_one_folder(adapter, manifest, tmp_path):
    (tmp_path / "out").mkdir()
    with _alone_in(tmp_path / "out"), pytest.raises(ArchiveError, match="Another score-archive"):
        score_archive(adapter, table_of(manifest), tmp_path / "out")


def test_without_ray_it_is_told_how_to_install_it(adapter, manifest, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ArchiveError, match=r"pip install 'fmclip\[archive\]'"):
        score_archive(adapter, table_of(manifest), tmp_path / "out")
