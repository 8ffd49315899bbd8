"""A visitor's ways over the page, in a real browser, on the embedded tower."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect
from scan_files import write_nifti
from screenshots import keep_screenshot

pytestmark = [pytest.mark.browser, pytest.mark.slow]

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
CASE = "brain_mri_t1"
LONG = 300_000  # ms


def load_case(page: Page, name: str = CASE) -> None:
    page.click(f"#case-{name}")
    expect(page.locator("#references img")).to_have_count(16)


def choose_adapter(page: Page, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.click("#load")
    chooser.value.set_files(path)


def overlay_address(page: Page) -> str:
    return page.locator("#slider img").last.get_attribute("src") or ""


def press(page: Page, slider: str, key: str, times: int) -> None:
    handle = page.locator(f"#{slider} input[type=range]")
    handle.focus()
    for _ in range(times):
        handle.press(key)


def test_from_an_example_case_to_a_verdict_and_back_with_the_adapter(visitor: Page, served, tmp_path):
    load_case(visitor)
    expect(visitor.locator("#waiting")).to_contain_text("Adapt to reference scans first")
    visitor.click("#adapt")
    expect(visitor.locator("#stop")).to_be_enabled(timeout=LONG)
    for name in ("adapt", "load", "clear-references", f"case-{CASE}"):
        expect(visitor.locator(f"#{name}")).to_be_disabled()
    expect(visitor.locator("#cards .fm-card")).to_have_count(8, timeout=LONG)  # before the training has ended
    expect(visitor.locator("#status [role=progressbar]")).to_be_visible()
    expect(visitor.locator("#synthetic .fm-example").first).to_be_visible(timeout=LONG)
    expect(visitor.locator("#loss svg")).to_be_visible(timeout=LONG)
    expect(visitor.locator("#status")).to_contain_text("Adapted to 16 reference scans", timeout=LONG)
    for name in ("adapt", "load", "clear-references", f"case-{CASE}"):
        expect(visitor.locator(f"#{name}")).to_be_enabled()
    expect(visitor.locator("#download")).to_be_enabled(timeout=LONG)

    scores = [float(text) for text in visitor.locator("#cards .fm-score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    expect(visitor.locator("#verdict")).to_contain_text("deviates from the references")
    expect(visitor.locator("#verdict")).to_contain_text("higher than all 16 reference scans")
    expect(visitor.locator("#verdict")).to_contain_text("simulated lesion")
    expect(visitor.locator("#slider img")).to_have_count(2)
    assert visitor.locator("#slider img").last.evaluate("image => image.naturalWidth") >= 256
    keep_screenshot(visitor, "page", tmp_path)

    overlay_follows_the_sliders(visitor)
    last_card = visitor.locator("#cards .fm-card").last
    label = last_card.locator(".fm-label").inner_text()
    last_card.click()
    expect(visitor.locator("#verdict h3")).to_contain_text(label.capitalize())

    with visitor.expect_download() as download:
        visitor.click("#download")
    adapter = tmp_path / "mine.safetensors"
    download.value.save_as(adapter)
    assert re.fullmatch(r"fmclip-adapter-[0-9a-f]{8}\.safetensors", download.value.suggested_filename)
    another_visitor_loads(visitor, served, adapter, scores)


def overlay_follows_the_sliders(page: Page) -> None:
    before = overlay_address(page)
    press(page, "opacity", "ArrowRight", 4)
    expect(page.locator("#slider img").last).not_to_have_attribute("src", before, timeout=20_000)
    press(page, "threshold", "End", 1)
    expect(page.locator("#verdict")).to_contain_text("set by hand", timeout=20_000)
    expect(page.locator("#verdict h3")).to_contain_text("within the references")
    page.click("#reset")
    expect(page.locator("#verdict h3")).to_contain_text("deviates", timeout=20_000)
    expect(page.locator("#verdict")).not_to_contain_text("set by hand")


def another_visitor_loads(page: Page, served, adapter: Path, scores: list[float]) -> None:
    """What was learned answers the same for somebody else, who sees none of the first visitor's scans."""
    other = page.context.new_page()
    other.goto(served.url, wait_until="domcontentloaded")
    other.locator("#adapt").wait_for()
    expect(other.locator("#references img")).to_have_count(0)
    choose_adapter(other, adapter)
    expect(other.locator("#status")).to_contain_text("learned from 16 reference scans", timeout=LONG)
    other.set_input_files("#query-files input[type=file]", sorted((EXAMPLES / CASE / "query").glob("*.png")))
    expect(other.locator("#cards .fm-card")).to_have_count(8, timeout=LONG)
    assert [float(text) for text in other.locator("#cards .fm-score").all_inner_texts()] == scores
    other.close()


def test_stop_ends_the_training_and_the_page_goes_on(visitor: Page):
    load_case(visitor)
    visitor.get_by_label("Full, about 1 min").check()
    visitor.click("#adapt")
    expect(visitor.locator("#cards .fm-card")).to_have_count(8, timeout=LONG)
    visitor.click("#stop")
    expect(visitor.locator("#status")).to_contain_text("Stopped after", timeout=20_000)
    expect(visitor.locator("#status")).to_contain_text("the state after patch memory is kept")
    expect(visitor.locator("#adapt")).to_be_enabled()
    expect(visitor.locator("#stop")).to_be_disabled()
    visitor.locator("#cards .fm-card").last.click()
    expect(visitor.locator("#verdict h3")).to_be_visible()


def test_bad_files_are_named_by_their_place_and_the_others_go_on(visitor: Page, served, tmp_path):
    (tmp_path / "Erika_Mustermann.png").write_text("this is not a picture")
    (tmp_path / "Max_Mustermann.png").write_bytes((EXAMPLES / CASE / "normal" / "normal-01.png").read_bytes())
    files = [tmp_path / "Erika_Mustermann.png", tmp_path / "Max_Mustermann.png"]
    visitor.set_input_files("#reference-files input[type=file]", files)
    note = visitor.locator("#reference-note")
    expect(note).to_contain_text("1 scan read, 1 refused", timeout=20_000)
    expect(note).to_contain_text("scan 1")
    expect(visitor.locator("#references img")).to_have_count(1)
    visitor.click("#adapt")
    expect(visitor.locator("#status")).to_contain_text("Only one normal scan", timeout=60_000)
    expect(visitor.locator("#adapt")).to_be_enabled()
    load_case(visitor)
    assert "Mustermann" not in visitor.content()
    assert "Mustermann" not in served.log.read_text()
    assert not list(served.cache.rglob("*Mustermann*"))


def test_single_references_are_taken_away_and_volumes_are_read_as_chosen(visitor: Page, tmp_path):
    load_case(visitor)
    visitor.locator("#references .fm-pick").nth(1).click()
    visitor.locator("#references .fm-pick").nth(4).press("Enter")
    expect(visitor.locator("#remove-marked")).to_have_text("Remove 2 selected")
    visitor.click("#remove-marked")
    expect(visitor.locator("#references img")).to_have_count(14)
    expect(visitor.locator("#reference-note")).to_contain_text("Removed scan 2 and scan 5")

    files = []
    for place, seed in enumerate((0, 1, 0)):
        volume = np.random.default_rng(seed).uniform(-900, 100, (32, 32, 5)).astype(np.float32)
        files.append(write_nifti(tmp_path / f"{place}.nii", volume))
    visitor.get_by_text("DICOM and NIfTI: slices and window").click()
    expect(visitor.get_by_label("Slice")).to_have_value("middle")
    visitor.locator("#window input").click()
    visitor.get_by_role("option", name="lung").click()
    visitor.get_by_label("Slice").click()
    visitor.get_by_label("Slice").fill("2")
    visitor.get_by_label("Slice").press("Tab")  # a person leaves the field before choosing files
    expect(visitor.get_by_label("Slice")).to_have_value("2")
    visitor.set_input_files("#reference-files input[type=file]", files)
    expect(visitor.locator("#reference-note")).to_contain_text("slice 2 is shown")
    expect(visitor.locator("#window")).to_contain_text("Belongs to the reference scans")
    visitor.locator("#remove-suspects").click()
    expect(visitor.locator("#references img")).to_have_count(2)
    expect(visitor.locator("#remove-suspects")).to_be_hidden()


def test_adapting_without_scans_and_asking_before_adapting_say_what_to_do(visitor: Page, tmp_path):
    visitor.click("#adapt")
    expect(visitor.locator("#status")).to_contain_text("No normal scan was given", timeout=60_000)
    path = tmp_path / "scan.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60), dtype=np.uint8)).save(path)
    visitor.set_input_files("#query-files input[type=file]", path)
    expect(visitor.locator("#waiting")).to_contain_text("Adapt to reference scans first", timeout=20_000)
    expect(visitor.locator("#waiting img")).to_have_count(1)


def test_a_foreign_adapter_file_is_refused(visitor: Page, tmp_path):
    path = tmp_path / "noise.safetensors"
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    choose_adapter(visitor, path)
    expect(visitor.locator("#status")).to_contain_text("not an adapter file", timeout=LONG)
    expect(visitor.locator("#adapt")).to_be_enabled()


def test_the_page_fits_a_narrow_window_and_says_what_it_is(visitor: Page):
    visitor.set_viewport_size({"width": 400, "height": 900})
    load_case(visitor)
    assert visitor.evaluate("document.documentElement.scrollWidth") <= 400
    expect(visitor.get_by_text("Not a medical device")).to_be_visible()
    expect(visitor.locator("#tower")).to_contain_text("not trained together", timeout=LONG)
