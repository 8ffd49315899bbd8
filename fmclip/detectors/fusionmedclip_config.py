"""Settings of FusionMedCLIP and its presets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from fmclip.detectors.base import DetectorConfig, setting
from fmclip.detectors.evidence import MAP_SMOOTHING, SMOOTHING
from fmclip.detectors.training import READING, STAGE2, STAGE3, SYNTHESIS, count_steps
from fmclip.memory import SHRINKAGE


@dataclass(frozen=True)
class FusionMedCLIPConfig(DetectorConfig):
    """Settings; the defaults are Table A1's where the table has them."""

    context_tokens: int = setting(8, "M, learned context vectors of each prompt (Table A1)")
    batch_size: int = setting(8, "scans in a training step (Table A1)")
    stage2_epochs: int = setting(200, "epochs of stage 2; one epoch shows k synthetic scans (Table A1)")
    stage3_epochs: int = setting(200, "epochs of stage 3; 0 leaves it out (Table A1)")
    prompt_lr: float = setting(1e-3, "learning rate of the contexts (Table A1)")
    alignment_lr: float = setting(1e-3, "learning rate of the alignment adapters (Table A1)")
    lora_rank: int = setting(8, "rank of LoRA (Table A1)")
    lora_alpha: float = setting(16.0, "LoRA updates are scaled by alpha / rank (Table A1)")
    lora_dropout: float = setting(0.05, "dropout in front of LoRA (Table A1)")
    lora_lr: float = setting(3e-5, "learning rate of LoRA (Table A1)")
    lora_depth: float = setting(1.0, "share of the blocks with LoRA, counted from the last")
    block_bottleneck: int = setting(64, "bottleneck of the block adapters (Table A1)")
    block_dropout: float = setting(0.1, "dropout in the block adapters (Table A1)")
    block_lr: float = setting(5e-5, "learning rate of the block adapters (Table A1)")
    weight_decay: float = setting(0.01, "weight decay of AdamW (Table A1)")
    image_weight: float = setting(1.0, "weight of the focal loss on the image score (Table A1)")
    pixel_weight: float = setting(1.0, "weight of the dice loss on the map (Table A1)")
    score_top: float = setting(0.0, "share of the map whose mean is the image score in training; 0 takes the maximum")
    temperature: float = setting(0.07, "temperature at the start (Table A1)")
    learn_temperature: bool = setting(
        True, "whether the temperature is learned (section 3.3.3)", {False: "the temperature stays as it starts"}
    )
    features: Literal["residual", "raw"] = setting(
        "residual",
        "what the alignment adapters read: residuals to the nearest reference patch, or plain features",
        {"raw": "the alignment adapters read plain features"},
    )
    pool_size: int = setting(256, "synthetic scans made before stage 2 and drawn from in both stages")
    learned_share: float = setting(0.1, "share of the learned map beside the memory map in where a scan deviates")
    learned_slope: float = setting(0.05, "how fast the learned map's evidence grows with its log-odds")
    shrinkage: float = setting(SHRINKAGE, "isotropic share of the memory's residual covariance")
    smoothing: float = setting(SMOOTHING, "sigma of the Gaussian over the evidence that makes the score, in patches")
    map_smoothing: float = setting(MAP_SMOOTHING, "sigma of the Gaussian over the map, in patches")

    @classmethod
    def preset(cls, name: str = "full", **overrides: Any) -> FusionMedCLIPConfig:
        """`fast`: a short stage 2; `full`: both stages, cut to what two cores do in a minute; `paper`: Table A1.

        Raises:
            ValueError: There is no preset of that name.
        """
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}; there are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    def longer(self, times: int) -> FusionMedCLIPConfig:
        """The same with its last stage so many times as long."""
        last = "stage3_epochs" if self.stage3_epochs > 0 else "stage2_epochs"
        return replace(self, **{last: times * getattr(self, last)})

    def plan(self, references: int) -> list[tuple[str, int]]:
        """Synthesis, features of the pool, stage 2, and stage 3 where there is one."""
        stages = [
            (SYNTHESIS, self.pool_size),
            (READING, self.pool_size),
            (STAGE2, count_steps(references, self.stage2_epochs, self.batch_size)),
        ]
        if self.stage3_epochs > 0:
            stages.append((STAGE3, count_steps(references, self.stage3_epochs, self.batch_size)))
        return stages


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"stage2_epochs": 25, "stage3_epochs": 0, "pool_size": 64},
    "full": {"stage2_epochs": 100, "stage3_epochs": 20, "lora_depth": 0.5, "pool_size": 160},
    "paper": {},
}
