"""What all tests share: no network, one thread, and a small tower."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported

import pytest
import torch

from fmclip.towers import Tower, get_tower

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_tower() -> Tower:
    """A random ViT of four blocks on 64 px; shared, because a tower never changes."""
    return get_tower("tiny")
