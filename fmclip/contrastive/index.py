"""A file of embeddings to search in: what the texts say and where they came from is all it holds, no image.

Texts may describe patients: the file belongs where the reports belong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fmclip.contrastive.retrieval import nearest
from fmclip.errors import PairError

FORMAT = "fmclip index"
VERSION = 1
MAX_TEXT_BYTES = 2**28


@dataclass(frozen=True)
class Match:
    """An entry of an index that was found.

    Attributes:
        place: Its place in the index, from 0.
        text: Its text.
        cosine: How near it is.
        count: How many of the images found have this very text; 1 for texts.
    """

    place: int
    text: str
    cosine: float
    count: int = 1


@dataclass(frozen=True)
class Index:
    """Pairs to search in.

    Attributes:
        image: Embeddings of the images, [n, D] half precision, L2-normalised.
        text: Embeddings of the texts, [n, D] half precision.
        texts: n texts.
        tower: Identity of the tower that embedded them.
        fit: How images are fitted into the tower's square: "crop" or "letterbox".
    """

    image: Tensor
    text: Tensor
    texts: tuple[str, ...]
    tower: str
    fit: str

    def search(self, query: Tensor, k: int = 5, *, among: str = "text") -> list[Match]:
        """Find the entries nearest to a query; entries with equal texts are shown once.

        Args:
            query: [D], L2-normalised.
            k: How many.
            among: "text" compares with what is said, "image" with what is seen.

        Returns:
            Matches, the nearest first.
        """
        return self._texts(query, k) if among == "text" else self._images(query, k)

    def _texts(self, query: Tensor, k: int) -> list[Match]:
        first = list({text: place for place, text in reversed(list(enumerate(self.texts)))}.values())
        cosines, rows = nearest(query[None].cpu(), self.text[first], k)
        found = [(first[row], cosine) for cosine, row in zip(cosines[0].tolist(), rows[0].tolist(), strict=True)]
        return [Match(place, self.texts[place], cosine) for place, cosine in found]

    def _images(self, query: Tensor, k: int) -> list[Match]:
        wide = max(50, 10 * k)
        while True:  # until k texts are among the images found, or all images are
            cosines, places = nearest(query[None].cpu(), self.image, wide)
            found: dict[str, Match] = {}
            for cosine, place in zip(cosines[0].tolist(), places[0].tolist(), strict=True):
                text = self.texts[place]
                former = found.get(text) or Match(place, text, cosine, 0)
                found[text] = replace(former, count=former.count + 1)
            if len(found) >= k or wide >= len(self.texts):
                return list(found.values())[:k]
            wide *= 4

    def save(self, file: Path) -> None:
        """Write the index as safetensors."""
        from safetensors.torch import save_file

        facts = {"format": FORMAT, "version": VERSION, "texts": self.texts, "tower": self.tower, "fit": self.fit}
        tensors = {"image": self.image.half().contiguous(), "text": self.text.half().contiguous()}
        save_file(tensors, file, {"fmclip": json.dumps(facts)})


def make_index(image: Tensor, text: Tensor, texts: Sequence[str], tower: str, fit: str) -> Index:
    """Make an index from embeddings [n, D] of both kinds and their n texts."""
    return Index(image.half(), text.half(), tuple(texts), tower, fit)


def load_index(file: Path, *, tower: str = "") -> Index:
    """Read an index.

    Args:
        file: The file.
        tower: Identity of the tower in use; "" takes any.

    Returns:
        The index.

    Raises:
        PairError: It is damaged, no index, or was made with another tower.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as stored:
            content = (stored.metadata() or {})["fmclip"]
            if len(content) > MAX_TEXT_BYTES:
                raise PairError("The index holds more text than is read; make a smaller one.")
            facts = json.loads(content)
            image, text = stored.get_tensor("image"), stored.get_tensor("text")
        texts = tuple(str(one) for one in facts["texts"])
        sound = facts["format"] == FORMAT and facts["version"] == VERSION and facts["fit"] in ("crop", "letterbox")
        sound = sound and image.shape == text.shape and image.ndim == 2 and len(texts) == len(image) > 0
        sound = sound and bool(torch.isfinite(image).all() and torch.isfinite(text).all())
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise PairError("This file is no index, or is damaged. Make one with `python -m fmclip pretrain`.") from error
    if not sound:
        raise PairError("This file is no index of this version, or is damaged.")
    if tower and facts["tower"] != tower:
        raise PairError("This index was made with another tower: start the page, or the command, with that one.")
    return Index(image, text, texts, str(facts["tower"]), str(facts["fit"]))
