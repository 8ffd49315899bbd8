"""Pictures of the page for the docs: FMCLIP_SCREENSHOTS=docs keeps them there."""

import io
import os
from pathlib import Path

from PIL import Image
from playwright.sync_api import Locator, Page

MAX_BYTES = 300_000
MAX_WIDTH = 1000
QUALITY = 82  # of JPEG: scans are noisy, and four times as large as PNG


def keep_screenshot(shown: Page | Locator, name: str, folder: Path) -> Path:
    """Take a picture of a page or a part of it; small enough for the repository."""
    path = Path(os.environ.get("FMCLIP_SCREENSHOTS", folder)) / f"{name}.jpg"
    if isinstance(shown, Page):
        shown.mouse.move(0, 0)
        data = shown.screenshot(animations="disabled", full_page=True)
    else:
        data = shown.screenshot(animations="disabled")
    with Image.open(io.BytesIO(data)) as taken:
        picture = taken.convert("RGB")
    picture.thumbnail((MAX_WIDTH, picture.height))
    picture.save(path, quality=QUALITY, optimize=True)
    assert path.stat().st_size < MAX_BYTES
    return path
