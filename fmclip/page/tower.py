"""The shared tower, loaded in the background while the page is already there."""

from __future__ import annotations

import threading
from html import escape

from fmclip.errors import FmclipError


class TowerLoader:
    """Loads the tower once, in a thread of its own.

    Args:
        name: Name of the tower.
        device: "auto", "cpu", "cuda", ...
    """

    def __init__(self, name: str, device: str) -> None:
        self.name = name
        self.device = device
        self._thread = threading.Thread(target=self._load, name="tower", daemon=True)
        self._note = ""

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def describe(self) -> str:
        """Wait for the tower, and say in a sentence what it is: HTML."""
        if not self._thread.is_alive() and not self._note:
            self._load()
        elif self._thread.is_alive():
            self._thread.join()
        return self._note

    def _load(self) -> None:
        from fmclip.session import resolve_device
        from fmclip.towers import get_tower

        try:
            device = resolve_device(self.device)
            tower = get_tower(self.name, device=device)
        except FmclipError as error:
            self._note = f"<strong>The tower cannot be used.</strong> {escape(str(error))}"
            return
        place = "GPU" if device.startswith("cuda") else device.upper()
        which = f"embedded default tower '{tower.name}'" if tower.name == "mini" else f"tower '{escape(tower.name)}'"
        pairing = "" if tower.paired else ": its image and text halves were not trained together (it is not a CLIP)"
        self._note = f"Running on the {place} with the {which}{pairing}. Your scans and adapter are yours alone."
