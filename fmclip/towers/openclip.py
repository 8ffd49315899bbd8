"""Towers from open_clip: by tag, from a local safetensors file, from the Hugging Face hub, or with random weights."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fmclip.errors import TowerError
from fmclip.towers.base import Tower
from fmclip.towers.tiny import TINY_CONFIGS, randomise

HUB_PREFIX = "hf-hub:"
RANDOM = "random"
OFFLINE_HELP = (
    "its weights need one download and the model hub cannot be reached. Connect once (the download is kept), or give a "
    "local file as MODEL:WEIGHTS.safetensors. The embedded tower mini needs no network."
)


def load_hub(name: str) -> Tower:
    """Load a model of the Hugging Face hub with the weights stored beside its config.

    Args:
        name: "hf-hub:org/model".

    Returns:
        The tower, on the CPU.

    Raises:
        TowerError: The hub can't be reached, or has no such open_clip model.
    """
    import open_clip

    def build() -> tuple[nn.Module, Any]:
        # without require_pretrained open_clip only logs a failed download and goes on with random weights
        model = open_clip.create_model(name, require_pretrained=True)
        return model, open_clip.get_tokenizer(name)

    model, tokenizer = _reach(name, build)
    config = open_clip.get_model_config(name)
    return _tower(model, tokenizer, name=name, config=config, paired=True)


def load_tag(architecture: str, tag: str | None) -> Tower:
    """Load a model with one of open_clip's published weights.

    Args:
        architecture: Name of an open_clip model.
        tag: Name of its weights; None where open_clip publishes none.

    Returns:
        The tower, on the CPU.

    Raises:
        TowerError: The name or tag is unknown, or the weights can't be fetched.
    """
    import open_clip

    check_architecture(architecture)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        asked = f"No weights chosen for {architecture}." if tag is None else f"No weights {tag!r} for {architecture}."
        raise TowerError(f"{asked} {_offer(architecture, tags)}")
    # the activation belongs to the weights: open_clip only warns when its config says otherwise
    quick_gelu = bool(open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu", False))
    config = open_clip.get_model_config(architecture)
    override = {} if quick_gelu or not config.get("quick_gelu", False) else {"quick_gelu": False}
    name = f"{architecture}:{tag}"

    def build() -> tuple[nn.Module, Any]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            model = open_clip.create_model(
                architecture, tag, force_quick_gelu=quick_gelu, require_pretrained=True, **override
            )
        return model, open_clip.get_tokenizer(architecture)

    model, tokenizer = _reach(name, build)
    return _tower(model, tokenizer, name=name, config=config | {"quick_gelu": quick_gelu}, paired=True)


def default_tag(architecture: str) -> str | None:
    """Return the tag that a name without one means: OpenAI's weights where they are published for the model."""
    import open_clip

    return "openai" if "openai" in open_clip.list_pretrained_tags_by_model(architecture) else None


def load_random(architecture: str) -> Tower:
    """Build a model with random weights, the same ones every time: for timing and tests.

    Args:
        architecture: Name of an open_clip model, "tiny" or "tiny-resnet", or the path of an open_clip JSON config.

    Returns:
        The tower, on the CPU; `paired` is False.

    Raises:
        TowerError: The name is unknown.
    """
    config: dict[str, Any]
    statistics: dict[str, Any] = {}
    if architecture in TINY_CONFIGS:
        config, name = TINY_CONFIGS[architecture], architecture
    else:
        config, statistics, label = _read_config(architecture)
        name = f"{label}:{RANDOM}"
    located = _located(config, architecture)
    model, tokenizer = _reach(name, lambda: (_build(located), _tokenizer_of(located)))
    randomise(model, torch.Generator().manual_seed(0))
    return _tower(model, tokenizer, name=name, config=config, paired=False, statistics=statistics)


def load_file(architecture: str, weights: Path) -> Tower:
    """Load a model from a local safetensors file; one with a vision tower only gets a random text tower.

    Args:
        architecture: Name of an open_clip model, or the path of an open_clip JSON config.
        weights: safetensors file in open_clip's layout.

    Returns:
        The tower, on the CPU; `paired` is False where the file has no text tower.

    Raises:
        TowerError: The file isn't safetensors, is damaged, or doesn't fit the model.
    """
    import open_clip

    keys = _stored_names(weights)
    config, statistics, label = _read_config(architecture)
    name = f"{label}:local"
    located = _located(config, architecture)
    model, tokenizer = _reach(name, lambda: (_build(located), _tokenizer_of(located)))
    try:
        missing = open_clip.load_checkpoint(model, str(weights), strict=False).missing_keys
    except (RuntimeError, KeyError, ValueError, AttributeError) as error:
        raise TowerError(f"These weights do not fit the model {label}: layers differ in shape or name.") from error
    lacking = [key for key in missing if not key.endswith(("num_batches_tracked", "logit_scale", "position_ids"))]
    vision_only = all(key.startswith("visual.") for key in keys)
    unexpected = [key for key in lacking if not vision_only or key.startswith("visual.")]
    if unexpected:
        raise TowerError(f"These weights do not fit the model {label}: {len(unexpected)} tensors are not in the file.")
    randomise(model, torch.Generator().manual_seed(0), lacking)
    return _tower(model, tokenizer, name=name, config=config, paired=not vision_only, statistics=statistics)


def check_architecture(architecture: str) -> None:
    """Raise a TowerError with close matches unless open_clip knows the model."""
    import open_clip

    known = ["mini", *TINY_CONFIGS, *open_clip.list_models()]
    if architecture in known:
        return
    lower = {name.lower(): name for name in known}
    close = [lower[match] for match in difflib.get_close_matches(architecture.lower(), lower, n=5, cutoff=0.5)]
    hint = f"Did you mean {', '.join(close)}?" if close else "Known are mini and open_clip's models, such as ViT-L-14."
    raise TowerError(f"Unknown tower {architecture!r}. {hint}")


def _offer(architecture: str, tags: list[str]) -> str:
    if not tags:
        return f"open_clip publishes none; give a local file as {architecture}:WEIGHTS.safetensors."
    return f"Choose one: {', '.join(f'{architecture}:{tag}' for tag in tags)}."


def _stored_names(weights: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    if weights.suffix != ".safetensors":
        raise TowerError(
            "Only safetensors are loaded: other weight files can run code when they are opened. "
            "Convert it to .safetensors on a machine that trusts it."
        )
    if not weights.is_file():
        raise TowerError("The weights file is not there; check its path.")
    try:
        with safe_open(weights, "pt") as stored:
            keys = list(stored.keys())
    except (OSError, SafetensorError) as error:
        raise TowerError("The weights file is damaged or not safetensors; download it again.") from error
    if not keys:
        raise TowerError("The weights file holds no tensors.")
    return keys


def _read_config(architecture: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return the model config, the input statistics where stated, and a label without paths."""
    import open_clip

    if not architecture.endswith(".json"):
        check_architecture(architecture)
        return open_clip.get_model_config(architecture), {}, architecture
    try:
        config = json.loads(Path(architecture).read_text(encoding="utf-8"))
        statistics = config.pop("preprocess_cfg", {})
        config = config.get("model_cfg", config)
        missing = {"embed_dim", "vision_cfg", "text_cfg"} - config.keys()
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise TowerError("The model config is not a readable JSON file.") from error
    if missing:
        raise TowerError(f"The model config lacks {', '.join(sorted(missing))}: it needs open_clip's layout.")
    return config, statistics, "config"


def _located(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Find text halves that are named by a folder (".", "./text") beside the config; other names stay as they are."""
    text = dict(config["text_cfg"])
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if str(text.get(key, "")).startswith("."):
            text[key] = str(Path(architecture).parent / text[key])
    return config | {"text_cfg": text}


def _build(config: Mapping[str, Any]) -> nn.Module:
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CustomTextCLIP

    config = dict(config)
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    kind = CLIP if not custom else CoCa if "multimodal_cfg" in config else CustomTextCLIP
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"] = config["text_cfg"] | {"hf_model_pretrained": False}
    with torch.random.fork_rng(devices=[]):  # all weights are set afterwards
        try:
            return kind(**config)
        except TypeError as error:
            raise TowerError("The model config has entries that this open_clip does not know.") from error


def _tokenizer_of(config: Mapping[str, Any]) -> Any:
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    text = config["text_cfg"]
    length = text.get("context_length", 77)
    if "hf_tokenizer_name" in text:
        extra = text.get("tokenizer_kwargs") or {}
        local = Path(text["hf_tokenizer_name"]).is_dir()
        if local:  # without this, transformers asks the hub about a folder too
            extra = {"local_files_only": True, **extra}
        return HFTokenizer(
            text["hf_tokenizer_name"], context_length=length, tokenizer_mode=text.get("tokenizer_mode"), **extra
        )
    return SimpleTokenizer(context_length=length, **(text.get("tokenizer_kwargs") or {}))


def _reach(name: str, build: Callable[[], tuple[nn.Module, Any]]) -> tuple[nn.Module, Any]:
    """Run `build`, which may need the network, and say plainly what went wrong."""
    try:
        return build()
    except TowerError:
        raise
    except Exception as error:  # open_clip, huggingface_hub and httpx raise many kinds; all become one TowerError
        kinds = _kinds(error)
        unreachable = kinds & {"ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}
        unreachable |= {"weights"} if "Required pretrained weights" in str(error) else set()  # open_clip hides why
        no_such_file = "EntryNotFoundError" in kinds and not unreachable
        if no_such_file or kinds & {"RepositoryNotFoundError", "HFValidationError"}:
            raise TowerError(f"Tower {name!r}: the hub has no such public open_clip model. Check the name.") from error
        if unreachable or "OSError" in kinds:
            raise TowerError(f"Tower {name!r}: {OFFLINE_HELP}") from error
        raise TowerError(f"Tower {name!r} cannot be loaded: open_clip could not build it from its files.") from error


def _kinds(error: BaseException | None) -> set[str]:
    """Return the class names, bases included, of an error and of all that caused it."""
    kinds: set[str] = set()
    while error is not None:
        kinds |= {kind.__name__ for kind in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return kinds


def _tower(
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    config: Mapping[str, Any],
    paired: bool,
    statistics: Mapping[str, Any] | None = None,
) -> Tower:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    stated = {**(getattr(model.visual, "preprocess_cfg", None) or {}), **(statistics or {})}
    return Tower(
        model,
        tokenizer,
        name=name,
        config=config,
        mean=stated.get("mean", OPENAI_DATASET_MEAN),
        std=stated.get("std", OPENAI_DATASET_STD),
        paired=paired,
    )
