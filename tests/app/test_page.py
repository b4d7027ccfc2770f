"""The page as a whole: its tabs, its named endpoints, and what it loads from elsewhere."""

import re

import gradio as gr
import pytest

from diffalign.app import page


@pytest.fixture(scope="module")
def built(shelf):
    from diffalign.app.desk import Desk

    desk = Desk()
    yield page.build(shelf, desk)
    desk.close()


def test_endpoints_are_named_and_everything_else_is_private(built):
    names = set(built.get_api_info()["named_endpoints"])
    assert names == {
        "/compare",
        "/align",
        "/negative_prompt",
        "/evaluate",
        "/model",
        "/stop",
    }
    assert not built.get_api_info()["unnamed_endpoints"]


def test_the_tabs_stand_in_their_order(built):
    titles = [block.label for block in built.blocks.values() if isinstance(block, gr.Tab)]
    assert titles == ["Compare", "Align", "Negative prompt", "Evaluate", "Models"]


def test_nothing_is_loaded_from_elsewhere():
    from gradio.themes.utils.fonts import GoogleFont

    text = page.style() + page.head()
    assert not re.search(r"https?://|@import|url\(", text)
    assert not any(isinstance(font, GoogleFont) for font in page.theme()._font)
