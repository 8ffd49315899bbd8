"""What a run of contrastive training is told: frozen dataclasses, filled from YAML and from key=value settings.

The three that are shipped lie in `fmclip/data/pretrain/`; a path to another YAML file does as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from fmclip.errors import PairError

FOLDER = Path(__file__).resolve().parents[1] / "data" / "pretrain"


def _setting(default: Any, text: str, choices: Sequence[str] = ()) -> Any:
    return field(default=default, metadata={"help": text, "choices": tuple(choices)})


@dataclass(frozen=True)
class PairsConfig:
    """Where the pairs are and how they are divided."""

    format: str = _setting("csv", "layout of the pairs", ("csv", "roco", "openi", "webdataset"))
    path: str = _setting("", "CSV/JSONL file, folder, or name on the Hugging Face hub (openi)")
    root: str = _setting("", "folder that image paths of a CSV/JSONL are relative to; its own folder if empty")
    image_column: str = _setting("path", "column of the image path (csv)")
    text_column: str = _setting("text", "column of the text (csv)")
    patient_column: str = _setting("patientid", "column of the patient (csv, webdataset); empty: none")
    hub_split: str = _setting("train", "part of the hub's data set to read, such as train[:500] (openi)")
    view: str = _setting("all", "images of a study with several views (openi)", ("all", "first"))
    max_patients: int = _setting(0, "use only so many patients, drawn by the seed; 0: all")
    own_split: bool = _setting(True, "keep the split that the data set comes with, where it has one")
    val_share: float = _setting(0.1, "share of the pairs held out for early stopping")
    test_share: float = _setting(0.1, "share of the pairs held out for the metrics")
    split_seed: int = _setting(0, "draws the split")
    split_file: str = _setting("", "JSON file that keeps the split; inside the run if empty")


@dataclass(frozen=True)
class ModelConfig:
    """What is trained and from where it starts."""

    start: str = _setting("mini", "tower to start from, or an open_clip JSON config with :random behind it")
    image_weights: str = _setting("", "timm: the published ImageNet weights of the image half (needs the network)")
    text_weights: str = _setting("", "DistilBERT on the hub, or its folder, for the text half (needs the network)")
    train_image: str = _setting("all", "what is trained of the image half", ("all", "projection", "none"))
    train_text: str = _setting("all", "what is trained of the text half", ("all", "projection", "none"))
    dropout: float = _setting(0.0, "dropout behind each block of the trained halves, or before the projection of a CNN")


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of the training images (FusionMedCLIP Table A2)."""

    size: int = _setting(0, "side of the input in pixels; the tower's own if 0")
    crop_min: float = _setting(0.8, "smallest share of the area that a random crop keeps")
    flip: float = _setting(0.5, "probability of a left-right flip; 0 where the side is named in the text")
    jitter: float = _setting(0.2, "brightness and contrast change by up to this share")
    rotation: float = _setting(10.0, "largest rotation in degrees")
    grayscale: float = _setting(0.1, "probability of dropping the colours")
    fit: str = _setting(
        "crop", "test images: shorter side and centre crop, or all of it with bars", ("crop", "letterbox")
    )

    @property
    def is_plain(self) -> bool:
        """Whether training images are those of testing: nothing is drawn."""
        return self.crop_min == 1 and not any((self.flip, self.jitter, self.rotation, self.grayscale))


@dataclass(frozen=True)
class OptimisationConfig:
    """Loss, optimiser and schedule (FusionMedCLIP Table A2)."""

    loss: str = _setting("infonce", "contrastive loss", ("infonce", "siglip"))
    epochs: int = _setting(50, "most epochs")
    batch_size: int = _setting(32, "pairs of a step, all processes together")
    chunk_size: int = _setting(0, "gradient caching: pairs that go through the towers at a time; 0: all of a process's")
    lr: float = _setting(3e-6, "base learning rate, of the projections and the last blocks")
    min_lr: float = _setting(1e-7, "learning rate at the end of the cosine")
    warmup_epochs: float = _setting(5.0, "epochs of linear warm-up")
    weight_decay: float = _setting(0.05, "of matrices; none on biases and norms")
    beta1: float = _setting(0.9, "AdamW")
    beta2: float = _setting(0.999, "AdamW")
    eps: float = _setting(1e-8, "AdamW")
    layer_decay: float = _setting(0.8, "learning rate of a block relative to the next one; 1: the same for all")
    label_smoothing: float = _setting(0.1, "of InfoNCE")
    same_text_matches: bool = _setting(True, "equal texts in a batch match each other's images")
    temperature: float = _setting(0.0, "start of the temperature; that of the tower if 0")
    train_temperature: bool = _setting(True, "whether the temperature is learned")
    mixup_alpha: float = _setting(0.2, "images are mixed with shares drawn from Beta(alpha, alpha); 0: never")
    text_mixup: bool = _setting(True, "mixed images go with equally mixed text embeddings; else with both texts")
    grad_clip: float = _setting(1.0, "largest norm of the gradient; 0: any")
    patience: int = _setting(5, "epochs without a better validation loss before it ends; 0: never")
    min_delta: float = _setting(1e-4, "what counts as better")
    precision: str = _setting("no", "mixed precision", ("no", "bf16", "fp16"))


@dataclass(frozen=True)
class PretrainConfig:
    """Everything about one run."""

    name: str = _setting("run", "name of the run's folder")
    results: str = _setting("results", "folder of all runs")
    seed: int = _setting(0, "of all random draws")
    workers: int = _setting(2, "processes that read images; 0: this one")
    log: str = _setting("csv", "where losses go", ("csv", "tensorboard"))
    checkpoint_steps: int = _setting(0, "also write a checkpoint every so many steps; 0: after each epoch only")
    pairs: PairsConfig = field(default_factory=PairsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimisation: OptimisationConfig = field(default_factory=OptimisationConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and `run.json` hold them."""
        return dataclasses.asdict(self)


def config_names() -> list[str]:
    """Names of the configs that are shipped."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_config(name: str, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read a config by name or path and apply overrides.

    Args:
        name: One of `config_names()`, or the path of a YAML file.
        overrides: "section.key=value"; the section may be left out where only one has the key.

    Returns:
        The config, checked.

    Raises:
        PairError: The file is not there, a key or value is unknown, or a value is out of range.
    """
    path = FOLDER / f"{name}.yaml" if name in config_names() else Path(name)
    if not path.is_file():
        raise PairError(
            f"There is no config of that name; take {', '.join(config_names())} or the path of a YAML file."
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeError) as error:
        raise PairError("The config is not readable YAML; check its indentation and quotes.") from error
    if not isinstance(values, Mapping):
        raise PairError("The config must be a YAML mapping of settings.")
    tree = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise PairError(f"An override is KEY=VALUE, not {override!r}.")
        section, leaf = _place(key.strip())
        try:
            value = yaml.safe_load(text) if text.strip() else ""
        except yaml.YAMLError as error:
            raise PairError(f"The value of {key.strip()!r} is not readable; check its brackets and quotes.") from error
        if not section:
            tree[leaf] = value
        elif isinstance(own := tree.setdefault(section, {}), dict):
            own[leaf] = value
        else:
            raise PairError(f"{section} must be a mapping of settings before {key.strip()} can be set.")
    return config_from(tree)


def config_from(values: Mapping[str, Any]) -> PretrainConfig:
    """Build a config from nested plain values; see `load_config` for what it raises."""
    config = _build(PretrainConfig, values, "")
    _check(config)
    return config


def _sections() -> dict[str, type]:
    hints = get_type_hints(PretrainConfig)
    return {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind) and isinstance(kind, type)}


def _place(key: str) -> tuple[str, str]:
    """Find the section of a key; "" for the outermost."""
    sections = _sections()
    if "." in key:
        section, leaf = key.split(".", 1)
        return section, leaf
    if key in {one.name for one in dataclasses.fields(PretrainConfig)}:
        return "", key
    homes = [name for name, kind in sections.items() if key in {one.name for one in dataclasses.fields(kind)}]
    if len(homes) != 1:
        raise PairError(f"No setting is called {key!r}.")
    return homes[0], key


def _build(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    if not isinstance(values, Mapping):
        raise PairError(f"The config's {where.rstrip('.')} must be a mapping of settings.")
    hints = get_type_hints(kind)
    fields = {one.name: one for one in dataclasses.fields(kind)}
    unknown = sorted(map(str, set(values) - set(fields)))
    if unknown:
        raise PairError(
            f"No setting is called {where}{unknown[0]}; there are {', '.join(where + own for own in fields)}."
        )
    made: dict[str, Any] = {}
    for key, value in values.items():
        wanted = hints[key]
        if dataclasses.is_dataclass(wanted):
            made[key] = _build(wanted, value, f"{key}.")
            continue
        made[key] = _convert(value, wanted, where + key)
        choices = fields[key].metadata["choices"]
        if choices and made[key] not in choices:
            raise PairError(f"{where}{key} must be one of {', '.join(choices)}, not {value!r}.")
    return kind(**made)


def _convert(value: Any, wanted: type, key: str) -> Any:
    if wanted is str and value is None:
        return ""
    if wanted is bool:
        if isinstance(value, bool):
            return value
    elif wanted is float and not isinstance(value, bool):  # YAML reads 1e-4, without a point, as text
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif wanted is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif wanted is str and isinstance(value, (str, int, float, bool)):
        return "no" if value is False and key.endswith("precision") else str(value)  # YAML reads a plain no as False
    raise PairError(f"{key} must be {'a number' if wanted is float else wanted.__name__}, not {value!r}.")


def _check(config: PretrainConfig) -> None:
    own, pairs, augment, model = config.optimisation, config.pairs, config.augment, config.model
    rules = {
        "optimisation.epochs must be at least 1": own.epochs >= 1,
        "optimisation.batch_size must be at least 2: one pair has nothing to be told from": own.batch_size >= 2,
        "optimisation.chunk_size must not be negative": own.chunk_size >= 0,
        "optimisation.lr must be above 0 and not below min_lr": own.lr > 0 and own.lr >= own.min_lr >= 0,
        "optimisation.layer_decay must lie in (0, 1]": 0 < own.layer_decay <= 1,
        "optimisation.label_smoothing must lie in [0, 1)": 0 <= own.label_smoothing < 1,
        "optimisation.mixup_alpha and warmup_epochs must not be negative": min(own.mixup_alpha, own.warmup_epochs) >= 0,
        "pairs.val_share and test_share must not be negative, and together below 1": (
            min(pairs.val_share, pairs.test_share) >= 0 and pairs.val_share + pairs.test_share < 1
        ),
        "augment.crop_min must lie in (0, 1]": 0 < augment.crop_min <= 1,
        "augment.flip and grayscale must lie in [0, 1]": all(
            0 <= share <= 1 for share in (augment.flip, augment.grayscale)
        ),
        "model.dropout must lie in [0, 1)": 0 <= model.dropout < 1,
        "nothing is trained: set model.train_image or model.train_text to all or projection": not (
            model.train_image == model.train_text == "none"
        ),
        "name must be a plain folder name": Path(config.name).name == config.name and config.name not in ("", ".."),
        "seed and workers must not be negative": min(config.seed, config.workers) >= 0,
    }
    for text, holds in rules.items():
        if not holds:
            raise PairError(f"{text[:1].upper()}{text[1:]}.")
