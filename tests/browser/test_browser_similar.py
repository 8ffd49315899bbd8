"""Similar reports in a real browser, on a tower whose halves were trained together for a moment."""

import csv

import numpy as np
import pytest
from conftest import serve, visit
from PIL import Image
from playwright.sync_api import Page, expect
from screenshots import keep_screenshot
from typer.testing import CliRunner

from fmclip.pretraining_cli import app

pytestmark = [pytest.mark.browser, pytest.mark.slow]

LONG = 300_000  # ms; the tower is loaded at the first question
TEXTS = ("clear lungs", "pleural effusion on the left", "enlarged heart", "rib fracture")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run of the trainer, with its index of reports."""
    folder = tmp_path_factory.mktemp("similar")
    rng = np.random.default_rng(0)
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "text", "patientid"])
        for number in range(24):
            Image.fromarray(rng.integers(0, 255, (64, 64), dtype=np.uint8)).save(folder / f"{number}.png")
            writer.writerow([f"{number}.png", TEXTS[number % 4], f"patient {number}"])
    settings = [
        "start=tiny",
        "epochs=1",
        "warmup_epochs=0",
        "batch_size=8",
        "workers=0",
        f"results={folder}",
        "name=run",
    ]
    trained = CliRunner().invoke(
        app, ["pretrain", "mini-align", *settings, f"pairs.path={folder / 'pairs.csv'}", "--device", "cpu"]
    )
    assert trained.exit_code == 0, trained.output
    measured = CliRunner().invoke(app, ["evaluate-retrieval", str(folder / "run"), "--part", "all", "--device", "cpu"])
    assert measured.exit_code == 0, measured.output
    return folder / "run"


@pytest.fixture(scope="module")
def page_on_it(run, tmp_path_factory):
    """The page on that tower."""
    with serve(tmp_path_factory.mktemp("page"), str(run)) as page:
        yield page


@pytest.fixture
def reader(browser, page_on_it):
    """A visitor of that page with an example's scans."""
    with visit(browser, page_on_it) as visitor:
        visitor.click("#case-brain_mri_t1")
        expect(visitor.locator("#references img")).to_have_count(16)
        visitor.get_by_text("Similar reports").click()
        yield visitor


def upload_index(page: Page, path) -> None:
    with page.expect_file_chooser() as chooser:
        page.click("#index")
    chooser.value.set_files(path)


def test_reports_and_phrases_are_found_for_the_query_in_view(reader: Page, run, tmp_path):
    reader.click("#compare")
    expect(reader.locator(".toast-body").last).to_contain_text("Load the index")
    upload_index(reader, run / "index.safetensors")
    expect(reader.locator("#similar")).to_contain_text("24 reports to search in", timeout=LONG)
    reader.get_by_label("Phrases to compare").fill("no acute disease\npleural effusion")
    reader.click("#compare")
    found = reader.locator("#similar ol")
    expect(found).to_have_count(2, timeout=LONG)
    assert sorted(found.first.locator("li > span:last-child").all_inner_texts()) == sorted(TEXTS)
    for order in found.all():
        numbers = [float(text) for text in order.locator(".fm-cosine").all_inner_texts()]
        assert numbers == sorted(numbers, reverse=True)
    assert sum(numbers) == pytest.approx(1, abs=0.02)  # shares of the phrases
    keep_screenshot(reader.locator("#similar-reports"), "similar-reports", tmp_path)


def test_a_file_that_is_no_index_is_refused_and_the_page_goes_on(reader: Page, tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"no tensors here")
    upload_index(reader, other)
    expect(reader.locator(".toast-body").last).to_contain_text("no index", timeout=LONG)
    reader.get_by_label("Phrases to compare").fill("no acute disease\npleural effusion")
    reader.click("#compare")
    expect(reader.locator("#similar ol")).to_have_count(1, timeout=LONG)


def test_words_of_the_tower_are_shown_on_the_scan_beside_the_maps(reader: Page):
    """Grad-CAM needs a tower that reads; this one was trained on pairs."""
    reader.locator("#method input").click()
    reader.get_by_role("option", name="Patch memory", exact=True).click()
    expect(reader.locator("#method")).not_to_contain_text("prompts and adapters")
    reader.click("#adapt")
    expect(reader.locator("#status")).to_contain_text("Adapted to 16 reference scans", timeout=LONG)
    reader.click("#ask-highest")
    expect(reader.locator("#why h4")).to_contain_text("Distance", timeout=LONG)
    reader.get_by_role("tab", name="Maps side by side").click()
    expect(reader.locator("#maps")).to_contain_text('what speaks for "abnormal" as the tower reads the word')
    assert reader.get_by_alt_text("Words").evaluate("image => image.naturalWidth") >= 100
