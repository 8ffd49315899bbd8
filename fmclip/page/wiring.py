"""Between handlers, which name page parts, and gradio, which wants its components."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gradio as gr

from fmclip.page.handlers import Updates


def connect(
    parts: Mapping[str, Any],
    event: Callable[..., Any],
    handler: Callable[..., Any],
    inputs: Sequence[Any] = (),
    *,
    takes_event: bool = False,
    **options: Any,
) -> Any:
    """Run a handler on an event; it may update any part of the page.

    Args:
        parts: Components by name.
        event: Such as `button.click`.
        handler: Gets the values of the inputs, the event data if it takes them, and the visitor's token.
        inputs: Components whose values it gets.
        takes_event: Whether it wants the event data.
        options: Further options of the event.

    Returns:
        The event's listener; its `then` runs something after it.
    """

    def call(event_data: gr.EventData, request: gr.Request, *values: Any) -> dict[Any, Any]:
        return _to_components(parts, handler(*_arguments(event_data, request, values)))

    def stream(event_data: gr.EventData, request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        for updates in handler(*_arguments(event_data, request, values)):
            yield _to_components(parts, updates)

    def _arguments(event_data: gr.EventData, request: gr.Request, values: Sequence[Any]) -> list[Any]:
        return [*values, *([event_data] if takes_event else []), token_of(request)]

    return event(
        stream if inspect.isgeneratorfunction(_plain(handler)) else call,
        list(inputs),
        list(parts.values()),
        show_progress="hidden",  # the page tells the progress itself, and the pictures stay visible
        api_visibility="private",
        **options,
    )


def token_of(request: gr.Request) -> str:
    """The visitor's token: one for each page that is open."""
    return str(request.session_hash)


def _to_components(parts: Mapping[str, Any], updates: Updates) -> dict[Any, Any]:
    return {parts[name]: value for name, value in updates.items()}


def _plain(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The function inside a `functools.partial`."""
    return getattr(handler, "func", handler)
