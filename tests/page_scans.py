"""Pictures, an upload folder and updates for the tests of the page's handlers."""

from collections.abc import Iterable
from types import SimpleNamespace

import numpy as np
from PIL import Image

ME = "me"
PLAIN = ("middle", "as stored")
CPU = SimpleNamespace(has_gpu=False, describe=lambda: "a tower")


def save_picture(path, seed: int, side: int = 64) -> str:
    """Noise on a dark band; another seed is another picture of the same kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side), dtype=np.uint8)
    pixels[:20] //= 4
    Image.fromarray(pixels).save(path)
    return str(path)


def pictures(cache, *seeds: int) -> list[str]:
    """Uploaded pictures whose names hold a patient's."""
    return [save_picture(cache / f"upload{seed}" / f"Mustermann{seed}.png", seed) for seed in seeds]


def shown(*updates: Iterable) -> dict:
    """What the parts of the page show after all these updates."""
    page: dict = {}
    for one in updates:
        for step in [one] if isinstance(one, dict) else one:
            for name, value in step.items():
                is_update = isinstance(value, dict) and value.get("__type__") == "update"
                page[name] = {**(page.get(name) or {}), **value} if is_update else value
    return page


def event(**data) -> SimpleNamespace:
    """What the browser sends with a click on a piece of HTML."""
    return SimpleNamespace(_data=data)
