"""Why a spot is odd: the reference patches it is compared with, found by hand; attention and Grad-CAM."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fmclip.detectors import DETECTORS, FusionMedCLIP, FusionMedCLIPConfig, PatchMemory
from fmclip.detectors.base import to_pixels
from fmclip.errors import FmclipError, NotFittedError, TowerError
from fmclip.explain import attention_map, explain, words_map
from fmclip.explanation_figure import crop_around, explanation_figure
from fmclip.memory import ReferenceMemory
from fmclip.scans import Letterbox, Scan
from fmclip.session import Session
from fmclip.towers import get_tower
from fmclip.views import view_features

SHAPES = ((64, 64), (48, 64), (96, 60), (64, 64))


def make_scan(seed: int, shape: tuple[int, int] = (64, 64)) -> Scan:
    pixels = np.random.default_rng(seed).random(shape, dtype=np.float32)
    pixels[: shape[0] // 3] *= 0.3
    return Scan(pixels, f"scan {seed}")


@pytest.fixture
def references() -> list[Scan]:
    return [make_scan(seed, shape) for seed, shape in enumerate(SHAPES, start=1)]


@pytest.fixture
def memory(tiny_tower, references) -> PatchMemory:
    return PatchMemory(tiny_tower).fit(references)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_patch_of_a_reference_is_found_again_where_it_lies(memory, references, number):
    """Nothing is as near as itself; the letterbox of each shape is undone."""
    scan = references[number - 1]
    x, y = scan.width * 0.8, scan.height * 0.55
    found = explain(memory, scan, x, y, references=references)
    left, top, right, bottom = found.box
    assert left <= x <= right
    assert top <= y <= bottom
    assert found.distance == pytest.approx(0, abs=1e-3)
    for view in found.views:
        assert view.matches[0].scan is scan
        assert view.matches[0].label == f"scan {number}"
        assert view.matches[0].box == found.box
        assert view.matches[0].distance == pytest.approx(0, abs=1e-3)
        assert view.matches[1].distance > 0.01


def test_matches_are_the_nearest_patches_of_different_references(memory, references):
    query = make_scan(9)
    found = explain(memory, query, 52, 30, references=references, count=4)
    pixels, _, _ = to_pixels([query], memory.tower)
    looks = view_features(memory.patch_features(pixels), memory.memory_.views)
    for index, view in enumerate(found.views):
        patch = looks[index][0, :, 3, 6] @ memory.memory_.whitening[index]  # 8 x 8 patches of 8 pixels
        apart = (memory.memory_.bank[index] - patch).norm(dim=1)
        apart = apart / memory.memory_.scale[index] / memory.memory_.level[index]
        by_hand = sorted((float(apart[memory.memory_.owner == owner].min()), owner) for owner in range(4))
        assert [match.reference for match in view.matches] == [owner for _, owner in by_hand]
        np.testing.assert_allclose([match.distance for match in view.matches], [one for one, _ in by_hand], rtol=1e-4)
        leaning = np.mean([one**-8.0 for one, _ in by_hand]) ** (-1 / 8)  # on the nearest
        assert view.distance == pytest.approx(leaning, rel=1e-4)
    assert found.box == (48, 24, 56, 32)


def test_the_views_make_up_the_distance_by_their_shares(memory, references):
    for x in (60, 32):  # beside the midline, and on it
        found = explain(memory, make_scan(9), x, 30, references=references)
        assert sum(view.share for view in found.views) == pytest.approx(1)
        assert found.distance == pytest.approx(sum(view.share * view.distance for view in found.views), rel=1e-4)
    mirror = found.views[-1]
    assert (mirror.kind, mirror.share, mirror.matches) == ("mirror", 0, ())


def test_each_view_has_a_map_on_the_scan(memory, references):
    query = make_scan(9, (48, 64))
    found = explain(memory, query, 60, 20, references=references)
    (prediction,) = memory.predict([query])
    np.testing.assert_array_equal(found.map, prediction.map)
    assert found.parts.keys() == prediction.parts.keys()
    maps = [view.map for view in found.views]
    assert all(one.shape == (48, 64) and one.min() >= 0 and one.max() <= 1 for one in maps)
    assert len({one.tobytes() for one in maps}) == len(maps)


def test_a_trained_detector_explains_with_the_features_that_it_compares(tiny_tower, references):
    config = FusionMedCLIPConfig(stage2_epochs=1, stage3_epochs=1, pool_size=4, batch_size=4)
    detector = FusionMedCLIP(tiny_tower, config).fit(references)
    found = explain(detector, references[0], 50, 40, references=references)
    assert set(found.parts) == {"patch memory", "learned"}
    assert found.distance == pytest.approx(0, abs=1e-3)
    assert found.views[0].matches[0].label == "scan 1"


def test_copies_do_not_shift_the_references(tiny_tower, references):
    doubled = [references[0], Scan(references[0].pixels, "copy"), *references[1:]]
    detector = PatchMemory(tiny_tower).fit(doubled)
    found = explain(detector, references[3], 50, 40, references=doubled)
    assert found.views[0].matches[0].label == "scan 4"


@pytest.mark.parametrize("at_hand", [0, 3])
def test_without_the_right_pictures_only_numbers_are_given(memory, references, at_hand):
    match = explain(memory, references[2], 30, 60, references=references[:at_hand]).views[0].matches[0]
    assert (match.label, match.scan, match.box) == ("reference 3", None, None)


def test_a_spot_on_the_edge_counts_and_one_outside_does_not(memory, references):
    query = make_scan(9, (48, 64))
    assert explain(memory, query, 64, 48).box[2:] == (64, 48)
    for x, y in ((65, 3), (3, 49), (-1, 3), (float("nan"), 3)):
        with pytest.raises(FmclipError, match="outside scan 9"):
            explain(memory, query, x, y)


def test_a_place_out_of_range_in_a_file_points_into_the_scan(memory, references):
    state = memory.memory_.state()
    state["memory.place"] = torch.full_like(state["memory.place"], 10_000)
    views, device = memory.memory_.views, memory.tower.device
    memory.memory_ = ReferenceMemory.from_state(state, views, 4, device)
    match = explain(memory, references[0], 50, 40, references=references).views[0].matches[0]
    left, top, right, bottom = match.box
    assert 0 <= left < right <= match.scan.width
    assert 0 <= top < bottom <= match.scan.height


def test_methods_without_a_patch_memory_say_so(tiny_tower, references):
    detector = DETECTORS["cosine"](tiny_tower).fit(references)
    with pytest.raises(FmclipError, match="cosine compares no patches"):
        explain(detector, references[0], 3, 3)
    with pytest.raises(NotFittedError):
        explain(PatchMemory(tiny_tower), references[0], 3, 3)


@pytest.mark.parametrize("shape", SHAPES)
def test_cells_of_the_square_and_spots_of_the_scan_fit_together(shape):
    box = Letterbox.of(shape, 64)
    for x, y in ((0, 0), (shape[1] - 1, shape[0] - 1), (shape[1] / 2, shape[0] / 3)):
        left, top, right, bottom = box.cell_box(*box.cell_at(x, y, (8, 8)), (8, 8))
        assert left - 1 <= x <= right + 1
        assert top - 1 <= y <= bottom + 1


def test_a_session_explains_and_forgets_pictures_with_the_adapter(tmp_path, references):
    session = Session("tiny", "cpu")
    with pytest.raises(NotFittedError):
        session.explain(references[0], 3, 3)
    list(session.adapt(references, method="patch_memory"))
    assert session.references == tuple(references)
    assert session.explain(references[1], 50, 40).views[0].matches[0].scan is references[1]
    assert session.attention(references[1]).shape == SHAPES[1]
    with pytest.raises(TowerError, match="never trained together"):
        session.grad_cam(references[1])
    session.save(tmp_path / "a.safetensors")
    session.load(tmp_path / "a.safetensors")
    assert session.references == ()
    assert session.explain(references[1], 50, 40).views[0].matches[0].label == "reference 2"


def test_attention_lies_on_the_scan(memory):
    found = attention_map(memory, make_scan(9, (48, 64)))
    assert found.shape == (48, 64)
    assert found.max() == pytest.approx(1)
    assert found.min() >= 0


def test_the_embedded_kind_of_tower_has_no_attention(references):
    detector = PatchMemory(get_tower("tiny-resnet")).fit(references)
    with pytest.raises(TowerError, match="is a CNN"):
        attention_map(detector, references[0])


def test_words_are_asked_of_a_tower_that_can_read(tiny_tower, references, monkeypatch):
    monkeypatch.setattr(tiny_tower, "paired", True)
    detector = DETECTORS["zero_shot"](tiny_tower).fit(references)
    found = words_map(detector, references[1])
    assert found.shape == SHAPES[1]
    assert 0 <= found.min() <= found.max() <= 1


def test_the_figure_shows_each_view_with_its_matches(memory, references):
    found = explain(memory, make_scan(9), 60, 30, references=references)
    figure = explanation_figure(found, 0.5)
    FigureCanvasAgg(figure).draw()
    titles = [axes.get_title() for axes in figure.axes]
    for view in found.views:
        assert f"here: {view.distance:.2f}" in titles
        for match in view.matches:
            assert f"{match.label}: {match.distance:.2f}" in titles
    bare = explanation_figure(explain(memory, make_scan(9), 32, 30), 0.5)
    FigureCanvasAgg(bare).draw()
    texts = [text.get_text() for axes in bare.axes for text in axes.texts]
    assert any("no picture" in text for text in texts)
    assert any("midline" in text for text in texts)


@pytest.mark.parametrize("box", [(0, 0, 8, 8), (56, 40, 64, 48), (20, 16, 28, 26)])
def test_a_crop_holds_its_patch_wherever_it_lies(box):
    scan = make_scan(3, (48, 64))
    crop, (left, top, right, bottom) = crop_around(scan, box)
    np.testing.assert_array_equal(crop[top:bottom, left:right], scan.pixels[box[1] : box[3], box[0] : box[2]])
    assert crop.shape[0] > bottom - top
