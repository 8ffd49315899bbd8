"""What tells one tower from another: a digest of its architecture and its frozen weights."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn


class Identity:
    """The digest of a model, computed when first asked for and shared by all towers around its weights."""

    def __init__(self, model: nn.Module, description: dict[str, Any]) -> None:
        self._model = model
        self.description = description
        self._digest = ""

    def digest(self) -> str:
        if not self._digest:
            text = json.dumps(self.description, sort_keys=True, default=str)
            sha = hashlib.sha256(text.encode())
            tensors = sorted(self._model.state_dict().items())
            with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter: seconds less for a large tower
                digests = pool.map(_tensor_digest, (tensor for _, tensor in tensors))
                for (name, tensor), digest in zip(tensors, digests, strict=True):
                    sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + digest)
            self._digest = sha.hexdigest()
        return self._digest


def _tensor_digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).digest()
