"""The choice of a method on the page, and abnormal scans with painted masks."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
from page_scans import CPU, ME, PLAIN, event, pictures, shown

from fmclip.detectors import DETECTORS, DetectorConfig
from fmclip.detectors.base import setting
from fmclip.detectors.madclip import MadCLIP
from fmclip.detectors.published import Published
from fmclip.errors import FmclipError
from fmclip.job import what_is_trained
from fmclip.page import exports
from fmclip.page.handlers import Handlers
from fmclip.page.keeping import Keeping
from fmclip.page.teaching import Teaching
from fmclip.settings import PRESETS, config_of, read_variants, variants_of


@pytest.fixture
def handlers(visitors, cache) -> Handlers:
    return Handlers(visitors, [], CPU)


@pytest.fixture
def teaching(handlers) -> Teaching:
    return Teaching(handlers)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setitem(
        MadCLIP.config_class.PRESETS, "fast", {"epochs": 1, "folds": 0, "copies": 0, "synonyms": 1, "batch_size": 4}
    )


def painted(scan, rows: slice, columns: slice, scale: int = 1) -> dict:
    layer = np.zeros((scan.height * scale, scan.width * scale, 4), np.uint8)
    layer[rows, columns] = (255, 140, 0, 255)
    return {"background": None, "layers": [layer], "composite": None}


def test_every_method_is_offered_and_those_that_the_tower_refuses_are_marked(handlers):
    menu = shown(handlers.arrive(ME))["method"]["choices"]
    assert [name for _, name in menu] == list(DETECTORS)
    refused = [name for title, name in menu if title.endswith("not with this tower")]
    assert refused == ["zero_shot"]  # the tiny tower is a ViT whose halves were never trained together


def test_a_refused_method_says_why_when_chosen_and_does_not_adapt(handlers, teaching, cache):
    handlers.add_references(pictures(cache, 1, 2, 3, 4), *PLAIN, ME)
    page = shown(teaching.choose_method("zero_shot", ME))
    assert "were never trained together" in page["method_note"]
    page = shown(handlers.adapt("brain MRI", "fast", ME))
    assert "were never trained together" in page["status"]
    assert page["adapt"]["interactive"] is True


def test_a_chosen_method_is_the_one_that_adapts(handlers, teaching, visitors, cache):
    handlers.add_references(pictures(cache, 1, 2, 3, 4), *PLAIN, ME)
    page = shown(teaching.choose_method("cosine", ME))
    assert "mean of the references" in page["method"]["info"]
    assert page["abnormal_panel"]["visible"] is False
    assert "Adapted to 4" in shown(handlers.adapt("brain MRI", "fast", ME))["status"]
    assert visitors.get(ME).session.detector.name == "cosine"


def test_the_panel_for_abnormal_scans_opens_by_itself_but_is_never_closed_by_a_method(teaching):
    assert shown(teaching.choose_method("madclip", ME))["abnormal_panel"]["open"] is True
    panel = shown(teaching.choose_method("two_layer", ME))["abnormal_panel"]
    assert panel["visible"] is True
    assert "open" not in panel


def test_a_method_that_needs_abnormal_scans_asks_for_them_and_learns_from_their_masks(
    handlers, teaching, visitors, cache, quick, monkeypatch
):
    handlers.add_references(pictures(cache, 1, 2, 3, 4), *PLAIN, ME)
    assert shown(teaching.choose_method("madclip", ME))["abnormal_panel"]["visible"] is True
    assert "upload some under Abnormal scans" in shown(handlers.adapt("brain MRI", "fast", ME))["status"]
    page = shown(teaching.add_abnormals(pictures(cache, 11, 12), *PLAIN, ME))
    assert page["abnormals"].count("fm-pick") == 2
    visitor = visitors.get(ME)
    page = shown(teaching.select_abnormal(event(index=1), ME))
    assert page["editor"]["value"]["background"].shape == (64, 64, 3)
    page = shown(teaching.keep_mask(painted(visitor.abnormals[1], slice(20, 40), slice(30, 50), scale=2), ME))
    assert "With a mask: abnormal scan 2" in page["abnormals"]
    given = {}
    fit = MadCLIP.fit

    def watch(self, normals, abnormals=None, *, abnormal_masks=None, on_event=None):
        given.update(abnormals=abnormals, masks=abnormal_masks)
        return fit(self, normals, abnormals, abnormal_masks=abnormal_masks, on_event=on_event)

    monkeypatch.setattr(MadCLIP, "fit", watch)
    assert "Adapted to 4" in shown(handlers.adapt("brain MRI", "fast", ME))["status"]
    assert given["abnormals"] == visitor.abnormals
    assert given["masks"][0] is None
    rows, columns = np.nonzero(given["masks"][1])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 19, 15, 24)


def test_the_trainings_are_those_of_the_chosen_method(handlers, teaching, visitors, cache, monkeypatch):
    monkeypatch.setitem(Published.config_class.PRESETS, "row5", {"row": 5, "epochs": 1, "folds": 0, "pool_size": 8})
    handlers.add_references(pictures(cache, 1, 2, 3, 4), *PLAIN, ME)
    radio = shown(teaching.choose_method("fusionmedclip_published", ME))["preset"]
    rows = [f"row{row}" for row in range(1, 6)]  # row 6 trains as long as the paper: on a GPU only
    assert [name for _, name in radio["choices"]] == ["fast", "full", *rows]
    on_gpu = Handlers(visitors, [], SimpleNamespace(has_gpu=True, describe=lambda: "a tower"))
    names = [name for _, name in shown(on_gpu.arrive(ME))["preset"]["choices"]]
    assert names == ["fast", "full", *rows, "row6", "paper"]
    teaching.choose_preset("row5", ME)
    assert "Adapted to 4" in shown(handlers.adapt("brain MRI", "row5", ME))["status"]
    assert visitors.get(ME).session.detector.config.row == 5
    assert exports._not_repeatable(visitors.get(ME)) == ""
    assert shown(Keeping(handlers)._shown_again(visitors.get(ME)))["preset"]["value"] == "row5"
    radio = shown(teaching.choose_method("cosine", ME))["preset"]
    assert ([name for _, name in radio["choices"]], radio["value"]) == (["fast", "full"], "fast")
    assert "no such training" in shown(handlers.adapt("brain MRI", "row5", ME))["status"]


def test_a_variant_of_the_method_is_adapted_with_until_another_method_is_chosen(handlers, teaching, visitors, cache):
    handlers.add_references(pictures(cache, 1, 2, 3, 4), *PLAIN, ME)
    page = shown(teaching.choose_method("patch_memory", ME))
    assert page["variant_panel"]["visible"] is True
    assert [variant for _, variant in page["variants"]["choices"]] == ["over=patches"]
    teaching.choose_variants(["over=patches"], ME)
    page = shown(handlers.arrive(ME))
    assert page["variants"]["value"] == ["over=patches"]
    assert page["variant_panel"]["open"] is True
    status = shown(handlers.adapt("brain MRI", "fast", ME))["status"]
    assert "Adapted to 4 reference scans with over=patches in" in status
    assert visitors.get(ME).session.detector.config.over == "patches"
    assert exports._not_repeatable(visitors.get(ME)) == ""
    for other in ("heads=common", "coreset=0.1"):  # of another method; no variant, since it may take any time
        assert "there are over=patches" in shown(teaching.choose_variants([other], ME))["method_note"]
    assert shown(teaching.choose_variants([], ME))["method_note"] == ""
    assert visitors.get(ME).variants == []
    teaching.choose_variants(["over=patches"], ME)
    page = shown(teaching.choose_method("cosine", ME))
    assert page["variant_panel"]["visible"] is False
    assert page["variants"]["value"] == []
    assert "Adapted to 4 reference scans in" in shown(handlers.adapt("brain MRI", "fast", ME))["status"]
    shown(teaching.choose_method("patch_memory", ME))
    teaching.choose_variants(["over=patches"], ME)
    assert shown(Keeping(handlers).forget(ME))["variants"]["value"] == []


@pytest.mark.parametrize("method", DETECTORS)
@pytest.mark.parametrize("preset", PRESETS)
def test_no_variant_makes_training_longer(method, preset):
    """A visitor of a shared page may choose any of them."""
    plain = config_of(method, preset).plan(16)
    for variant in variants_of(DETECTORS[method].config_class):
        assert config_of(method, preset, read_variants(method, [variant])).plan(16) == plain


def test_the_order_of_ticks_and_plain_values_change_nothing():
    """The same training has the same name, wherever it is told or timed."""
    chosen = read_variants("madclip", ["heads=common", "prompts=fixed", "branches=two"])
    assert list(chosen.items()) == [("prompts", "fixed"), ("heads", "common")]


def test_only_declared_values_are_variants(monkeypatch):
    @dataclass(frozen=True)
    class Config(DetectorConfig):
        way: Literal["plain", "short", "slow"] = setting("plain", "how", {"short": "in short"})

    monkeypatch.setitem(DETECTORS, "other", SimpleNamespace(config_class=Config))
    assert read_variants("other", ["way=short"]) == {"way": "short"}
    with pytest.raises(FmclipError, match="no variant 'way=slow'; there are way=short"):
        read_variants("other", ["way=slow"])


def test_a_variant_has_a_pace_of_its_own():
    """ConRAD without its prompts takes a fraction of the time: nobody's estimate may come from there."""
    assert what_is_trained("mini", "cpu", "conrad", {"conditioned": False}) != what_is_trained(
        "mini", "cpu", "conrad", {}
    )


def test_the_ablations_of_madclip_are_its_variants(teaching):
    page = shown(teaching.choose_method("madclip", ME))
    assert [variant for _, variant in page["variants"]["choices"]] == [
        *("prompts=fixed", "objective=generic", "branches=one"),
        *("opposite_signal=false", "image_loss=softmax", "heads=common"),
    ]
    assert page["variants"]["choices"][5][0] == "heads=common: one head for score and map"


def test_wiping_the_paint_away_takes_the_mask_away(teaching, visitors, cache):
    teaching.add_abnormals(pictures(cache, 11), *PLAIN, ME)
    teaching.select_abnormal(event(index=0), ME)
    scan = visitors.get(ME).abnormals[0]
    teaching.keep_mask(painted(scan, slice(0, 9), slice(0, 9)), ME)
    assert visitors.get(ME).abnormal_masks[scan].sum() == 81
    teaching.keep_mask(painted(scan, slice(0, 0), slice(0, 0)), ME)
    assert visitors.get(ME).abnormal_masks == {}


def test_abnormal_scans_are_named_by_number_only_and_go_at_once(teaching, visitors, cache):
    files = pictures(cache, 11)
    (cache / "bad").mkdir()
    (cache / "bad" / "Erika_Mustermann.png").write_bytes(b"no picture")
    page = shown(teaching.add_abnormals([*files, str(cache / "bad" / "Erika_Mustermann.png")], *PLAIN, ME))
    assert "abnormal scan 2 is" in page["abnormal_note"]
    assert "Mustermann" not in page["abnormal_note"] + page["abnormals"]
    assert shown(teaching.clear_abnormals(ME))["abnormals"] == ""
    assert visitors.get(ME).abnormals == []
