"""Small random open_clip models of every kind, and the towers around them."""

import copy
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from transformers import BertConfig, RobertaConfig

from fmclip.towers import Tower
from fmclip.towers.mini import FOLDER
from fmclip.towers.tiny import TINY_CONFIGS, randomise

CLIP_TEXT = TINY_CONFIGS["tiny"]["text_cfg"]
VISION = {
    "vit": TINY_CONFIGS["tiny"]["vision_cfg"],
    "resnet": TINY_CONFIGS["tiny-resnet"]["vision_cfg"],
    "timm vit": {"timm_model_name": "test_vit", "timm_proj": "linear", "timm_pool": "token", "image_size": 160},
    "timm cnn": {"timm_model_name": "test_efficientnet", "timm_proj": "linear", "timm_pool": "avg", "image_size": 160},
    "timm convnext": {"timm_model_name": "test_convnext", "timm_proj": "linear", "timm_pool": "avg", "image_size": 160},
}


def make_tower(vision: dict[str, Any], text: dict[str, Any] = CLIP_TEXT) -> tuple[Tower, Any, Any]:
    """Build a tower.

    Args:
        vision: open_clip's vision_cfg.
        text: open_clip's text_cfg.

    Returns:
        The tower, an untouched copy of its open_clip model, and the tokenizer.
    """
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    custom = "hf_model_name" in text or bool(set(text) - set(CLIP_TEXT))
    model = (CustomTextCLIP if custom else CLIP)(**copy.deepcopy(config))
    randomise(model, torch.Generator().manual_seed(1))
    length = text.get("context_length", 77)
    name = text.get("hf_model_name")
    tokenizer = HFTokenizer(name, context_length=length) if name else SimpleTokenizer(context_length=length)
    original = copy.deepcopy(model).eval().requires_grad_(False)
    statistics = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    return Tower(model, tokenizer, name="test", config=config, paired=True, **statistics), original, tokenizer


def hugging_face_text(folder: Path, pooler: str, *, roberta: bool = False, **extra: Any) -> dict[str, Any]:
    """Write a tiny text transformer's config and a tokenizer to `folder` and return the text_cfg that uses them."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=30522, pad_token_id=0, **sizes) if roberta else BertConfig(**sizes)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((FOLDER / name).read_bytes())
    return {
        "hf_model_name": str(folder),
        "hf_tokenizer_name": str(folder),
        "hf_model_pretrained": False,
        "hf_pooler_type": pooler,
        "hf_proj_type": "linear",
        "context_length": 48,
    } | extra


def pixels_for(tower: Tower, count: int = 2) -> torch.Tensor:
    """Draw pixels [count, 3, S, S] in [0, 1]."""
    generator = torch.Generator().manual_seed(2)
    return torch.rand(count, 3, tower.image_size, tower.image_size, generator=generator)
