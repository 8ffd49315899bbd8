"""The endpoints for scripts: the README's own snippet against a running page, and what they refuse."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
from page_scans import CPU, pictures, save_picture

import app
from fmclip.errors import FmclipError
from fmclip.page import api
from fmclip.page.tower import TowerLoader
from fmclip.session import Session

ROOT = Path(__file__).parents[1]


@pytest.fixture
def service(cache) -> api.Service:
    return api.Service(lambda: Session("tiny", "cpu"), CPU)


def test_the_snippet_of_the_readme_works_on_a_running_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.chdir(ROOT)
    page = app.build_page(TowerLoader("tiny", "cpu"))
    page.queue().launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1")
    try:
        text = (ROOT / "README.md").read_text("utf-8")
        (snippet,) = [one for one in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "gradio_client" in one]
        assert "http://127.0.0.1:7860/" in snippet
        variables: dict = {}
        exec(snippet.replace("http://127.0.0.1:7860/", page.local_url), variables)
        assert variables["facts"]["references"] == 8
        assert variables["rows"][0]["label"] == "scan 1"
        assert Path(variables["overlays"][0]).read_bytes()[:4] == b"\x89PNG"
        names = variables["client"].view_api(return_format="dict")["named_endpoints"]
        assert set(names) == {"/adapt", "/predict"}
    finally:
        page.close()


def test_the_same_scans_and_seed_give_the_same_answer_and_uploads_are_gone(service, cache):
    scores = []
    for _ in range(2):
        adapter, facts = service.adapt(pictures(cache, 1, 2, 3, 4), method="patch_memory")
        rows, overlays = service.predict(adapter, pictures(cache, 9))
        scores.append((facts["threshold"], rows[0]["score"]))
        assert not list(cache.rglob("*Mustermann*"))
        assert not Path(adapter["path"]).exists()
        assert len(overlays) == 1
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "magic"}, "no such method"),
        ({"preset": "paper"}, "where there is a GPU"),
        ({"slices": "x"}, "whole number"),
        ({"window": "x"}, "no such window"),
        ({"seed": float("nan")}, "seed must be a whole number"),
        ({"seed": None}, "seed must be a whole number"),
        ({"method": "zero_shot"}, "never trained together"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_uploads_are_deleted(service, cache, options, words):
    with pytest.raises(gr.Error, match=words):
        service.adapt(pictures(cache, 1, 2, 3, 4), **options)
    assert not list(cache.rglob("*Mustermann*"))


def test_one_refused_scan_refuses_the_call_without_its_name(service, cache, caplog):
    bad = cache / "x" / "Mustermann.png"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"text")
    with caplog.at_level(logging.DEBUG), pytest.raises(gr.Error) as caught:
        service.adapt([*pictures(cache, 1, 2), str(bad)])
    assert "scan 3" in str(caught.value)
    assert "Mustermann" not in str(caught.value) + caplog.text


def test_an_unexpected_error_says_nothing_about_files(service, cache, monkeypatch, caplog):
    monkeypatch.setattr(api, "take_scans", lambda *_: Path("/home/Mustermann/scan.png").read_bytes())
    with caplog.at_level(logging.DEBUG), pytest.raises(gr.Error, match="Something unexpected") as caught:
        service.adapt([save_picture(cache / "a" / "b.png", 1)])
    assert "Mustermann" not in str(caught.value) + caplog.text


def test_the_mcp_server_is_off_unless_asked_for_and_says_what_it_needs(monkeypatch):
    monkeypatch.delenv(api.MCP_SWITCH, raising=False)
    assert not api.wants_mcp()
    monkeypatch.setenv(api.MCP_SWITCH, "1")
    monkeypatch.setattr(api.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FmclipError, match=r"gradio\[mcp\]"):
        api.wants_mcp()
    monkeypatch.setattr(api.importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    assert api.wants_mcp()
