"""Towers by name.

| name | tower |
|---|---|
| `mini` | the embedded default, no network |
| `ViT-L-14`, `ViT-L-14:openai` | open_clip model and the tag of its published weights; OpenAI's without a tag |
| `hf-hub:org/model` | open_clip model on the Hugging Face hub, BiomedCLIP among them |
| `ViT-L-14:WEIGHTS.safetensors` | open_clip model with a local file |
| `CONFIG.json:WEIGHTS.safetensors` | any open_clip config with a local file; with a vision tower only, text is random |
| `FOLDER` | open_clip_config.json and model.safetensors, such as the result of `python -m fmclip pretrain` |
| `ViT-L-14:random`, `CONFIG.json:random` | random weights, for timing, or to train from the start |
| `tiny`, `tiny-resnet` | small random towers for tests |
"""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from fmclip.errors import TowerError
from fmclip.towers.base import Tower
from fmclip.towers.tiny import TINY_CONFIGS

MINI = "mini"
_towers: dict[tuple[str, str], Tower] = {}
_lock = threading.Lock()


def get_tower(name: str = MINI, *, device: str | torch.device = "cpu") -> Tower:
    """Load a tower; a second call for the same tower and device returns the same one, whichever way it is named.

    Args:
        name: See the table above.
        device: Where the tower goes, such as "cpu" or "cuda".

    Returns:
        The frozen tower, shared by all callers.

    Raises:
        TowerError: The name is unknown, the weights can't be fetched, a file is not what it should be, or the device is
            not there.
    """
    name = _canonical(name)
    with _lock:  # one loads, the others wait for it
        key = (name, str(device))
        if key not in _towers:
            tower = _load(name)
            try:
                _towers[key] = _looked_once(tower.to(device))
            except (RuntimeError, AssertionError) as error:  # torch raises either when there is no such device
                raise TowerError(f"The tower does not fit on {device}, or there is no such device.") from error
        return _towers[key]


@torch.no_grad()
def _looked_once(tower: Tower) -> Tower:
    """Let the tower look at an empty picture, so that no visitor waits for what is done at the first look."""
    tower.for_patches().features(torch.zeros(1, 3, tower.image_size, tower.image_size, device=tower.device))
    return tower


def new_tower(name: str) -> Tower:
    """Load a tower that nobody else has, on the CPU, so that it may be trained; see `get_tower` for the rest."""
    return _load(_canonical(name))


def _canonical(name: str) -> str:
    """Write the published weights out where the name leaves them open: "ViT-L-14" is "ViT-L-14:openai"."""
    if name and Path(name).is_dir():
        folder = Path(name) / "tower" if (Path(name) / "tower").is_dir() else Path(name)
        return f"{folder / 'open_clip_config.json'}:{folder / 'model.safetensors'}"
    architecture, weights = _split(name)
    if weights or architecture == MINI or architecture in TINY_CONFIGS:
        return name
    from fmclip.towers import openclip

    tag = openclip.default_tag(architecture)
    return architecture if tag is None else f"{architecture}:{tag}"


def _load(name: str) -> Tower:
    from fmclip.towers import openclip
    from fmclip.towers.mini import load_mini

    if name == MINI:
        return load_mini()
    if name in TINY_CONFIGS:
        return openclip.load_random(name)
    if name.startswith(openclip.HUB_PREFIX):
        return openclip.load_hub(name)
    stem, json_suffix, rest = name.partition(".json:")
    architecture, weights = (stem + ".json", rest) if json_suffix else _split(name)
    if weights == openclip.RANDOM and json_suffix:
        return openclip.load_random(architecture)
    if json_suffix or _is_file_name(weights):
        return openclip.load_file(architecture, Path(weights))
    openclip.check_architecture(architecture)
    if architecture == MINI or architecture in TINY_CONFIGS:
        raise TowerError(f"The tower {architecture} has its own weights; ask for it by that name alone.")
    if weights == openclip.RANDOM:
        return openclip.load_random(architecture)
    return openclip.load_tag(architecture, weights or None)


def _split(name: str) -> tuple[str, str]:
    architecture, _, weights = name.partition(":")
    return architecture, weights


def _is_file_name(weights: str) -> bool:
    return "/" in weights or "\\" in weights or Path(weights).suffix in {".safetensors", ".pt", ".pth", ".bin", ".ckpt"}
