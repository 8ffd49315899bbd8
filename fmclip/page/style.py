"""Colours and type of the page, and what its own elements do in the browser."""

from pathlib import Path

import gradio as gr

_DATA = Path(__file__).parent.parent / "data"
CSS = "".join((_DATA / name).read_text("utf-8") for name in ("page.css", "answers.css"))
CARDS_JS, SPOT_JS = ((_DATA / name).read_text("utf-8") for name in ("cards.js", "spot.js"))
"""What cards and the clickable scan do in the browser."""

_SYSTEM_FONTS = ["ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]


def theme() -> gr.themes.Base:
    """Teal on slate, system fonts: nothing is fetched from elsewhere."""
    return gr.themes.Base(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        radius_size="md",
        font=_SYSTEM_FONTS,
        font_mono=["ui-monospace", "Consolas", "monospace"],
    ).set(
        body_background_fill="#f6f8f9",
        body_background_fill_dark="#0f1619",
        block_background_fill="#ffffff",
        block_background_fill_dark="#161f23",
        border_color_primary="#dbe3e7",
        border_color_primary_dark="#2b383f",
        color_accent="#0f766e",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#115e59",
        button_primary_background_fill_dark="#14958a",
        button_primary_background_fill_hover_dark="#17a99d",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#06110f",
        button_secondary_background_fill="#eef2f4",
        button_secondary_background_fill_dark="#22303a",
        input_background_fill="#f3f6f8",
        input_background_fill_dark="#1e2a30",
        block_label_background_fill="#ffffff",
        block_label_background_fill_dark="#161f23",
        block_border_width="0px",
        block_shadow="none",
        block_padding="0px",
        layout_gap="16px",
    )
