"""The load benchmark in its smallest form, and what it measures at length: sessions that ended leave nothing behind."""

import gc
import json
import sys
from collections import Counter

import pytest

from benchmarks import load
from fmclip import learning
from fmclip.findings import Finding
from fmclip.learning import Adapter
from fmclip.page.visitors import Visitor
from fmclip.scans import Scan


def test_a_small_crowd_is_measured_and_gets_the_answers_that_each_gets_alone(tmp_path, monkeypatch, capsys):
    options = ["--tower", "tiny", "--method", "patch_memory", "--k", "4", "--visitors", "2", "--sessions", "2"]
    monkeypatch.setattr(sys, "argv", ["load", *options, "--out", str(tmp_path)])
    monkeypatch.setattr(load.os, "sched_setaffinity", lambda *_: None, raising=False)
    for name in ("GRADIO_TEMP_DIR", "OMP_NUM_THREADS", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "1")  # the benchmark sets them for its process; here they are put back
    load.main()
    results = json.loads((tmp_path / "load.json").read_text())["results"]
    (crowd,) = results["crowds"]
    assert crowd["visitors"] == 2
    assert crowd["same answers as alone"] is True
    assert 0 < crowd["query p50, ms"] <= crowd["query p95, ms"]
    assert crowd["adaptations a minute"] > 0
    assert set(results["memory, MB"]) == {"before", "after 2 sessions"}
    assert "| 2 | yes |" in (tmp_path / "load.md").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sessions_that_ended_leave_no_scan_no_map_and_no_adapter_behind(cache):
    import argparse

    from page_scans import CPU

    from fmclip.page.handlers import Handlers
    from fmclip.page.visitors import Visitors
    from fmclip.session import Session

    def living() -> dict[str, int]:
        gc.collect()
        kinds = (Scan, Finding, Adapter, Visitor, Session)
        everything = Counter(type(one) for one in gc.get_objects())
        return {kind.__name__: everything[kind] for kind in kinds}

    page = Handlers(Visitors(lambda: Session("tiny", "cpu")), [], CPU)
    options = argparse.Namespace(tower="tiny", method="patch_memory", preset="fast", k=4)
    load._Visit(page, options, cache.parent, 0).run()
    kept, before = len(learning._detectors), living()
    for place in range(1, 9):
        load._Visit(page, options, cache.parent, place).run()
    assert living() == before
    assert len(learning._detectors) == kept
    assert len(page._visitors) == 0
    assert not [file for file in cache.rglob("*") if file.is_file()]
