"""What all tests share: no network, one thread, and a small tower."""

import os

from fmclip.process import prepare_process

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
prepare_process()  # as app.py does

import pytest
import torch

from fmclip.towers import Tower, get_tower

torch.set_num_threads(1)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An upload folder like gradio's."""
    from fmclip.page import uploads

    monkeypatch.setattr(uploads, "get_upload_folder", lambda: str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def visitors():
    """Visitors of a page on the tiny tower; a test module may have its own."""
    from fmclip.page.visitors import Visitors
    from fmclip.session import Session

    return Visitors(lambda: Session("tiny", "cpu"))


@pytest.fixture(scope="session")
def tiny_tower() -> Tower:
    """A random ViT of four blocks on 64 px; shared, because a tower never changes."""
    return get_tower("tiny")
