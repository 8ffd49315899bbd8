"""What a visitor takes away from step 3: the report and the zip with everything, saved by the browser."""

import io
import json
import zipfile
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

pytestmark = [pytest.mark.browser, pytest.mark.slow]

LONG = 300_000  # ms


def save(page: Page, button: str) -> tuple[str, bytes]:
    with page.expect_download(timeout=LONG) as download:
        page.click(f"#{button}")
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


def test_report_and_zip_are_saved_with_one_click_each(visitor: Page):
    visitor.click("#case-simulated_breast_ultrasound")
    expect(visitor.locator("#references img").first).to_be_visible()
    visitor.get_by_label("Full, about 1 min").check()  # a fast one may end before a busy browser has clicked on Stop
    visitor.click("#adapt")
    expect(visitor.locator("#cards .fm-card").first).to_be_visible(timeout=LONG)
    visitor.click("#stop")
    expect(visitor.locator("#status")).to_contain_text("Stopped", timeout=LONG)
    expect(visitor.locator("#waiting")).not_to_contain_text("mapped so far")  # the last queries come after the stop
    count = visitor.locator("#cards .fm-card").count()

    expect(visitor.get_by_role("button", name="Download report")).to_have_count(1)  # the one with the file is unseen
    name, report = save(visitor, "report")
    assert name.startswith("fmclip-report-")
    assert report.startswith(b"%PDF")
    expect(visitor.locator("#export-note")).to_contain_text("a page for each scan")

    name, data = save(visitor, "everything")
    assert name.endswith(".zip")
    archive = zipfile.ZipFile(io.BytesIO(data))
    names = archive.namelist()
    assert {"report.pdf", "scores.csv", "run.json", "README.txt"} <= set(names)
    assert sum(one.startswith("overlays/") for one in names) == count
    assert archive.read("scores.csv").decode().count("\n") == count + 1
    record = json.loads(archive.read("run.json"))
    assert record["config"]["scan_type"] == "breast ultrasound"
    assert len(record["references"]) == len(record["calibration"]["reference_scores"])


def test_without_answers_there_is_nothing_to_save(visitor: Page):
    """The buttons lie with the answers, so that nobody is asked for what is not there."""
    expect(visitor.locator("#report")).to_be_hidden()
