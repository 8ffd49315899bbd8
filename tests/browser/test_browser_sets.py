"""Steps 1 and 2 in a real browser: archives and strays, methods and painted masks, stop and resume, a reload."""

import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect
from screenshots import keep_screenshot

pytestmark = [pytest.mark.browser, pytest.mark.slow]

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
CASE = EXAMPLES / "brain_mri_t1"
LONG = 300_000  # ms


def choose_method(page: Page, title: str) -> None:
    expect(page.get_by_text("A memory of your scans")).to_be_visible(timeout=LONG)
    page.locator("#method input").click()
    page.get_by_role("option", name=title).click()
    expect(page.locator("#method")).not_to_contain_text("A memory of your scans")


def upload_zip(page: Page, folder: Path, count: int) -> None:
    with zipfile.ZipFile(folder / "Mustermann.zip", "w") as archive:
        for file in sorted((CASE / "normal").glob("*.png"))[:count]:
            archive.write(file, f"Mustermann/{file.name}")
    page.set_input_files("#reference-files input[type=file]", folder / "Mustermann.zip")
    expect(page.locator("#references img")).to_have_count(count)


def test_a_zip_is_unpacked_and_a_stray_is_named_and_dropped_with_a_click(visitor: Page, served, tmp_path):
    expect(visitor.get_by_text("A memory of your scans")).to_be_visible(timeout=LONG)
    upload_zip(visitor, tmp_path, 8)
    stray = EXAMPLES / "retinal_fundus" / "normal" / "normal-01.png"
    visitor.set_input_files("#reference-files input[type=file]", stray)
    expect(visitor.locator("#references img")).to_have_count(9)
    note = visitor.locator("#set-note")
    expect(note).to_contain_text("scan 9 looks unlike the other 8: keep it?", timeout=LONG)
    note.get_by_role("button", name="Remove scan 9").click()
    expect(visitor.locator("#references img")).to_have_count(8)
    expect(visitor.locator("#reference-note")).to_contain_text("Removed scan 9")
    expect(note).not_to_contain_text("keep it?")
    assert "Mustermann" not in visitor.content() + served.log.read_text()
    assert not list(served.cache.rglob("*Mustermann*"))


def test_a_method_that_the_tower_refuses_says_why_and_a_painted_mask_is_learned_from(visitor: Page, tmp_path):
    upload_zip(visitor, tmp_path, 4)
    choose_method(visitor, "Zero-shot CLIP")
    expect(visitor.locator("#method-note")).to_contain_text("were never trained together")
    visitor.locator("#method input").click()
    visitor.get_by_role("option", name="Two-layer head").click()
    expect(visitor.locator("#method-note")).not_to_contain_text("never trained")
    visitor.get_by_text("Abnormal scans (optional)").click()
    files = [CASE / "query" / f"query-0{number}.png" for number in (6, 7)]
    visitor.set_input_files("#abnormal-files input[type=file]", files)
    expect(visitor.locator("#abnormals img")).to_have_count(2)
    visitor.locator("#abnormals .fm-pick").first.click()
    canvas = visitor.locator("#editor canvas").first
    expect(canvas).to_be_visible()
    canvas.scroll_into_view_if_needed()
    expect(visitor.locator("#editor")).to_contain_text("abnormal scan 1")
    visitor.wait_for_function("document.querySelector('#editor canvas').getBoundingClientRect().height > 100")
    paint(visitor, canvas)
    visitor.click("#keep-mask")
    expect(visitor.locator("#abnormals")).to_contain_text("With a mask: abnormal scan 1")
    visitor.click("#adapt")
    expect(visitor.locator("#status")).to_contain_text("Adapted to 4 reference scans", timeout=LONG)


def paint(page: Page, canvas) -> None:
    """Draw a stroke through the middle; again if the editor was not ready for the first one."""
    empty = canvas.screenshot()
    for _ in range(5):
        box = canvas.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 30, y + 20, steps=6)
        page.mouse.up()
        page.mouse.move(0, 0)
        if canvas.screenshot() != empty:
            return


def test_a_stopped_training_is_resumed_and_a_synthetic_anomaly_made_again(visitor: Page, tmp_path):
    upload_zip(visitor, tmp_path, 12)  # the more references, the longer there is something to be stopped
    visitor.click("#adapt")
    expect(visitor.locator("#status")).to_contain_text(re.compile("Stage 2.*, step"), timeout=LONG)
    visitor.click("#stop")
    expect(visitor.locator("#status")).to_contain_text("the state after patch memory is kept", timeout=LONG)
    expect(visitor.locator("#go-on")).to_have_text("Resume")
    visitor.click("#go-on")
    expect(visitor.locator("#status")).to_contain_text("Adapted to 12 reference scans", timeout=LONG)
    expect(visitor.locator("#go-on")).to_have_text("More steps")
    expect(visitor.locator("#self-check")).to_contain_text("never trained on")
    expect(visitor.locator("#self-check circle.fm-full")).not_to_have_count(0)
    visitor.locator("#synthetic .fm-example").first.click()
    expect(visitor.locator("#replay")).to_contain_text("the same picture, bit for bit")
    with visitor.expect_download() as download:
        visitor.click("#records")
    assert re.fullmatch(r"fmclip-synthetic-[0-9a-f]{8}\.json", download.value.suggested_filename)


def test_a_reload_finds_the_session_again_and_another_tab_does_not(visitor: Page, served, tmp_path):
    upload_zip(visitor, tmp_path, 4)
    choose_method(visitor, "Patch memory")
    visitor.get_by_text("Variants of the method").click()
    visitor.locator("#variants input").check()
    visitor.click("#adapt")
    expect(visitor.locator("#status")).to_contain_text("Adapted to 4 reference scans with over=patches", timeout=LONG)
    path = tmp_path / "scan.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60), dtype=np.uint8)).save(path)
    visitor.set_input_files("#query-files input[type=file]", path)
    expect(visitor.locator("#cards .fm-card")).to_have_count(1, timeout=LONG)
    score = visitor.locator("#cards .fm-score").inner_text()
    visitor.reload(wait_until="domcontentloaded")
    expect(visitor.locator("#status")).to_contain_text("Here again after a reload", timeout=LONG)
    expect(visitor.locator("#references img")).to_have_count(4)
    expect(visitor.locator("#cards .fm-score")).to_have_text(score)
    expect(visitor.locator("#variants input")).to_be_checked()
    assert visitor.url.rstrip("/") == served.url.rstrip("/")  # no key in the address
    other = visitor.context.new_page()
    other.goto(served.url, wait_until="domcontentloaded")
    expect(other.get_by_text("A memory of your scans")).to_be_visible(timeout=LONG)
    expect(other.locator("#references img")).to_have_count(0)
    other.close()
    visitor.get_by_text("Name, Hugging Face Hub, delete").click()
    visitor.click("#forget")
    expect(visitor.locator("#status")).to_contain_text("are deleted")
    expect(visitor.locator("#references img")).to_have_count(0)
    visitor.reload(wait_until="domcontentloaded")
    expect(visitor.get_by_text("A memory of your scans")).to_be_visible(timeout=LONG)
    expect(visitor.locator("#references img")).to_have_count(0)


def test_abnormal_scans_guide_the_memory_and_their_part_of_the_map_is_shown(visitor: Page, tmp_path):
    upload_zip(visitor, tmp_path, 8)
    choose_method(visitor, "Guided memory")
    expect(visitor.get_by_text("Abnormal scans (this method needs some)")).to_be_visible()
    files = sorted((CASE / "query").glob("*.png"))
    visitor.set_input_files("#abnormal-files input[type=file]", files[5:7])
    expect(visitor.locator("#abnormals img")).to_have_count(2)
    visitor.click("#adapt")
    expect(visitor.locator("#status")).to_contain_text("Adapted to 8 reference scans", timeout=LONG)
    visitor.set_input_files("#query-files input[type=file]", [files[0], files[7]])
    expect(visitor.locator("#cards .fm-card")).to_have_count(2, timeout=LONG)
    visitor.get_by_role("tab", name="Maps side by side").click()
    expect(visitor.locator("#maps")).to_contain_text("more like the abnormal scans that were given")
    keep_screenshot(visitor, "guided", tmp_path)
