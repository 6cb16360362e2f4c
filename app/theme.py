"""Looks: system fonts, colours that colour-blind readers can tell apart (Okabe and Ito), light and dark."""

from pathlib import Path

import gradio as gr

CSS = (Path(__file__).parent / "style.css").read_text()
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "DejaVu Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def theme() -> gr.themes.Base:
    """Plain words as fonts: Gradio would fetch its own from a font server."""
    return gr.themes.Soft(primary_hue="blue", neutral_hue="slate", font=list(FONT), font_mono=list(MONO)).set(
        block_title_background_fill="none",
        block_title_background_fill_dark="none",
        block_title_padding="0",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        button_primary_background_fill="#0072b2",
        button_primary_background_fill_hover="#005a8e",
        button_primary_background_fill_dark="#0072b2",
        button_primary_background_fill_hover_dark="#0a86cb",
        button_primary_text_color="#ffffff",
        block_label_background_fill="none",
        block_label_background_fill_dark="none",
        block_label_border_width="0px",
        block_label_text_color="*neutral_800",
        block_label_text_color_dark="*neutral_100",
        checkbox_label_background_fill_selected="#0072b2",
        checkbox_label_background_fill_selected_dark="#0072b2",
        checkbox_border_color="*neutral_500",
        checkbox_label_border_width="1px",
        checkbox_label_border_color="*neutral_300",
        checkbox_label_border_color_dark="*neutral_600",
        input_border_width="1px",
        input_border_color="*neutral_400",
        button_border_width="1px",
        button_secondary_border_color="*neutral_400",
        slider_color="#0072b2",
        slider_color_dark="#56b4e9",
        checkbox_background_color_selected="#0072b2",
        checkbox_background_color_selected_dark="#0072b2",
    )
