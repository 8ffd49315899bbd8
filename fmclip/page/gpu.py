"""Hosted GPU Spaces lend their GPU for single calls: these are the two calls that need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fmclip.learning import answer, learn
from fmclip.session import Session

LEARN_SECONDS = 180
ANSWER_SECONDS = 30


def on_gpu(function: Callable[..., Any], seconds: int) -> Callable[..., Any]:
    """Decorate with `spaces.GPU` where that package is present; elsewhere the function stays as it is."""
    try:
        import spaces
    except ImportError:
        return function
    return spaces.GPU(duration=seconds)(function)


def session_maker(tower: str, device: str) -> Callable[[], Session]:
    """Give a function that makes sessions for visitors."""
    learn_call, answer_call = on_gpu(learn, LEARN_SECONDS), on_gpu(answer, ANSWER_SECONDS)
    return lambda: Session(tower, device, learn_call=learn_call, answer_call=answer_call)
