"""The shared tower, loaded in the background while the page is already there."""

from __future__ import annotations

import threading
from html import escape

from fmclip.devices import resolve_device
from fmclip.errors import FmclipError
from fmclip.learning import load_tower
from fmclip.page.gpu import lends_gpu


class TowerLoader:
    """Loads the tower once, in a thread of its own.

    Args:
        name: Name of the tower.
        device: "auto", "cpu", "cuda", ...
    """

    def __init__(self, name: str, device: str) -> None:
        self.name = name
        self.device = device
        self._loading = threading.Lock()
        self._note = ""

    def start(self) -> None:
        """Begin to load."""
        threading.Thread(target=self.describe, name="tower", daemon=True).start()

    @property
    def has_gpu(self) -> bool:
        """Whether there is a GPU to train on."""
        return lends_gpu() or resolve_device(self.device).startswith("cuda")

    def describe(self) -> str:
        """Wait for the tower, and say in a sentence what it is, or why it cannot be used: HTML.

        A tower that could not be loaded is tried again when the next visitor asks.
        """
        with self._loading:
            if not self._note:
                try:
                    self._note = self._load()
                except FmclipError as error:
                    return f"<strong>The tower cannot be used.</strong> {escape(str(error))}"
            return self._note

    def _load(self) -> str:
        import scipy.special  # noqa: F401  (what the first training needs is imported while nobody waits for it)

        import fmclip.detectors  # noqa: F401

        device = "cpu" if lends_gpu() else resolve_device(self.device)
        tower = load_tower(self.name, device)
        place = "a GPU lent for each call" if lends_gpu() else "the GPU" if self.has_gpu else f"the {device.upper()}"
        which = f"embedded default tower '{tower.name}'" if tower.name == "mini" else f"tower '{escape(tower.name)}'"
        pairing = "" if tower.paired else ": its image and text halves were not trained together (it is not a CLIP)"
        return f"Running on {place} with the {which}{pairing}. Your scans and adapter are yours alone."
