"""The demo in a browser; needs the extra ``app`` (gradio)."""
