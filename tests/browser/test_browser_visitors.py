"""Two visitors at once in a real browser, on the embedded tower: the line they wait in, and their answers."""

import contextlib

import pytest
from conftest import visit
from playwright.sync_api import Error, Page, expect

pytestmark = [pytest.mark.browser, pytest.mark.slow]

LONG = 300_000  # ms
KEEP_STATUS = """() => {
  window.told = [];
  const status = document.querySelector('#status');
  new MutationObserver(() => {
    const text = status.querySelector('.fm-note')?.innerText ?? '';
    if (text !== window.told.at(-1)) window.told.push(text);
  }).observe(status, {childList: true, subtree: true, characterData: true});
}"""


def prepared(page: Page, case: str) -> Page:
    expect(page.get_by_text("A memory of your scans")).to_be_visible(timeout=LONG)
    page.click(f"#case-{case}")
    expect(page.locator("#references img")).to_have_count(16)
    page.locator("#method input").click()
    page.get_by_role("option", name="Patch memory", exact=True).click()
    expect(page.locator("#method")).not_to_contain_text("prompts and adapters")
    page.evaluate(KEEP_STATUS)
    return page


def scores(page: Page) -> list[str]:
    expect(page.locator("#status")).to_contain_text("Adapted to 16 reference scans", timeout=LONG)
    expect(page.locator("#cards .fm-card")).to_have_count(8, timeout=LONG)
    return page.locator("#cards .fm-card").evaluate_all("cards => cards.map(card => card.ariaLabel)")


def adapt_again(page: Page) -> None:
    """The button is awake a moment before the former training's last picture is there; a click before that is lost."""
    page.evaluate("window.told.length = 0")
    for _ in range(20):
        page.click("#adapt")
        with contextlib.suppress(Error):
            page.wait_for_function("window.told.length > 0", timeout=3000)
            return


def test_the_second_in_line_sees_the_place_and_both_get_the_answers_they_get_alone(browser, served):
    with visit(browser, served) as first, visit(browser, served) as second:
        prepared(first, "brain_mri_t1")
        prepared(second, "retinal_fundus")
        first.click("#adapt", no_wait_after=True)
        first.wait_for_function("window.told.some(text => /patch memory/i.test(text))", timeout=LONG)
        second.click("#adapt", no_wait_after=True)
        together = [scores(page) for page in (first, second)]
        told = [text for page in (first, second) for text in page.evaluate("window.told")]
        assert any("place 2 of 2" in text for text in told), told
        alone = []
        for page in (first, second):
            for _ in range(3):  # on a busy machine the former training may not have left the line yet
                adapt_again(page)
                page.wait_for_function("window.told.some(text => text.includes('Adapted'))", timeout=LONG)
                told = page.evaluate("window.told")
                if not any("place" in text for text in told):
                    break
            assert not any("place" in text for text in told), told
            alone.append(scores(page))
        assert together == alone
