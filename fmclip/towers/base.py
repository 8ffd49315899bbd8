"""The tower: a frozen image and text encoder, the same to use whatever is inside."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmclip.errors import TowerError
from fmclip.towers import lora
from fmclip.towers.ahead import Ahead
from fmclip.towers.attention import split_attention
from fmclip.towers.blocks import PlaceEmbedder, PromptedVisual, blocks_of, takes_tokens
from fmclip.towers.folding import Folded
from fmclip.towers.identity import Identity
from fmclip.towers.patch_levels import patch_levels
from fmclip.towers.precision import FeatureRunner, preferred_backend, prefers_bf16
from fmclip.towers.taps import Place, index_of
from fmclip.towers.text import text_encoder
from fmclip.towers.vision import Level, all_levels, default_levels, square_side


class Tower:
    """A frozen open_clip model: multi-level patch features, image embeddings and prompt embeddings.

    Nothing in a tower is trained but the LoRA matrices of a copy made by `with_lora`; layers are in evaluation mode.

    Args:
        model: open_clip model; it belongs to the tower from here on (attention is split, parameters are frozen).
        tokenizer: open_clip tokenizer of the model.
        name: Name in the registry.
        config: Architecture, as in open_clip's JSON files.
        mean: Mean of each colour channel that the tower was trained with.
        std: Standard deviation of each colour channel.
        paired: Whether image and text halves were trained together.

    Attributes:
        name: Name in the registry.
        kind: "transformer" (levels are blocks on one grid) or "cnn" (levels are scales).
        image_size: Side S of the input in pixels.
        paired: Whether image and text halves were trained together; if not, their cosine means nothing by itself.
        tokenizer: open_clip tokenizer of the text half.
        text_width: Width D of image and text embeddings.
        token_width: Width of a token embedding.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        config: Mapping[str, Any],
        mean: Sequence[float],
        std: Sequence[float],
        paired: bool,
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        self.name = name
        self.paired = paired
        self._visual = self._model.visual
        self.image_size = square_side(self._visual)
        split_attention(self._visual)
        self.kind: Literal["transformer", "cnn"]
        self.kind, self._all_levels = all_levels(self._visual, self.image_size)
        if self.kind == "cnn":
            self._visual.to(memory_format=torch.channels_last)
        self._levels = default_levels(self.kind, self._all_levels)
        self._patch_levels = patch_levels(self._visual, self.kind, self._levels, self.image_size)
        self.tokenizer = tokenizer
        self._text = text_encoder(model, tokenizer)
        self.token_width = self._text.token_width
        device = self._text.device
        self._mean = torch.tensor(mean, dtype=torch.float32, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, dtype=torch.float32, device=device).view(1, 3, 1, 1)
        self.text_width = self._text.embed_text(["scan"]).shape[1]
        self._identity = Identity(model, {"model": dict(config), "mean": list(mean), "std": list(std)})
        self._adapted = False
        self._prompted: PromptedVisual | None = None
        self._folded: Folded | None = None
        self._bf16: bool | None = None
        self._backend: str | None = None
        self._runs: FeatureRunner | None = None
        self._for_patches: Tower | None = None

    def __repr__(self) -> str:
        return f"Tower({self.name!r}, {self.kind}, {self.image_size} px, levels {', '.join(self.layers)})"

    @property
    def identity(self) -> str:
        """SHA-256 over architecture, input statistics and frozen weights; the same with and without LoRA."""
        return self._identity.digest()

    @property
    def model(self) -> Any:
        """The open_clip model inside, to look into or, of a tower of one's own (`new_tower`), to train further."""
        return self._model

    @property
    def description(self) -> dict[str, Any]:
        """Architecture ("model", as in open_clip's JSON files) and input statistics ("mean", "std")."""
        return copy.deepcopy(self._identity.description)

    @property
    def device(self) -> torch.device:
        """Where the tower is."""
        return self._mean.device

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the levels J in use, shallow to deep: "block 12" or "stride 8"."""
        return tuple(level.name for level in self._levels)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels C_j of each level."""
        return tuple(level.width for level in self._levels)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns (H_j, W_j) of each level."""
        return tuple(level.grid for level in self._levels)

    @property
    def looks_ahead(self) -> bool:
        """Whether the deepest level in use is a block of the scale beyond, see `towers.ahead`."""
        return isinstance(self._levels[-1].place, Ahead)

    @property
    def all_layers(self) -> tuple[str, ...]:
        """Names of all levels that `with_layers` accepts; of several levels at one stride the last counts."""
        return tuple(dict.fromkeys(level.name for level in self._all_levels))

    def with_layers(self, layers: Sequence[str]) -> Tower:
        """Use other levels J (FusionMedCLIP sections 3 and A1 differ; MadCLIP takes blocks 6, 12, 18 and 24).

        Args:
            layers: Names out of `all_layers`, shallow to deep.

        Returns:
            A tower around the same weights.

        Raises:
            TowerError: A name is unknown, or LoRA was already put in for the levels in use.
        """
        if self._adapted:
            raise TowerError("Choose the layers before adding LoRA: it is put where the chosen layers can use it.")
        by_name: dict[str, Level] = {level.name: level for level in self._all_levels}
        unknown = [layer for layer in layers if layer not in by_name]
        if unknown or not layers:
            raise TowerError(f"Unknown layers {unknown}; this tower has {', '.join(self.all_layers)}.")
        chosen = tuple(sorted({by_name[layer] for layer in layers}, key=self._all_levels.index))
        return self._variant(_levels=chosen, _patch_levels=chosen)

    def for_patches(self) -> Tower:
        """A tower around the same weights whose levels patches are compared at, see `patch_levels`."""
        if self._levels == self._patch_levels:
            return self
        if self._for_patches is None:  # the first of two threads may lose its copy, which is harmless
            _ = self._answering  # folded once for both
            self._for_patches = self._variant(_levels=self._patch_levels)
        return self._for_patches

    def to(self, device: str | torch.device) -> Tower:
        """Move the tower, with all that shares its weights, to a device and return it; `get_tower` does so once."""
        self._model.to(device)
        for tower in filter(None, (self, self._for_patches)):
            tower._runs = tower._prompted = None  # copies of the structure keep buffers where they were
            tower._mean, tower._std = tower._mean.to(device), tower._std.to(device)
        return self

    def normalise(self, pixels: Tensor) -> Tensor:
        """Subtract the tower's channel means and divide by its deviations.

        Args:
            pixels: [B, 3, S, S] in [0, 1].

        Returns:
            [B, 3, S, S].

        Raises:
            TowerError: The pixels have another shape.
        """
        size = self.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise TowerError(f"This tower needs pixels of shape [B, 3, {size}, {size}], not {list(pixels.shape)}.")
        normalised = (pixels - self._mean) / self._std
        if self.kind == "cnn":  # up to twice as fast on a CPU; a ViT gains nothing
            normalised = normalised.contiguous(memory_format=torch.channels_last)
        return normalised

    def features(self, pixels: Tensor, levels: int | None = None) -> list[Tensor]:
        """Multi-level patch features; gradients flow only from where LoRA is. In bfloat16 on GPUs that have it.

        Args:
            pixels: [B, 3, S, S] in [0, 1].
            levels: How many levels are wanted, from the shallowest on; what lies deeper is not run. None wants all.

        Returns:
            One float32 [B, C_j, H_j, W_j] for each level, not normalised: plain block outputs.
        """
        return self._runner(self.normalise(pixels), levels)

    @property
    def uses_bf16(self) -> bool:
        """Whether `features` computes in bfloat16; all else is computed in float32."""
        return prefers_bf16(self.device) if self._bf16 is None else self._bf16

    def with_bf16(self, on: bool) -> Tower:
        """Compute `features` in bfloat16, or not, whatever the device prefers; a tower around the same weights."""
        return self._variant(_bf16=on)

    def compiled(self, backend: str = "inductor") -> Tower:
        """Compile what `features` runs, see `FeatureRunner`; a tower around the same weights."""
        return self._variant(_backend=backend)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """One embedding an image.

        Args:
            pixels: [B, 3, S, S] in [0, 1].

        Returns:
            [B, D], L2-normalised.
        """
        out = self._answering(self.normalise(pixels))
        return F.normalize(out[0] if isinstance(out, tuple) else out, dim=-1)  # [B, D]; CoCa also returns tokens

    def embed_patches(self, pixels: Tensor) -> Tensor:
        """One embedding a patch in the space of the texts, by the value path of the last block (MaskCLIP).

        Args:
            pixels: [B, 3, S, S] in [0, 1].

        Returns:
            [B, D, H, W], L2-normalised at each place.

        Raises:
            TowerError: The value path of this image tower is not known.
        """
        embedder = PlaceEmbedder(self._visual, is_transformer=self.kind == "transformer")
        return F.normalize(embedder(self.normalise(pixels)), dim=1)

    @property
    def block_widths(self) -> tuple[int, ...]:
        """Width C of the tokens of each block that can read extra tokens, from the input on; empty for a CNN."""
        if self.kind != "transformer" or not takes_tokens(self._visual):
            return ()
        return tuple(self._all_levels[0].width for _ in blocks_of(self._visual))

    def features_with_prompts(self, pixels: Tensor, prompts: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Features and image embedding while every block reads extra tokens; gradients flow into these tokens.

        Args:
            pixels: [B, 3, S, S] in [0, 1].
            prompts: For each block of `block_widths` T tokens, [T, C] or [B, T, C].

        Returns:
            One [B, C_j, H_j, W_j] for each level, as from `features`; image embeddings [B, D], L2-normalised.

        Raises:
            TowerError: The tower's blocks take no tokens (a CNN), or the prompts are not one set for each block.
        """
        widths = self.block_widths
        if not widths or [one.shape[-1] for one in prompts] != list(widths):
            raise TowerError(
                "Visual prompts are extra tokens for each transformer block; this tower "
                + (f"has {len(widths)} such blocks of width {widths[0]}." if widths else "is a CNN or leaves no room.")
            )
        if self._prompted is None:  # the first of two threads may lose its copy, which is harmless
            self._prompted = PromptedVisual(self._visual)
        levels, embedding = self._prompted(self.normalise(pixels), [index_of(place) for place in self._places], prompts)
        return levels, F.normalize(embedding, dim=-1)

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: N strings -> [N, D], L2-normalised, without gradient."""
        return self._text.embed_text(texts)

    def token_embeddings(self, text: str) -> Tensor:
        """Embed the words alone, without start, end or positions: text -> [L, token_width]."""
        return self._text.token_embeddings(text)

    def embed_prompts(self, prompts: Sequence[Tensor]) -> Tensor:
        """Embed prompts given as token embeddings, such as a learned context followed by words; differentiable.

        Start and end tokens, positions and mask are added. The context is cut after the last used token wherever that
        leaves the result unchanged.

        Args:
            prompts: N tensors [L_i, token_width].

        Returns:
            [N, D], L2-normalised.

        Raises:
            TowerError: There is no prompt, or one has another width or more tokens than fit.
        """
        return self._text.embed_prompts(prompts)

    def with_lora(
        self,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.05,
        *,
        generator: torch.Generator,
        depth: float = 1.0,
    ) -> Tower:
        """Make a tower with trainable LoRA around the same frozen weights (FusionMedCLIP section 3.2, Table A1).

        Args:
            rank: Rank r of each update.
            alpha: The update is scaled by alpha / r.
            dropout: Probability of dropping an input of the update in training, see `train_lora`.
            generator: Draws the start; at the start the new tower equals this one.
            depth: Share of the blocks that is adapted, counted from the last one.

        Returns:
            The new tower; this one is untouched.

        Raises:
            TowerError: There is LoRA already, a number is out of range, or nothing can be adapted.
        """
        if self._adapted:
            raise TowerError("This tower has LoRA already; start from the plain one.")
        settings: Any = {"rank": rank, "alpha": alpha, "dropout": dropout, "depth": depth}
        visual = lora.add_lora(self._visual, self._places, self.image_size, **settings, generator=generator)
        return self._variant(_visual=visual, _adapted=True)

    def lora_parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters; empty without LoRA."""
        return list(lora.lora_tensors(self._visual).values())

    def lora_state(self) -> dict[str, Tensor]:
        """Return copies of the LoRA matrices on the CPU, by layer; empty without LoRA."""
        return {name: weight.detach().to("cpu", copy=True) for name, weight in lora.lora_tensors(self._visual).items()}

    def load_lora_state(self, state: Mapping[str, Tensor]) -> None:
        """Set the LoRA matrices.

        Args:
            state: As from `lora_state` of a tower made with the same rank and depth.

        Raises:
            TowerError: Names or shapes differ; nothing is changed then.
        """
        own = lora.lora_tensors(self._visual)
        if state.keys() != own.keys() or any(state[name].shape != own[name].shape for name in own):
            raise TowerError("These LoRA weights were made for another tower, rank or depth.")
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(state[name])

    def train_lora(self, generator: torch.Generator | None) -> None:
        """Switch dropout inside the LoRA layers on, drawn from a generator, or off; batch norm keeps its statistics."""
        lora.set_dropout(self._runner.visual, generator)

    def set_checkpointing(self, on: bool) -> bool:
        """Compute activations again in the backward pass instead of keeping them; False where the tower cannot."""
        if not hasattr(self._visual, "set_grad_checkpointing"):
            return False
        self._visual.set_grad_checkpointing(on)
        self._runs = None
        return True

    def merged(self) -> Tower:
        """Fold LoRA into plain layers of a new tower; this one is untouched and all other tensors are shared."""
        return self._variant(_visual=lora.merge_lora(self._visual), _adapted=False) if self._adapted else self

    @property
    def _answering(self) -> Any:
        """The image tower with its batch norms folded; folded anew after somebody has trained or moved it."""
        if self.kind != "cnn" or self._adapted or self._model.training:
            return self._visual
        if self._folded is None or not self._folded.is_fresh():  # the first of two threads may lose its copy: harmless
            self._folded = Folded(self._visual, self.image_size)
        return self._folded.visual

    @property
    def _runner(self) -> FeatureRunner:
        visual = self._answering
        if self._runs is None or self._runs.source is not visual:  # the first of two threads may lose its copy too
            backend = self._backend or (None if self._adapted else preferred_backend(self.device))
            self._runs = FeatureRunner(visual, self._places, bf16=self.uses_bf16, backend=backend)
        return self._runs

    @property
    def _places(self) -> list[Place]:
        return [level.place for level in self._levels]

    def _variant(self, **changes: Any) -> Tower:
        variant = copy.copy(self)
        variant.__dict__.update(_prompted=None, _runs=None, _for_patches=None, **changes)
        if "_visual" in changes:
            variant._folded = None
        return variant
