"""The embedded default tower: EfficientNet-Lite2 for images and all-MiniLM-L6-v2 for text, stored in the checkout.

The two halves were never trained together; the model card says what that means.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmclip.errors import TowerError
from fmclip.towers.base import Tower

FOLDER = Path(__file__).resolve().parents[2] / "checkpoints" / "mini"
DAMAGED = "The embedded tower is damaged; get the checkout again."
INT8, SCALE = "::int8", "::scale"  # suffixes of a matrix stored as whole numbers with one scale a row


def load_mini(folder: Path = FOLDER) -> Tower:
    """Build the tower from open_clip's config and the stored weights, without any network.

    Args:
        folder: Holds open_clip_config.json, model.safetensors and the text tower's config and tokenizer.

    Returns:
        The tower, on the CPU.

    Raises:
        TowerError: The weights are not there or are damaged.
    """
    from open_clip.model import CustomTextCLIP
    from open_clip.tokenizer import HFTokenizer
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        weights = unpack_rows(load_file(folder / "model.safetensors"))
    except FileNotFoundError as error:
        raise TowerError("The embedded tower is not there; run from a full checkout of fmclip.") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise TowerError(DAMAGED) from error
    model_cfg = config["model_cfg"]
    text_cfg = model_cfg["text_cfg"] | {"hf_model_name": str(folder), "hf_model_pretrained": False}
    with torch.random.fork_rng(devices=[]):  # the random start is overwritten below
        model = CustomTextCLIP(**model_cfg | {"text_cfg": text_cfg})
    try:
        missing, unknown = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise TowerError(DAMAGED) from error
    if unknown or not all(name.endswith("num_batches_tracked") for name in missing):  # which only training uses
        raise TowerError(DAMAGED)
    tokenizer: Any = HFTokenizer(str(folder), context_length=text_cfg["context_length"], local_files_only=True)
    statistics = config["preprocess_cfg"]
    return Tower(
        model,
        tokenizer,
        name="mini",
        config=model_cfg,
        mean=statistics["mean"],
        std=statistics["std"],
        paired=False,
    )


def unpack_rows(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn stored weights into single precision.

    Args:
        stored: Tensors by name; a matrix [R, C] may be stored as int8 [R, C] and scale [R].

    Returns:
        Float32 tensors by name; whole-number tensors other than stored matrices keep their type.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(INT8):
            matrix = name.removesuffix(INT8)
            weights[matrix] = tensor.float() * stored[matrix + SCALE].float().unsqueeze(1)  # [R, C]
        elif not name.endswith(SCALE):
            weights[name] = tensor.float() if tensor.is_floating_point() else tensor
    return weights
