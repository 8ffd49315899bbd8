"""Step 3 in a real browser, on the embedded tower: every way to look closer, and false alarms called normal."""

import io

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect
from screenshots import keep_screenshot

pytestmark = [pytest.mark.browser, pytest.mark.slow]

CASE = "brain_mri_t1"
LONG = 300_000  # ms


@pytest.fixture
def mapped(visitor: Page) -> Page:
    """A visitor whose queries are answered by the patch memory: the training after it is stopped."""
    visitor.click(f"#case-{CASE}")
    expect(visitor.locator("#references img")).to_have_count(16)
    visitor.get_by_label("Full, about 1 min").check()  # a fast one may end before a busy browser has clicked on Stop
    visitor.click("#adapt")
    expect(visitor.locator("#cards .fm-card")).to_have_count(8, timeout=LONG)
    visitor.click("#stop")
    expect(visitor.locator("#status")).to_contain_text("Stopped after", timeout=60_000)
    expect(visitor.locator("#download")).to_be_enabled(timeout=LONG)
    return visitor


def pixels(shown: Locator) -> np.ndarray:
    """What is seen of an element: [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(shown.screenshot(animations="disabled"))).convert("RGB")).astype(int)


def score(page: Page) -> float:
    return float(page.locator("#verdict dd").first.inner_text())


def test_cards_and_overview_are_walked_with_the_keyboard(mapped: Page):
    cards = mapped.locator("#cards .fm-card")
    cards.first.focus()
    mapped.keyboard.press("ArrowRight")
    mapped.keyboard.press("ArrowDown")
    expect(cards.nth(2)).to_be_focused()
    name = cards.nth(2).get_attribute("aria-label")
    mapped.keyboard.press("Enter")
    expect(cards.nth(2)).to_have_attribute("aria-pressed", "true")
    expect(mapped.locator("#verdict h3")).to_contain_text(name.split(",")[0].capitalize())
    expect(cards.nth(2)).to_be_focused()  # though all cards were drawn again
    mapped.keyboard.press("End")
    expect(cards.last).to_be_focused()

    marks = mapped.locator("#overview .fm-dot-button")
    expect(marks).to_have_count(8)
    assert "of 8 scans lie above the threshold" in mapped.locator("#overview [role=group]").get_attribute("aria-label")
    boxes = [mark.bounding_box() for mark in marks.all()]
    assert len({(round(box["x"]), round(box["y"])) for box in boxes}) == 8
    assert all(box["width"] == box["height"] for box in boxes)
    label = marks.first.get_attribute("aria-label").split(",")[0]
    marks.first.click()
    expect(mapped.locator("#verdict h3")).to_contain_text(label.capitalize())


def test_other_colours_are_seen_in_overlay_and_legend_alike(mapped: Page):
    overlay, legend = mapped.locator("#slider img").last, mapped.locator("#legend i")
    address, before = overlay.get_attribute("src"), pixels(legend)
    mapped.get_by_label("Viridis").check()
    expect(overlay).not_to_have_attribute("src", address, timeout=20_000)
    after = pixels(legend)
    warm, cold = before[5, before.shape[1] * 3 // 5], after[5, after.shape[1] * 3 // 5]
    assert warm[0] > warm[1]  # inferno is red beyond its middle
    assert cold[1] > cold[0]  # viridis green
    luminance = after[5] @ (0.2126, 0.7152, 0.0722)
    assert luminance[-5] > luminance[len(luminance) // 2] > luminance[5]


def test_a_click_shows_what_the_spot_was_compared_with(mapped: Page, tmp_path):
    mapped.click("#ask-highest")
    expect(mapped.locator("#why h4")).to_contain_text("Distance")
    highest = float(mapped.locator("#why h4").inner_text().split()[1])
    assert highest > 1
    expect(mapped.locator("#why .fm-view").first).to_contain_text("reference scan")
    assert mapped.locator("#why img").first.evaluate("image => image.naturalWidth") >= 100
    keep_screenshot(mapped.locator("#closer"), "why", tmp_path)

    spot = mapped.locator("#spot .fm-spot")
    frame = spot.bounding_box()
    spot.click(position={"x": 0.3 * frame["width"], "y": 0.46 * frame["height"]})
    expect(mapped.locator("#why h4")).not_to_contain_text(f"{highest:.2f}")
    patch = mapped.locator("#spot .fm-patch").bounding_box()
    frame = spot.bounding_box()
    assert patch["x"] <= frame["x"] + 0.3 * frame["width"] <= patch["x"] + patch["width"]
    assert patch["y"] <= frame["y"] + 0.46 * frame["height"] <= patch["y"] + patch["height"]

    for share in (0.7, 0.5, 0.2):  # clicks that come faster than the answers: the last one counts
        spot.dispatch_event("click", {"clientX": frame["x"] + share * frame["width"], "clientY": frame["y"] + 9})
    mapped.wait_for_function(
        """x => { const patch = document.querySelector('#spot .fm-patch').getBoundingClientRect();
        return patch.left <= x && x <= patch.right }""",
        arg=frame["x"] + 0.2 * frame["width"],
    )

    there = mapped.locator("#why h4").inner_text()
    spot.focus()
    for _ in range(3):
        mapped.keyboard.press("Shift+ArrowDown")
    mapped.keyboard.press("Enter")
    expect(mapped.locator("#why h4")).not_to_have_text(there)
    expect(spot).to_be_focused()

    mapped.get_by_role("tab", name="Maps side by side").click()
    expect(mapped.locator("#maps")).to_contain_text("Layer by layer")
    assert mapped.locator("#maps img").count() >= 5
    keep_screenshot(mapped.locator("#closer"), "maps", tmp_path)


def test_a_false_alarm_is_called_normal_and_taken_back(mapped: Page, tmp_path):
    before = score(mapped)
    mapped.get_by_role("tab", name="False alarm?").click()
    expect(mapped.locator("#closer")).to_contain_text("an anomaly missed later")
    mapped.click("#normal-contours")
    expect(mapped.locator("#normal-note")).to_contain_text("counts as normal now", timeout=60_000)
    expect(mapped.locator("#marks")).to_contain_text("Regions called normal")
    mapped.locator("#cards .fm-card", has_text=marked_label(mapped)).click()
    expect(mapped.locator("#verdict h3")).to_contain_text(marked_label(mapped).capitalize())
    assert score(mapped) < before
    mapped.click("#take-back")
    expect(mapped.locator("#marks")).to_be_hidden()
    expect(mapped.locator("#verdict dd").first).to_have_text(f"{before:.2f}")

    mapped.click("#normal-open")
    canvas = mapped.locator("#normal-editor canvas").first
    expect(canvas).to_be_visible()
    paint(mapped, canvas)
    keep_screenshot(mapped.locator("#closer"), "false-alarm", tmp_path)
    mapped.click("#normal-painted")
    expect(mapped.locator("#normal-note")).to_contain_text("counts as normal now", timeout=60_000)
    expect(mapped.locator("#normal-editor")).to_be_hidden()


def marked_label(page: Page) -> str:
    """The scan that the note about marked regions names."""
    return "scan " + page.locator("#marks").inner_text().rpartition("scan ")[2].strip(". \n")


def paint(page: Page, canvas: Locator) -> None:
    """A stroke across the middle of the scan."""
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 30, y)
    page.mouse.down()
    for step in range(13):
        page.mouse.move(x - 30 + 5 * step, y + step % 2)
    page.mouse.up()


def test_a_whole_scan_joins_the_references_and_a_stop_keeps_what_answers(mapped: Page):
    mapped.get_by_role("tab", name="False alarm?").click()
    name = mapped.locator("#normal-scan").inner_text()
    mapped.click("#normal-scan")
    expect(mapped.locator("#references img")).to_have_count(17)
    expect(mapped.locator("#stop")).to_be_enabled(timeout=LONG)
    expect(mapped.locator("#normal-scan")).to_be_disabled()
    expect(mapped.locator("#verdict")).to_contain_text("one of the reference scans", timeout=LONG)
    mapped.click("#stop")
    expect(mapped.locator("#normal-note")).to_contain_text("Stopped after", timeout=60_000)
    expect(mapped.locator("#normal-scan")).to_be_enabled()
    expect(mapped.locator("#normal-scan")).to_have_text(name)


def test_step_three_in_the_dark_and_in_a_narrow_window(mapped: Page, tmp_path):
    mapped.evaluate("document.body.classList.add('dark')")
    mapped.set_viewport_size({"width": 400, "height": 900})
    mapped.click("#ask-highest")
    expect(mapped.locator("#why h4")).to_contain_text("Distance")
    for tab in ("Maps side by side", "False alarm?", "Why here?"):
        open_tab(mapped, tab)
        assert mapped.evaluate("document.documentElement.scrollWidth") <= 400
    panel = pixels(mapped.locator("#verdict"))
    assert panel.mean() < 90  # dark, with light text on it
    assert panel.max() > 200
    keep_screenshot(mapped.locator("#verdict"), "narrow-dark", tmp_path)
    mapped.get_by_text("How to use this page").click()
    expect(mapped.locator("#tour")).to_contain_text("never healthy")


def open_tab(page: Page, name: str) -> None:
    """In a narrow window the last tabs hide behind a button."""
    tab = page.get_by_role("tab", name=name)
    if not tab.is_visible():
        page.locator("#closer .overflow-menu > button").click()
        page.locator("#closer .overflow-dropdown").get_by_text(name).click()
        return
    tab.click()
