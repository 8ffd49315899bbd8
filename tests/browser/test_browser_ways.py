"""Further ways over the page in a real browser, on a small random transformer, which is quick."""

import io
import json
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from conftest import serve, visit
from hub import serve_hub
from playwright.sync_api import Page, expect
from pydicom.uid import generate_uid
from scan_files import PATIENT, write_dicom

pytestmark = [pytest.mark.browser, pytest.mark.slow]

LONG = 300_000  # ms
TOKEN = "hf_never_kept"


@pytest.fixture(scope="module")
def hub():
    with serve_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def page_on_tiny(tmp_path_factory, hub):
    with serve(
        tmp_path_factory.mktemp("page"), "tiny", HF_ENDPOINT=hub[0], HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1"
    ) as page:
        yield page


@pytest.fixture
def guest(browser, page_on_tiny):
    with visit(browser, page_on_tiny) as page:
        expect(page.get_by_text("A memory of your scans")).to_be_visible(timeout=LONG)
        yield page


def choose(page: Page, part: str, option: str) -> None:
    page.locator(f"#{part} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def drop_files(page: Page, part: str, paths: list[Path]) -> None:
    page.set_input_files(f"#{part} input[type=file]", paths)


def texture(seed: int, side: int = 48) -> np.ndarray:
    noise = cv2.GaussianBlur(np.random.default_rng(seed).normal(0, 1, (side, side)), (0, 0), 2)
    return np.clip(110 + 30 * noise / noise.std(), 0, 255).astype(np.uint8)


def picture(path: Path, seed: int, text: str = "") -> Path:
    pixels = cv2.resize(texture(seed), (256, 256), interpolation=cv2.INTER_CUBIC)
    if text:  # on a black margin, as scanners write it
        pixels[220:] = 0
        cv2.putText(pixels, text, (10, 244), cv2.FONT_HERSHEY_SIMPLEX, 0.6, 255, 1, cv2.LINE_AA)
    cv2.imwrite(str(path), pixels)
    return path


def series(folder: Path) -> None:
    """A CT series of six slices, its files in another order than the slices."""
    folder.mkdir()
    uid = generate_uid()
    for place, height in enumerate((3, 1, 4, 0, 2, 5)):
        position = {"ImagePositionPatient": [0, 0, height], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        pixels = texture(height).astype(np.uint16) * 4
        write_dicom(folder / f"{PATIENT}{place}.dcm", pixels, SeriesInstanceUID=uid, RescaleIntercept=-400, **position)


def saved(page: Page, part: str) -> tuple[str, bytes]:
    with page.expect_download(timeout=LONG) as download:
        page.click(f"#{part}")
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


def test_a_folder_of_dicom_is_learned_from_and_answered_in_dicom_and_the_adapter_goes_to_the_hub(
    guest: Page, browser, page_on_tiny, hub, tmp_path
):
    guest.get_by_text("DICOM and NIfTI: slices and window").click()
    choose(guest, "window", "soft tissue")
    series(tmp_path / "series")
    with guest.expect_file_chooser() as chooser:
        guest.click("#reference-folder")
    chooser.value.set_files(tmp_path / "series")
    expect(guest.locator("#references img")).to_have_count(6)
    guest.locator("#scan-type input").fill("knee CT")
    guest.locator("#scan-type input").press("Enter")
    choose(guest, "method", "Patch memory")
    expect(guest.locator("#method-note, #method")).not_to_contain_text(["A memory of your scans' patches, refined"])
    guest.click("#adapt")
    expect(guest.locator("#status")).to_contain_text("Adapted to 6 reference scans", timeout=LONG)

    spot = texture(9).astype(np.uint16) * 4
    spot[20:30, 20:30] = 1400
    query = write_dicom(
        tmp_path / f"{PATIENT}.dcm",
        spot,
        RescaleIntercept=-400,
        SeriesInstanceUID=generate_uid(),
        StudyInstanceUID=generate_uid(),
    )
    drop_files(guest, "query-files", [query])
    expect(guest.locator("#verdict")).to_contain_text("soft tissue: centre 40, width 400 HU", timeout=LONG)
    archive = zipfile.ZipFile(io.BytesIO(saved(guest, "everything")[1]))
    objects = [pydicom.dcmread(io.BytesIO(archive.read(name))) for name in archive.namelist() if name.endswith(".dcm")]
    assert sorted(one.Modality for one in objects) == ["OT", "SEG"]
    assert all(PATIENT not in str(one) for one in objects)
    assert json.loads(archive.read("run.json"))["config"]["scan_type"] == "knee CT"

    guest.get_by_text("Name, Hugging Face Hub, delete").click()
    guest.get_by_label("Name of the adapter").fill("my knees")
    guest.get_by_label("Name of the adapter").press("Tab")
    expect(guest.locator("#download a, a#download, #download")).to_be_enabled()
    guest.get_by_label("Repository on the Hub").fill("me/knees")
    guest.get_by_label("Token, used once and not stored").fill(TOKEN)
    guest.click("#push")
    expect(guest.locator("#hub-note")).to_contain_text("Pushed to me/knees", timeout=LONG)
    expect(guest.get_by_label("Token, used once and not stored")).to_have_value("")
    assert "# my knees" in hub[1].files["me/knees/README.md"].decode()
    assert f"Bearer {TOKEN}" in hub[1].tokens
    assert saved(guest, "download")[0].startswith("fmclip-my-knees-")
    with visit(browser, page_on_tiny) as other:
        other.get_by_text("Name, Hugging Face Hub, delete").click()
        other.get_by_label("Repository on the Hub").fill("me/knees")
        other.click("#pull")
        expect(other.locator("#status")).to_contain_text("learned from 6 reference scans", timeout=LONG)
        expect(other.get_by_label("Name of the adapter")).to_have_value("my knees")
    assert TOKEN not in page_on_tiny.log.read_text()
    assert PATIENT not in page_on_tiny.log.read_text()


def test_copies_and_burned_in_text_are_pointed_out_and_dropped(guest: Page, tmp_path):
    files = [picture(tmp_path / f"{seed}.png", seed) for seed in range(5)]
    files.append(picture(tmp_path / "copy.png", 2))
    files.append(picture(tmp_path / "text.png", 7, "DOE JANE 12.03.71"))
    drop_files(guest, "reference-files", files)
    expect(guest.locator("#references img")).to_have_count(7)
    note = guest.locator("#reference-note")
    expect(note).to_contain_text("there may be text burned into the picture")
    note.get_by_role("button", name="Remove scan 6").click()
    expect(guest.locator("#references img")).to_have_count(6)
    note.get_by_role("listitem").filter(has_text="text burned").get_by_role("button", name="Remove scan 7").click()
    expect(guest.locator("#references img")).to_have_count(5)
    expect(note).not_to_contain_text("text")


def test_the_third_example_more_steps_attention_and_the_slider(guest: Page):
    guest.click("#case-retinal_fundus")
    expect(guest.locator("#references img")).to_have_count(16)
    guest.click("#adapt")
    expect(guest.locator("#status")).to_contain_text("Adapted to 16 reference scans", timeout=LONG)
    expect(guest.locator("#estimate")).to_contain_text("by the steps measured on this machine")
    expect(guest.locator("#go-on")).to_have_text("More steps")
    guest.click("#go-on")
    expect(guest.locator("#stop")).to_be_enabled(timeout=LONG)
    expect(guest.locator("#status")).to_contain_text("Adapted to 16 reference scans", timeout=LONG)
    expect(guest.locator("#self-check circle")).not_to_have_count(0)

    slider = guest.locator("#slider")
    slider.scroll_into_view_if_needed()
    guest.mouse.move(0, 0)
    before = slider.screenshot()
    box = slider.bounding_box()
    handle = slider.locator(".inner").first.bounding_box()
    guest.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    guest.mouse.down()
    guest.mouse.move(box["x"] + 0.8 * box["width"], handle["y"] + handle["height"] / 2, steps=8)
    guest.mouse.up()
    guest.mouse.move(0, 0)
    moved = slider.locator(".inner").first.bounding_box()
    assert moved["x"] > handle["x"] + 0.2 * box["width"]
    assert slider.screenshot() != before

    guest.click("#ask-highest")
    expect(guest.locator("#why h4")).to_contain_text("Distance")
    guest.get_by_role("tab", name="Maps side by side").click()
    expect(guest.locator("#maps")).to_contain_text("where the tower looks")


def test_forty_queries_survive_a_stop_and_a_reload(guest: Page, tmp_path):
    drop_files(guest, "reference-files", [picture(tmp_path / f"n{seed}.png", seed) for seed in range(6)])
    expect(guest.locator("#references img")).to_have_count(6)
    drop_files(guest, "query-files", [picture(tmp_path / f"q{seed}.png", 100 + seed) for seed in range(40)])
    expect(guest.locator("#waiting img")).to_have_count(40)
    guest.get_by_label("Full, about 1 min").check()
    guest.click("#adapt")
    expect(guest.locator("#cards .fm-card").first).to_be_visible(timeout=LONG)
    guest.click("#stop")
    expect(guest.locator("#status")).to_contain_text("Stopped after", timeout=LONG)
    expect(guest.locator("#cards .fm-card")).to_have_count(40, timeout=LONG)
    expect(guest.locator("#waiting")).not_to_contain_text("mapped so far")
    scores = guest.locator("#cards .fm-score").all_inner_texts()
    guest.reload(wait_until="domcontentloaded")
    expect(guest.locator("#status")).to_contain_text("Here again after a reload: an adapter of 6", timeout=LONG)
    expect(guest.locator("#cards .fm-card")).to_have_count(40, timeout=LONG)
    assert guest.locator("#cards .fm-score").all_inner_texts() == scores
    marks = [mark.bounding_box() for mark in guest.locator("#overview .fm-dot-button").all()]
    assert len({(round(box["x"]), round(box["y"])) for box in marks}) == 40
