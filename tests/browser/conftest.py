"""The page in its own process on a free port, and a headless browser in front of it."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
EXPECT_MS = 60_000  # a busy machine; the default of 5 s is for idle ones
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
START_SECONDS = 120


@dataclass(frozen=True)
class Served:
    """A running page.

    Attributes:
        url: Its address.
        cache: Folder of uploads and pictures.
        log: Everything that it wrote.
    """

    url: str
    cache: Path
    log: Path


def missing(what: str) -> None:
    """Skip on a developer's machine, fail where everything has to run."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


@contextlib.contextmanager
def serve(folder: Path, tower: str, **settings: str) -> Iterator[Served]:
    """Start the page on a tower, in a process of its own; `settings` are further environment variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = Served(f"http://127.0.0.1:{port}/", folder / "cache", folder / "log.txt")
    environment = os.environ | {
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_TEMP_DIR": str(served.cache),
        "FMCLIP_TOWER": tower,
        "FMCLIP_DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",
        **settings,
    }
    with served.log.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wait_until_served(served, process)
        yield served
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Iterator[Served]:
    """The page on the embedded tower."""
    with serve(tmp_path_factory.mktemp("page"), "mini") as page:
        yield page


def wait_until_served(served: Served, process: subprocess.Popen) -> None:
    pause = threading.Event()
    for _ in range(START_SECONDS * 5):
        if process.poll() is not None:
            pytest.fail(f"the page ended at its start:\n{served.log.read_text()[-2000:]}")
        try:
            urllib.request.urlopen(served.url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            pause.wait(0.2)
    pytest.fail("the page did not start")


@pytest.fixture(scope="session")
def browser():
    """Headless chromium."""
    try:
        from playwright.sync_api import expect, sync_playwright
    except ImportError:
        missing("playwright is not installed")
    if CHROMIUM is None:
        missing("chromium is not installed")
    expect.set_options(timeout=EXPECT_MS)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def visitor(browser, served):
    """A fresh visitor on the page."""
    with visit(browser, served) as page:
        yield page


@contextlib.contextmanager
def visit(browser, served: Served):
    """Open the page as somebody new."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(300_000)  # a fast adaptation on a busy machine
    page.goto(served.url, wait_until="domcontentloaded")
    page.locator("#adapt").wait_for()
    yield page
    context.close()
