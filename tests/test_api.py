"""The endpoints for scripts: the README's own snippet against a running page, and what they refuse."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from gradio_client import handle_file
from page_scans import CPU, pictures, save_picture
from PIL import Image

import app
from fmclip.checkpoint import load_adapter
from fmclip.detectors.madclip import MadCLIP
from fmclip.detectors.published import Published
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
        client, abnormals = variables["client"], ROOT / "examples/brain_mri_t1/query"
        _, facts = client.predict(
            variables["normals"],
            method="two_layer",
            abnormals=[handle_file(abnormals / f"query-{number:02d}.png") for number in (6, 7)],
            api_name="/adapt",
        )
        assert facts["abnormals"] == 2
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
        ({"preset": "row5"}, "preset must be fast or full; paper where there is a GPU"),
        (
            {"method": "fusionmedclip_published", "preset": "row6"},
            "or row5; paper where",
        ),  # row 6 is the paper's length
        ({"method": "madclip"}, "learns from abnormal scans too: give some as abnormals"),
        ({"method": "patch_memory", "abnormals": [11]}, "never learns from abnormal scans"),
        ({"method": "madclip", "masks": [11]}, "give the abnormal scans too"),
        ({"method": "madclip", "abnormals": [11, 12], "masks": [13]}, "2 abnormal scans came with 1 masks"),
        ({"method": "madclip", "abnormals": [11], "masks": [(13, 32)]}, "has 32 x 32 pixels, and the scan 64 x 64"),
        ({"method": "madclip", "abnormals": [4]}, "scan 4 and abnormal scan 1 are the same picture"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_uploads_are_deleted(service, cache, options, words):
    for name in ("abnormals", "masks"):
        if name in options:
            seeds = [one if isinstance(one, tuple) else (one, 64) for one in options[name]]
            options = options | {
                name: [save_picture(cache / name / f"Mustermann{seed}.png", seed, side) for seed, side in seeds]
            }
    with pytest.raises(gr.Error, match=words):
        service.adapt(pictures(cache, 1, 2, 3, 4), **options)
    assert not list(cache.rglob("*Mustermann*"))


@pytest.mark.parametrize("broken", ["files", "abnormals", "masks"])
def test_one_link_that_leads_nowhere_deletes_all_uploads(service, cache, broken):
    """Those behind it and of the other lists too."""
    lists = {
        name: [save_picture(cache / name / f"Mustermann{seed}.png", seed, 64) for seed in seeds]
        for name, seeds in (("files", (1, 2, 3)), ("abnormals", (4, 5)), ("masks", (6, 7)))
    }
    lists[broken].insert(0, str(cache / "nowhere.png"))
    with pytest.raises(gr.Error, match="not on this page"):
        service.adapt(lists.pop("files"), method="madclip", **lists)
    assert not list(cache.rglob("*Mustermann*"))


def test_abnormal_scans_and_the_masks_of_some_are_learned_from_and_gone(service, cache, monkeypatch):
    short = {"epochs": 1, "folds": 0, "copies": 0, "synonyms": 1, "batch_size": 4}
    monkeypatch.setitem(MadCLIP.config_class.PRESETS, "fast", short)
    given, fit = {}, MadCLIP.fit

    def watch(self, normals, abnormals=None, *, abnormal_masks=None, on_event=None):
        given.update(abnormals=abnormals, masks=abnormal_masks)
        return fit(self, normals, abnormals, abnormal_masks=abnormal_masks, on_event=on_event)

    monkeypatch.setattr(MadCLIP, "fit", watch)
    mask = np.zeros((64, 64), np.uint8)
    mask[10:20, 30:50] = 255
    file = cache / "masks" / "Mustermann.png"
    file.parent.mkdir(parents=True)
    Image.fromarray(mask).save(file)
    normals, abnormals = pictures(cache, 1, 2, 3, 4), pictures(cache, 11, 12)
    _, facts = service.adapt(normals, method="madclip", abnormals=abnormals, masks=["", str(file)])
    assert (facts["references"], facts["abnormals"]) == (4, 2)
    assert [scan.label for scan in given["abnormals"]] == ["abnormal scan 1", "abnormal scan 2"]
    assert given["masks"][0] is None
    assert np.array_equal(given["masks"][1], mask > 0)
    assert not list(cache.rglob("*Mustermann*"))


def test_a_row_of_the_paper_is_a_preset_of_its_method(service, cache, monkeypatch):
    monkeypatch.setitem(Published.config_class.PRESETS, "row5", {"row": 5, "epochs": 1, "folds": 0, "pool_size": 8})
    adapter, _ = service.adapt(pictures(cache, 1, 2, 3, 4), method="fusionmedclip_published", preset="row5")
    rows, _ = service.predict(adapter, pictures(cache, 9))
    assert 0 <= rows[0]["score"] <= 1


def test_a_variant_of_a_method_is_learned_with(service, cache):
    scans = pictures(cache, 1, 2, 3, 4)
    adapter, facts = service.adapt(scans, method="patch_memory", variants=["over = patches"])
    assert load_adapter(Path(adapter["path"]))[0].config.over == "patches"
    assert facts["preset"] == "fast, over=patches"


@pytest.mark.parametrize(
    ("variants", "told"),
    [
        (["coreset=0.1"], "no variant 'coreset=0.1'; there are over=patches."),
        (["over=both"], "must be references or patches"),
        ("over=patches", "a list of NAME=VALUE"),
        ([["over=patches"]], "no variant"),
    ],
)
def test_what_is_no_variant_is_refused(service, cache, variants, told):
    with pytest.raises(gr.Error, match=re.escape(told)):
        service.adapt(pictures(cache, 1, 2, 3, 4), method="patch_memory", variants=variants)


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
