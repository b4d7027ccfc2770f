"""The page: a title and one tab for each thing that can be done."""

from __future__ import annotations

import gradio as gr

from diffalign.app import compare


def build(comparison: compare.Comparison | None = None) -> gr.Blocks:
    """The page. ``launch`` it, or mount it."""
    page: gr.Blocks = gr.Blocks(title="diffalign", analytics_enabled=False)
    with page:
        gr.Markdown(
            "# diffalign\nThe same noise, drawn by the plain pipeline and with techniques around "
            "it. Switching off leaves nothing behind."
        )
        with gr.Tab("Compare"):
            compare.tab(comparison or compare.Comparison())
    return page
