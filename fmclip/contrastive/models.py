"""The two halves to be trained: built from a tower, partly frozen, embedded in batches, saved as a tower again."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmclip.contrastive.config import FOLDER, ModelConfig, OptimisationConfig
from fmclip.errors import PairError
from fmclip.towers.blocks import blocks_of
from fmclip.towers.mini import FOLDER as MINI_FOLDER
from fmclip.towers.registry import MINI, new_tower

PROJECTIONS = ("text_projection", "text.proj", "text.text_projection", "visual.proj", "visual.head", "visual.attnpool")
TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MAX_LOGIT_SCALE = math.log(100)
"""Largest logarithm of 1 / temperature (CLIP, section 2.5)."""
SIGLIP_BIAS = -10.0
"""Start of SigLIP's bias: most pairs of a batch do not match."""


class PairModel(nn.Module):
    """An image half, a text half, and the temperature (and SigLIP's bias) between them.

    Args:
        config: What is trained and from where it starts.
        optimisation: Loss and temperature.
        size: Side of the images; 0: the tower's own.

    Attributes:
        model: The open_clip model.
        logit_scale: Logarithm of 1 / temperature.
        logit_bias: SigLIP's bias; stays unused with InfoNCE.
    """

    def __init__(self, config: ModelConfig, optimisation: OptimisationConfig, size: int = 0) -> None:
        super().__init__()
        name, _, weights = config.start.partition(":")
        start = f"{FOLDER / name}:{weights}" if (FOLDER / name).is_file() else config.start
        tower = new_tower(start)
        self.is_mini = start == MINI
        self.config = config
        self.description = tower.description
        self.model: Any = tower.model
        self.tokenizer: Any = tower.tokenizer
        self.image_size = tower.image_size
        self.kind = tower.kind
        if size and size != tower.image_size:
            self._resize(size)
        self.mean: Tensor
        self.std: Tensor
        mean, std = (torch.tensor(self.description[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        load_published(self.model, self.description["model"], config)
        if config.train_text == "projection":
            _give_text_a_projection(self.model, self.description["model"])
        _unfreeze(self.model, config)
        start_scale = self.model.logit_scale.detach().float().clone()
        if optimisation.temperature:
            start_scale = torch.tensor(1 / optimisation.temperature).log()
        start_scale = start_scale.clamp_max(MAX_LOGIT_SCALE)
        self.logit_scale = nn.Parameter(start_scale, requires_grad=optimisation.train_temperature)
        self.logit_bias = nn.Parameter(torch.tensor(SIGLIP_BIAS), requires_grad=optimisation.loss == "siglip")
        _add_dropout(self.model, config, self.kind)
        self.train()

    @torch.no_grad()
    def limit_temperature(self) -> None:
        """Bring the temperature back into its limits after a step; in the loss a limit would take its gradient away."""
        self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    @property
    def image_is_trained(self) -> bool:
        """Whether anything of the image half changes."""
        return self.config.train_image != "none"

    @property
    def text_is_trained(self) -> bool:
        """Whether anything of the text half changes."""
        return self.config.train_text != "none"

    def train(self, mode: bool = True) -> PairModel:
        """Switch to training, where frozen parts stay in evaluation mode (dropout, statistics of batch norms)."""
        super().train(mode)
        if mode:
            for module in self.model.modules():
                own = list(module.parameters())
                if own and not any(weight.requires_grad for weight in own):
                    module.eval()
        return self

    @property
    def has_frozen_image_features(self) -> bool:
        """Whether only a projection is trained of the image half, and `image_features` can be kept for all epochs."""
        return self.config.train_image != "all" and hasattr(self.model.visual, "trunk")

    @property
    def has_frozen_text_features(self) -> bool:
        """Likewise for the text half and `text_features`; a half that is frozen altogether counts as well."""
        return not self.text_is_trained or (self.config.train_text == "projection" and self._hugging_face is not None)

    @property
    def _hugging_face(self) -> Any:
        text = getattr(self.model, "text", None)
        return text if hasattr(text, "pooler") and hasattr(text, "proj") else None

    def image_features(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1] -> what the projection reads, [B, C]; only with frozen image features."""
        return self.model.visual.trunk(self._normalised(pixels)).float()

    def text_features(self, tokens: Tensor) -> Tensor:
        """Token numbers [B, L] -> what the projection reads, [B, C], or the embedding of a half that is frozen."""
        if not self.text_is_trained:
            return self.encode_texts(tokens)
        text = self._hugging_face
        mask = (tokens != text.config.pad_token_id).long()
        return text.pooler(text.transformer(input_ids=tokens, attention_mask=mask), mask).float()

    def _normalised(self, pixels: Tensor) -> Tensor:
        normalised = (pixels - self.mean) / self.std
        return normalised.contiguous(memory_format=torch.channels_last) if self.kind == "cnn" else normalised

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Embed images.

        Args:
            pixels: [B, 3, S, S] in [0, 1], or `image_features` [B, C].

        Returns:
            [B, D], L2-normalised, single precision.
        """
        if pixels.ndim == 2:
            return F.normalize(self.model.visual.head(pixels).float(), dim=-1)
        out = self.model.visual(self._normalised(pixels))
        return F.normalize((out[0] if isinstance(out, tuple) else out).float(), dim=-1)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Texts -> token numbers [B, L], cut after the longest text where that changes nothing."""
        return trim(self.model, self.tokenizer(list(texts)))

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Embed texts.

        Args:
            tokens: Token numbers [B, L], or `text_features` [B, C].

        Returns:
            [B, D], L2-normalised, single precision.
        """
        if tokens.is_floating_point():
            return F.normalize(self._hugging_face.proj(tokens).float(), dim=-1) if self.text_is_trained else tokens
        return F.normalize(encode_text(self.model, tokens).float(), dim=-1)

    def _resize(self, size: int) -> None:
        """Take another input size: any for a CNN; a transformer has one position for each patch."""
        if self.kind == "transformer":
            raise PairError(f"This tower is made for images of {self.image_size} pixels; leave augment.size at 0.")
        self.model.visual.image_size = (size, size)
        self.description["model"]["vision_cfg"]["image_size"] = size
        self.image_size = size


def synchronise_batch_norms(model: PairModel) -> PairModel:
    """Let batch norms see the batches of all processes; timm's converter keeps the activations inside its norms."""
    from timm.layers import convert_sync_batchnorm

    converted: PairModel = convert_sync_batchnorm(model)
    return converted


def is_text(name: str) -> bool:
    """Tell whether a parameter of an open_clip model belongs to its text half."""
    return not name.startswith(("visual.", "logit_"))


def is_projection(name: str) -> bool:
    """Tell whether a parameter belongs to the projection into the common space."""
    return any(name == own or name.startswith(f"{own}.") for own in PROJECTIONS)


def encode_text(model: Any, tokens: Tensor) -> Tensor:
    """Run the text half on as many positions as the tokens have (open_clip's own CLIP insists on all 77)."""
    if hasattr(model, "text") or tokens.shape[1] == model.positional_embedding.shape[0]:
        return model.encode_text(tokens)
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]  # [B, L, W]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    x = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)]  # [B, W], at the end token
    projection = model.text_projection
    return projection(x) if isinstance(projection, nn.Module) else x @ projection  # [B, D]


def trim(model: Any, tokens: Tensor) -> Tensor:
    """Cut token numbers [B, L] after the longest text, where what follows is padding that nothing looks at."""
    from open_clip.hf_model import HFTextEncoder

    if isinstance(getattr(model, "text", None), HFTextEncoder):
        pad = model.text.config.pad_token_id
    elif not hasattr(model, "text") and model.text_pool_type == "argmax" and model.attn_mask is not None:
        pad = 0  # causal: nothing after the end token reaches it
    else:
        return tokens
    used = (tokens != pad).any(dim=0).nonzero()
    return tokens[:, : int(used.max()) + 1] if len(used) else tokens


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Let dropout draw from these numbers alone, and leave the process's own draws as they were."""
    from fmclip.contrastive.augmentation import generator_for

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(generator_for(*numbers).initial_seed())
        yield


def save_tower(model: PairModel, folder: Path) -> None:
    """Write the model as a tower: open_clip's config, safetensors, and the text half's own files where it has some.

    Args:
        model: The model.
        folder: Gets open_clip_config.json and model.safetensors; `--tower FOLDER` reads them.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(json.dumps(model.description["model"]))
    if "hf_model_name" in config["text_cfg"]:
        model.model.text.config.save_pretrained(folder)
        model.tokenizer.tokenizer.save_pretrained(folder)
        if model.is_mini:
            for name in TEXT_FILES:
                shutil.copyfile(MINI_FOLDER / name, folder / name)
        config["text_cfg"] |= {"hf_model_name": ".", "hf_tokenizer_name": ".", "hf_model_pretrained": False}
        config["custom_text"] = True
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    statistics = {"size": [model.image_size] * 2, "mean": model.description["mean"], "std": model.description["std"]}
    content = {"model_cfg": config, "preprocess_cfg": statistics}
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    state = pack_attention(model.model.state_dict())
    state["logit_scale"] = model.logit_scale.detach()
    file = folder / "model.safetensors"
    save_file(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, file, {"format": "pt"}
    )
    file.chmod(0o644)  # safetensors writes for the owner alone


def pack_attention(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put query, key and value that a tower keeps apart (`SplitAttention`) back into open_clip's one tensor."""
    packed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        if not stem.endswith(("attn.q_proj", "attn.k_proj", "attn.v_proj")) or ".trunk." in name:
            packed[name] = tensor
        elif stem.endswith("q_proj"):
            parts = [state[f"{stem[: -len('q_proj')]}{one}_proj.{kind}"] for one in "qkv"]
            packed[f"{stem[: -len('q_proj')]}in_proj_{kind}"] = torch.cat(parts)  # [3 C, C] or [3 C]
    return packed


def load_published(model: Any, description: dict[str, Any], config: ModelConfig) -> None:
    """Put published weights into a half that starts at random: timm's for images, DistilBERT for texts.

    Raises:
        PairError: They are not there, or the half is of another kind.
    """
    if config.image_weights:
        import timm

        name = description["vision_cfg"].get("timm_model_name")
        if not name:
            raise PairError("model.image_weights=timm needs an image half from timm.")
        try:
            published = timm.create_model(name, pretrained=True, num_classes=0)
        except Exception as error:  # timm and the hub raise many kinds
            raise PairError("The image weights could not be fetched; connect once, or leave them out.") from error
        model.visual.trunk.load_state_dict(published.state_dict(), strict=False)
    if config.text_weights:
        from transformers import AutoModel

        try:
            published = AutoModel.from_pretrained(config.text_weights)
        except (OSError, ValueError) as error:
            raise PairError("The text weights could not be read; check the name, or give their folder.") from error
        put_distilbert(published.state_dict(), model.text.transformer)


def put_distilbert(published: dict[str, Tensor], bert: nn.Module) -> None:
    """Put DistilBERT's weights into six layers of BERT, which then compute the same (open_clip builds BERT only).

    DistilBERT is BERT without token types and pooler: with token type embeddings of zero the two are one function.

    Args:
        published: State of a `DistilBertModel`.
        bert: `BertModel` of the same sizes, without pooler.

    Raises:
        PairError: The sizes differ, or the weights are not DistilBERT's.
    """
    names = {
        "transformer.layer.": "encoder.layer.",
        "attention.q_lin": "attention.self.query",
        "attention.k_lin": "attention.self.key",
        "attention.v_lin": "attention.self.value",
        "attention.out_lin": "attention.output.dense",
        "sa_layer_norm": "attention.output.LayerNorm",
        "ffn.lin1": "intermediate.dense",
        "ffn.lin2": "output.dense",
        "output_layer_norm": "output.LayerNorm",
    }
    state = {}
    for name, tensor in published.items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = tensor
    types = bert.state_dict()["embeddings.token_type_embeddings.weight"]
    state["embeddings.token_type_embeddings.weight"] = torch.zeros_like(types)
    try:
        missing, unknown = bert.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise PairError("The text weights are of another size than the text half.") from error
    if unknown or [name for name in missing if not name.endswith("position_ids")]:
        raise PairError("The text weights are not DistilBERT's.")


def _give_text_a_projection(model: Any, description: dict[str, Any]) -> None:
    """Put a linear layer that changes nothing yet behind a text half that ends without one."""
    text = getattr(model, "text", None)
    if text is None or not isinstance(getattr(text, "proj", None), nn.Identity):
        return
    width = description["embed_dim"]
    text.proj = nn.Linear(width, width, bias=False)
    nn.init.eye_(text.proj.weight)
    description["text_cfg"] = description["text_cfg"] | {"hf_proj_type": "linear"}


def _unfreeze(model: Any, config: ModelConfig) -> None:
    for name, weight in model.named_parameters():
        part = config.train_text if is_text(name) else config.train_image
        trained = part == "all" or (part == "projection" and is_projection(name))
        weight.requires_grad_(trained and not name.startswith("logit_"))
    for half, wanted in ((False, config.train_image), (True, config.train_text)):
        own = [weight for name, weight in model.named_parameters() if is_text(name) == half]
        if wanted != "none" and not any(weight.requires_grad for weight in own):
            raise PairError(f"The {'text' if half else 'image'} half of this tower has no projection to train.")


def _add_dropout(model: Any, config: ModelConfig, kind: str) -> None:
    """Drop numbers behind each block of a trained transformer, or before the projection of a trained CNN."""
    if not config.dropout:
        return

    def drop(module: nn.Module, _args: Any, out: Any) -> Any:
        return F.dropout(out, config.dropout, module.training) if isinstance(out, Tensor) else out

    behind: list[nn.Module] = []
    if config.train_image == "all":
        trunk = getattr(model.visual, "trunk", None)
        behind += blocks_of(model.visual) if kind == "transformer" else [trunk] if trunk is not None else []
    if config.train_text == "all":
        behind += blocks_of(getattr(model, "text", model))  # a Hugging Face text half has dropout of its own
    for module in behind:
        module.register_forward_hook(drop)
