"""Patient-level splits: drawn once, kept in a file, and checked for leaks each time they are used."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fmclip.contrastive.config import PairsConfig
from fmclip.contrastive.pairs import BROKEN, Pair, PairSet, anonymous, check_images, drop_keys
from fmclip.errors import PairError

SPLITS = ("train", "val", "test")
VERSION = 1


@dataclass(frozen=True)
class Split:
    """Which pair goes where.

    Attributes:
        places: "train", "val" or "test" by the digest of a pair's key (`anonymous`).
        broken: Digests of the keys whose image cannot be decoded.
        images: Content digest of the image by the digest of its pair's key.
    """

    places: dict[str, str]
    broken: frozenset[str]
    images: dict[str, str]

    def part(self, found: PairSet, name: str) -> list[Pair]:
        """Return the pairs of one part, in the order of the source."""
        return [pair for pair in found.pairs if self.places.get(anonymous(pair.key)) == name]


def split_pairs(
    found: PairSet, config: PairsConfig, file: Path, on_progress: Callable[[int, int], None] | None = None
) -> tuple[PairSet, Split]:
    """Read the split from its file, or check all images, draw it and write the file; then look for leaks.

    Args:
        found: All pairs of the source.
        config: Shares, seed and number of patients.
        file: JSON file of the split; holds digests, neither paths nor patients.
        on_progress: Called with (images done, images in all) while images are checked.

    Returns:
        The pairs that can be used, and their split.

    Raises:
        PairError: The file belongs to other pairs, a part is empty, or there is a leak.
    """
    if file.is_file():
        split = _load(file)
        drop = {pair.key for pair in found.pairs if anonymous(pair.key) in split.broken}
        found = drop_keys(found, drop, BROKEN)
        strangers = sum(anonymous(pair.key) not in split.places for pair in found.pairs)
        if strangers and not config.max_patients:
            raise PairError(
                f"The split file does not know {strangers} of {len(found.pairs)} pairs: it was made for other data. "
                "Give another pairs.split_file, or delete it to draw a new split."
            )
    else:
        before = {pair.key for pair in found.pairs}
        found = check_images(found, on_progress)
        broken = frozenset(anonymous(key) for key in before - {pair.key for pair in found.pairs})
        split = draw_split(found, config, broken)
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "version": VERSION,
            "counts": dict(Counter(split.places.values())),
            "skipped": dict(found.skipped),
            "places": split.places,
            "broken": sorted(split.broken),
            "images": split.images,
        }
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    check_leaks(found, split)
    return found, split


def draw_split(found: PairSet, config: PairsConfig, broken: frozenset[str] = frozenset()) -> Split:
    """Draw a split: all pairs of a patient, and all that share an image with them, go to one part.

    A split that the source comes with is kept (`own_split`), where it has one for every pair.

    Args:
        found: Pairs with the digests of their images.
        config: Shares, seed and number of patients.
        broken: Digests of keys to remember as broken.

    Returns:
        The split.

    Raises:
        PairError: A part that should hold pairs is empty.
    """
    images = {anonymous(pair.key): found.digests[pair.key][:20] for pair in found.pairs if pair.key in found.digests}
    if config.own_split and all(pair.split for pair in found.pairs):
        places = {anonymous(pair.key): pair.split for pair in found.pairs}
    else:
        places = _draw(found, config)
    wanted = {"train": 1.0, "val": config.val_share, "test": config.test_share}
    empty = [name for name in SPLITS if wanted[name] > 0 and name not in places.values()]
    if empty:
        raise PairError(
            f"The {empty[0]} part of the split is empty: there are too few patients. Add pairs, change "
            "pairs.val_share or pairs.test_share, or set them to 0."
        )
    return Split(places, broken, images)


def check_leaks(found: PairSet, split: Split) -> None:
    """Refuse a split in which a patient, or one and the same image, is in two parts.

    Raises:
        PairError: There is a leak; says of which kind and how many.
    """
    for what, name_of in (
        ("patients", lambda pair: pair.patient),
        ("images", lambda pair: split.images.get(anonymous(pair.key), pair.key)),
    ):
        parts: dict[str, set[str]] = {}
        for pair in found.pairs:
            if (place := split.places.get(anonymous(pair.key))) is not None:
                parts.setdefault(name_of(pair), set()).add(place)
        leaks = sum(len(places) > 1 for places in parts.values())
        if leaks:
            raise PairError(
                f"Leak: {leaks} {what} are in more than one part of the split, so the metrics would flatter. Draw "
                "a new split (delete its file; pairs.own_split=false if the data set came with it)."
            )


def _draw(found: PairSet, config: PairsConfig) -> dict[str, str]:
    groups = _groups(found)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(config.split_seed)).tolist()
    chosen = [groups[place] for place in order]
    if config.max_patients:
        chosen = chosen[: config.max_patients]
    total = sum(map(len, chosen))
    places: dict[str, str] = {}
    counts: Counter[str] = Counter()
    room = {"test": config.test_share * total, "val": config.val_share * total}
    for group in chosen:
        part = next((name for name in ("test", "val") if counts[name] + len(group) / 2 <= room[name] > 0), "train")
        counts[part] += len(group)
        places.update((anonymous(pair.key), part) for pair in group)
    return places


def _groups(found: PairSet) -> list[list[Pair]]:
    """Put together the pairs of a patient, and patients that share an image; in the order of the source."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for pair in found.pairs:
        parent[root(f"image {found.digests.get(pair.key, pair.key)}")] = root(f"patient {pair.patient}")
    groups: dict[str, list[Pair]] = {}
    for pair in found.pairs:
        groups.setdefault(root(f"patient {pair.patient}"), []).append(pair)
    return list(groups.values())


def _load(file: Path) -> Split:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        places, broken, images = content["places"], content["broken"], content["images"]
        if content["version"] != VERSION or not set(places.values()) <= set(SPLITS):
            raise ValueError("another version")
        return Split(dict(places), frozenset(broken), dict(images))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PairError("The split file is damaged or of another version; delete it to draw a new split.") from error
