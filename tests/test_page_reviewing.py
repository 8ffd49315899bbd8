"""Step 3's closer look on the tiny tower, without a browser: colours, why, and false alarms that are called normal."""

import threading

import numpy as np
import pytest
from page_scans import CPU, ME, event, shown
from PIL import Image

from fmclip.colours import COLOUR_MAPS
from fmclip.detectors import DETECTORS, PatchMemory, StageStarted, Step
from fmclip.page import answers, explaining, score_charts, uploads
from fmclip.page.cases import Case
from fmclip.page.handlers import NORMAL_BUTTONS, Handlers
from fmclip.page.painting import canvas, painted_mask
from fmclip.page.reviewing import Reviewing
from fmclip.page.visitors import Visitors
from fmclip.scans import Scan
from fmclip.session import Session

TRAINING = ("brain MRI", "fast")
SPOT = (slice(16, 40), slice(4, 28))


class Fast(PatchMemory):
    """The default method without training; waits at a gate before it has learned anything if a test closes it."""

    name = "fusionmedclip"
    gate = threading.Event()
    reached = threading.Event()

    def fit(self, normals, abnormals=None, *, on_event=None):
        on_event(StageStarted("training", 1))
        self.reached.set()
        while not self.gate.wait(0.01):
            on_event(Step("training", 1, 2, 0.5))
        return super().fit(normals, on_event=on_event)


@pytest.fixture
def visitors(monkeypatch, tmp_path) -> Visitors:
    monkeypatch.setattr(Fast, "gate", threading.Event())
    monkeypatch.setattr(Fast, "reached", threading.Event())
    Fast.gate.set()
    monkeypatch.setitem(DETECTORS, "fusionmedclip", Fast)
    monkeypatch.setattr(uploads, "get_upload_folder", lambda: str(tmp_path / "cache"))
    return Visitors(lambda: Session("tiny", "cpu"))


@pytest.fixture
def handlers(visitors, tmp_path) -> Handlers:
    files = [tmp_path / f"{seed}.png" for seed in range(6)]
    for seed, path in enumerate(files):
        pixels = np.random.default_rng(seed).normal(90, 6, (64, 80))
        if seed == 5:
            pixels[SPOT] = 230
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    case = Case("discs", "Discs", "brain MRI", "Made up.", tuple(files[:4]), tuple(files[4:]), ("normal", "a spot"))
    return Handlers(visitors, [case], CPU)


@pytest.fixture
def reviewing(handlers) -> Reviewing:
    """The closer look of a visitor who has adapted and looks at the scan with the spot."""
    handlers.load_case("discs", ME)
    shown(handlers.adapt(*TRAINING, ME))
    return Reviewing(handlers)


def no_forward_pass(monkeypatch) -> None:
    monkeypatch.setattr(Fast, "predict", lambda *arguments: pytest.fail("the tower was asked"))


def test_other_colours_redraw_everything_without_asking_the_tower(reviewing, handlers, monkeypatch):
    no_forward_pass(monkeypatch)
    first = reviewing.set_opacity(0.5, ME)
    page = reviewing.choose_colours("viridis", ME)
    for name in ("legend", "cards", "spot", "maps"):
        assert str(page[name]) != str(first[name]), name
    assert "rgb(68, 1, 84)" in page["legend"]  # viridis begins with dark violet
    again = reviewing.choose_colours("no such map", ME)
    assert again["legend"] == page["legend"]
    assert np.abs(page["slider"][1].astype(int) - first["slider"][1]).max() > 30


def test_a_drawing_that_a_slider_overtook_is_drawn_again(reviewing, visitors, monkeypatch):
    show = answers.show

    def overtaken(visitor):
        drawn = show(visitor)
        visitor.threshold = 1.0  # the other slider, while this one's pictures were drawn
        return drawn

    monkeypatch.setattr(answers, "show", overtaken)
    assert "set by hand" in reviewing.set_opacity(0.3, ME)["verdict"]


@pytest.mark.parametrize("name", COLOUR_MAPS)
def test_every_colour_map_rises_in_lightness(name):
    table = COLOUR_MAPS[name] / 255
    linear = np.where(table <= 0.04045, table / 12.92, ((table + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(luminance) > -1e-3).all()
    assert luminance[-1] > luminance[128] + 0.2 > luminance[0] + 0.2


def test_a_click_shows_the_reference_patches_and_the_same_scan_keeps_the_answer(reviewing, handlers, visitors):
    updates = list(reviewing.ask(event(x=0.2, y=0.4), ME))
    assert "Comparing a spot of" in updates[0]["why_note"]  # at once: a large tower takes its time
    page = shown(updates)
    assert page["why_note"] == ""
    assert "Distance" in page["why"]
    assert "reference scan" in page["why"]
    assert page["why"].count("<img") >= 4
    assert "fm-patch" in page["spot"]
    assert "Layer by layer" in page["maps"]
    assert "where the tower looks" in page["maps"]  # a transformer
    assert "reads the word" not in page["maps"]  # whose halves were never trained together
    assert shown(reviewing.set_threshold(0.4, ME))["why"] == page["why"]
    other = shown(handlers.select(event(index=0), ME))
    assert explaining.ASK in other["why"]
    assert "Layer by layer" not in other["maps"]
    assert "Distance" in shown(handlers.select(event(index=1), ME))["why"]


def test_an_answer_that_comes_while_other_answers_are_drawn_is_not_drawn_over(reviewing, visitors):
    drawing = answers.fill(visitors.get(ME))
    assert "Distance" not in next(drawing)["why"]  # reaches the page after the answer below
    shown(reviewing.ask_highest(ME))
    assert "Distance" in shown(drawing)["why"]


def test_the_highest_spot_lies_where_the_anomaly_is(reviewing, visitors):
    shown(reviewing.ask_highest(ME))
    told = visitors.get(ME).why.explanation
    rows, columns = SPOT
    assert rows.start - 8 <= told.y <= rows.stop + 8
    assert columns.start - 8 <= told.x <= columns.stop + 8
    assert told.distance > 1
    assert visitors.get(ME).why.explanation.views[0].map.size <= explaining.THUMBNAIL_SIDE**2


def test_an_adapter_from_a_file_explains_without_pictures_and_a_whole_scan_cannot_join(reviewing, handlers, visitors):
    path = handlers.offer_download(visitors.get(ME))["download"]["value"]
    visitors.get("other").queries.extend(visitors.get(ME).queries)
    shown(handlers.load_adapter(path, "other"))
    page = shown(reviewing.ask_highest("other"))
    assert explaining.NOT_AT_HAND in page["why"]
    assert "no picture" in page["why"]
    page = shown(reviewing.scan_is_normal(*TRAINING, "other"))
    assert "Mark the region" in page["normal_note"]


def test_a_whole_scan_joins_the_references_and_it_learns_again(reviewing, visitors):
    before = visitors.get(ME).findings[1].score
    page = shown(reviewing.scan_is_normal(*TRAINING, ME))
    assert len(visitors.get(ME).references) == 5
    assert visitors.get(ME).references[-1].label == "scan 5"
    assert "Adapted to 5 reference scans" in page["normal_note"]
    assert page["references"].count("<img") == 5
    assert visitors.get(ME).findings[1].score < before
    assert "one of the reference scans" in page["verdict"]  # it stays in view
    assert "already" in shown(reviewing.scan_is_normal(*TRAINING, ME))["normal_note"]


def handlers_select(reviewing: Reviewing, place: int) -> dict:
    return reviewing._page.select(event(index=place), ME)


def test_stopping_the_new_fit_keeps_the_adapter_from_before_and_the_buttons_rest_meanwhile(reviewing, visitors):
    session = visitors.get(ME).session
    before = session.adapter_key
    Fast.gate.clear()
    Fast.reached.clear()
    updates: list[dict] = []
    thread = threading.Thread(target=lambda: updates.extend(reviewing.scan_is_normal(*TRAINING, ME)))
    thread.start()
    assert Fast.reached.wait(timeout=20)
    assert "press Stop" in shown(reviewing.contours_are_normal(ME))["normal_note"]
    reviewing._page.stop(ME)
    thread.join(timeout=20)
    assert session.adapter_key == before
    page = shown(updates)
    assert "the adapter from before answers" in page["normal_note"]
    assert "Reference scan 5 is in step 1" in page["normal_note"]
    assert all(page[name]["interactive"] is True for name in NORMAL_BUTTONS)


def test_what_the_contours_hold_is_normal_at_once_and_can_be_taken_back(reviewing, visitors, monkeypatch):
    monkeypatch.setattr(Fast, "fit", lambda *arguments, **options: pytest.fail("nothing may be trained"))
    before = visitors.get(ME).findings[1]
    threshold = visitors.get(ME).session.calibration.threshold
    assert before.score > threshold
    page = shown(reviewing.contours_are_normal(ME))
    assert "threshold stays" in page["normal_note"]
    assert "on scan 2" in page["marks"]
    after = visitors.get(ME).findings[1]
    assert after.score < before.score
    assert visitors.get(ME).session.calibration.threshold == threshold
    assert page["download"]["interactive"] is True
    page = shown(reviewing.take_back(ME))
    assert page["marks"] == ""
    np.testing.assert_array_equal(visitors.get(ME).findings[1].map, before.map)


def test_a_painted_region_joins_and_the_next_adaptation_keeps_it(reviewing, handlers, visitors):
    opened = reviewing.open_editor(ME)["normal_editor"]
    assert opened["visible"] is True
    assert opened["value"]["background"].shape == (64, 80, 3)
    layer = np.zeros((128, 160, 4), np.uint8)  # an editor may give its layers in another size
    layer[32:80, 8:56, 3] = 255
    before = visitors.get(ME).findings[1].score
    page = shown(reviewing.painted_is_normal({"layers": [layer]}, ME))
    assert "11.2 % of it" in page["normal_note"]
    assert page["normal_editor"]["visible"] is False
    assert visitors.get(ME).findings[1].score < before
    shown(handlers.adapt(*TRAINING, ME))
    assert len(visitors.get(ME).session.regions) == 1
    assert visitors.get(ME).findings[1].score < before
    handlers.load_case("discs", ME)
    shown(handlers.adapt(*TRAINING, ME))
    assert visitors.get(ME).session.regions == ()


def test_marks_stay_in_sight_and_can_be_taken_back_after_the_references_are_gone(reviewing, handlers, visitors):
    before = visitors.get(ME).findings[1].map
    shown(reviewing.contours_are_normal(ME))
    handlers.clear_references(ME)
    page = handlers_select(reviewing, 0)
    assert "on scan 2" in page["marks"]
    assert page["take_back"]["visible"] is True
    shown(reviewing.take_back(ME))
    np.testing.assert_array_equal(visitors.get(ME).findings[1].map, before)


def test_a_mark_that_the_adapter_in_use_cannot_obey_can_be_taken_back(reviewing, handlers, visitors):
    shown(reviewing.contours_are_normal(ME))
    visitors.get(ME).method = "cosine"
    page = shown(handlers.adapt(*TRAINING, ME))
    assert "for the next adapter with a patch memory: on scan 2" in page["marks"]
    page = shown(reviewing.take_back(ME))
    assert "taken back" in page["normal_note"]
    assert page["marks"] == ""
    assert visitors.get(ME).regions == []


def test_a_scan_joins_only_the_references_that_the_adapter_was_learned_from(reviewing, handlers, visitors, tmp_path):
    path = handlers.offer_download(visitors.get(ME))["download"]["value"]
    shown(handlers.load_adapter(path, ME))
    key = visitors.get(ME).session.adapter_key
    page = shown(reviewing.scan_is_normal(*TRAINING, ME))
    assert "not learned from the reference scans of step 1" in page["normal_note"]
    assert len(visitors.get(ME).references) == 4
    assert visitors.get(ME).session.adapter_key == key


def test_an_answer_of_a_former_adapter_is_dropped(reviewing, visitors, monkeypatch):
    session = visitors.get(ME).session
    explain = session.explain

    def overtaken(*arguments):
        told = explain(*arguments)
        session.mark_normal([])
        return told

    monkeypatch.setattr(session, "explain", overtaken)
    assert "ask again" in shown(reviewing.ask_highest(ME))["why_note"]
    assert visitors.get(ME).why is None


def test_an_empty_painting_is_refused_and_nothing_changes(reviewing, visitors):
    reviewing.open_editor(ME)
    before = visitors.get(ME).session.adapter_key
    for painted in (None, canvas(visitors.get(ME).queries[0])):
        assert "Nothing is marked" in shown(reviewing.painted_is_normal(painted, ME))["normal_note"]
    assert visitors.get(ME).session.adapter_key == before
    visitors.get(ME).drop_queries()
    assert "open the editor again" in shown(reviewing.painted_is_normal(None, ME))["normal_note"]
    assert "No query scan" in shown(reviewing.ask(event(x=0, y=0), ME))["why_note"]


def test_paint_of_all_layers_counts_on_the_pixels_of_the_scan():
    scan = Scan(np.full((10, 20), 0.5, np.float32))
    first, second = np.zeros((10, 20, 4), np.uint8), np.zeros((20, 40, 4), np.uint8)
    first[0, 0], second[10:, 20:, 3] = 255, 9
    mask = painted_mask({"layers": [first, second]}, scan)
    assert mask[0, 0]
    assert mask[5:, 10:].all()
    assert mask.sum() == 51


def test_the_histogram_holds_one_dot_for_each_reference_and_stays_in_its_frame():
    for count in (2, 16, 64):
        chart = score_charts.score_histogram([0.5] * count, 0.6, 0.9)
        dots = [float(part.split('"')[0]) for part in chart.split('cy="')[1:]]
        assert len(dots) == count
        assert min(dots) > score_charts.TOP
        assert "fm-mark fm-high" in chart


def test_few_references_are_not_given_more_weight_than_they_have():
    assert score_charts.describe_odds((0.1, 0.2, 0.3, 0.4), 0.9) == "By chance alone, 1 of 5 normal scans would be."
    assert score_charts.describe_odds((0.1, 0.2, 0.3, 0.4), 0.35) == ""


def test_the_overview_places_every_query_and_none_hides_another(reviewing, visitors):
    findings = visitors.get(ME).findings
    page = handlers_select(reviewing, 0)["overview"]
    assert page.count("fm-dot-button") == len(findings) == 2
    assert page.count("<i style") == 4  # a tick for each reference
    assert page.count('aria-pressed="true"') == 1
    crowded = score_charts.overview([findings[0]] * 5, findings[0], 0.5)
    lanes = {part.split("px")[0] for part in crowded.split("bottom:")[1:]}
    assert len(lanes) == 5
    for count in (8, 20):  # more than there are lanes for large marks: small ones
        crowded = score_charts.overview([findings[0]] * count, findings[0], 0.5)
        lanes = {part.split("px")[0] for part in crowded.split("bottom:")[1:]}
        assert len(lanes) == count
        assert crowded.count("fm-small") == count
