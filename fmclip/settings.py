"""Presets and settings of the methods, by name and as a person types them: for the shell, the page and benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from fmclip.errors import FmclipError

if TYPE_CHECKING:
    from fmclip.detectors.base import DetectorConfig

PRESETS = ("fast", "full", "paper")
"""What every method knows; some know more."""


def config_of(
    method: str, preset: str, settings: Mapping[str, Any] | None = None, *, scan_type: str = "", seed: int = 0
) -> DetectorConfig:
    """Make the config of a method: a preset of it, with some settings changed; those of other methods are left out.

    Raises:
        FmclipError: The method does not know the preset, or a value is out of its range.
    """
    from fmclip.checkpoint import out_of_range  # no adapter that is saved may be one that does not load
    from fmclip.detectors import DETECTORS

    config_class: Any = DETECTORS[method].config_class
    own = {name: value for name, value in (settings or {}).items() if name in settings_of(config_class)}
    try:
        config = config_class.preset(preset, scan_type=scan_type or config_class.scan_type, seed=seed, **own)
    except ValueError as error:
        raise FmclipError(f"{method}: {str(error).rstrip('.')}.") from error
    if wrong := out_of_range(config):
        raise FmclipError(f"The setting {wrong}.")
    return config


def presets_of(method: str, *, has_gpu: bool = True) -> tuple[str, ...]:
    """Names of a method's presets; without a GPU those that do not train for as long as the paper."""
    from fmclip.detectors import DETECTORS

    config_class: Any = DETECTORS[method].config_class
    *short, paper = PRESETS
    more = further_presets(config_class)
    if has_gpu:
        return (*short, *more, paper)
    return (*short, *(name for name in more if config_class.preset(name) != config_class.preset(paper)))


def further_presets(config_class: type[DetectorConfig]) -> list[str]:
    """Names of the presets of a config that not every method knows."""
    return [name for name in getattr(config_class, "PRESETS", ()) if name not in PRESETS]


def describe(method: str, *, with_settings: bool = False) -> str:
    """Say in lines what the method is, whether abnormal scans teach it, its presets, its variants; and its settings."""
    from fmclip.detectors import DETECTORS

    cls, presets = DETECTORS[method], presets_of(method)
    about = (getattr(sys.modules.get(cls.__module__), "__doc__", None) or cls.summary).strip().splitlines()
    lines = [cls.name, f"    {about[0] if about else cls.title}"]
    lines.append(f"    abnormal scans: {cls.uses_abnormals}; presets: {', '.join(presets)}")
    if variants := variants_of(cls.config_class):
        lines.append(f"    variants: {', '.join(variants)}")
    if with_settings:
        config: Any = cls.config_class
        plain, helps, kinds = config(), settings_of(config), get_type_hints(config)
        for preset in presets:
            own = config.preset(preset)
            changes = [
                f"{name}={_shown(getattr(own, name))}" for name in helps if getattr(own, name) != getattr(plain, name)
            ]
            lines.append(f"    {preset} sets {', '.join(changes) or 'nothing: the defaults'}")
        lines += ["settings, for --set NAME=VALUE:" if helps else "settings: none"]
        for name, text in helps.items():
            choices = () if kinds[name] is bool else _choices(kinds[name])
            lines.append(
                f"    {name}={_shown(getattr(plain, name))}  {text}" + (f" ({' or '.join(choices)})" if choices else "")
            )
    return "\n".join(lines)


def settings_of(config_class: type[DetectorConfig]) -> dict[str, str]:
    """Help of each setting of a config, by name; scan type and seed are asked for elsewhere and are none."""
    return {one.name: one.metadata["help"] for one in fields(config_class) if "help" in one.metadata}


def variants_of(config_class: type[DetectorConfig]) -> dict[str, str]:
    """What each variant of a method does (an ablation, say), by "NAME=VALUE", see `detectors.base.setting`."""
    return {
        f"{one.name}={_shown(value)}": text
        for one in fields(config_class)
        for value, text in one.metadata.get("variants", {}).items()
    }


def settings_with_variants(config_class: type[DetectorConfig]) -> list[str]:
    """Names of the settings that have variants."""
    return [one.name for one in fields(config_class) if one.metadata.get("variants")]


def read_variants(method: str, texts: Sequence[str]) -> dict[str, Any]:
    """Read which variants of a method are chosen.

    Args:
        method: Its name.
        texts: Some of `variants_of` its config; or the plain values of these settings.

    Returns:
        Values by name, of those that are not the plain ones, whatever the order of the texts.

    Raises:
        FmclipError: One is none of them.
    """
    from fmclip.detectors import DETECTORS

    config: Any = DETECTORS[method].config_class
    if not isinstance(texts, (list, tuple)):
        raise FmclipError("Variants are given as a list of NAME=VALUE.")
    names, variants, plain = settings_with_variants(config), variants_of(config), config()
    unknown = [text for text in texts if str(text).partition("=")[0].strip() not in names]
    values = {} if unknown else read_settings(texts, {method: config})
    changed = {name: values[name] for name in names if name in values and values[name] != getattr(plain, name)}
    unknown += [text for name, value in changed.items() if (text := f"{name}={_shown(value)}") not in variants]
    if unknown:
        raise FmclipError(f"{method} has no variant {unknown[0]!r}; {_there_are(list(variants))}.")
    return changed


def read_settings(texts: Sequence[str], configs: Mapping[str, type[DetectorConfig]]) -> dict[str, Any]:
    """Read settings as a person types them, by the types of the fields.

    Args:
        texts: "NAME=VALUE" each; of a name that is given twice the last one counts.
        configs: Configs of the chosen methods by the name of the method; one of them at least must know a setting.

    Returns:
        Values by name.

    Raises:
        FmclipError: A text is something else, a name is unknown, or a value is of another kind.
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise FmclipError(f"A setting is given as NAME=VALUE, not {text!r}.")
        knowing = [config for config in configs.values() if name in settings_of(config)]
        if not knowing:
            known = dict.fromkeys(one for config in configs.values() for one in settings_of(config))
            raise FmclipError(f"No setting of {' or '.join(configs)} is called {name!r}; {_there_are(list(known))}.")
        for config in knowing:
            values[name] = _read_value(name, value, get_type_hints(config)[name])
    return values


def _read_value(name: str, text: str, kind: Any) -> Any:
    """Read one value of a field's type."""
    if get_origin(kind) is tuple:
        parts = [part.strip() for part in text.split(",")]
        return tuple(_read_value(name, part, get_args(kind)[0]) for part in parts if part)
    if choices := _choices(kind):
        found = next((choice for choice in choices if str(choice).lower() == text.lower()), None)
        if found is None:
            words = " or ".join(str(choice).lower() if kind is bool else str(choice) for choice in choices)
            raise FmclipError(f"The setting {name} must be {words}, not {text!r}.")
        return found
    if kind is str:
        return text
    try:
        return kind(text)
    except (TypeError, ValueError) as error:
        expected = {int: "a whole number", float: "a number"}.get(kind, "set in a script")
        raise FmclipError(f"The setting {name} must be {expected}, not {text!r}.") from error


def _choices(kind: Any) -> tuple[Any, ...]:
    """All values of a field's type, if they are few."""
    if kind is bool:
        return True, False
    return get_args(kind) if get_origin(kind) is Literal else ()


def _there_are(names: Sequence[str]) -> str:
    return f"there are {', '.join(names)}" if names else "there are none"


def in_words(name: str, settings: Mapping[str, Any]) -> str:
    """Name a preset or method and what was set otherwise: "full, heads=common"."""
    return f"{name}, {listed(settings)}" if settings else name


def listed(settings: Mapping[str, Any]) -> str:
    """List settings as `read_settings` takes them: "heads=common, prompts=fixed"."""
    return ", ".join(f"{name}={_shown(value)}" for name, value in settings.items())


def _shown(value: Any) -> str:
    """A setting's value as `read_settings` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
