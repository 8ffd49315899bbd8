"""Frozen image and text towers by name; open_clip, timm, transformers and peft are imported only when used."""

from fmclip.towers.base import Tower
from fmclip.towers.registry import get_tower

__all__ = ["Tower", "get_tower"]
