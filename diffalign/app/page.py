"""The page: a title, and one tab for each thing that can be done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from urllib.parse import parse_qsl

import gradio as gr
from gradio.components import Component

from diffalign.app import align, compare, evaluate, models, negative
from diffalign.app.desk import Desk, visitor_of
from diffalign.app.links import Fields
from diffalign.app.shelf import Shelf

TITLE = (
    "# diffalign\nTechniques around an unmodified diffusers pipeline, and searches over its noise. "
    "Every column starts from the same noise; the address of the page holds its settings."
)
TABS: tuple[tuple[str, Callable[[Shelf, Desk], Fields]], ...] = (
    ("Compare", compare.tab),
    ("Align", align.tab),
    ("Negative prompt", negative.tab),
    ("Evaluate", evaluate.tab),
    ("Models", models.tab),
)
ADDRESS = 20_000
"""Letters of an address that are read."""
WAITING = 60
"""Events that gradio's own queue takes; the desk refuses runs long before."""
KEPT_S = 3600
"""Seconds after which a picture that the page has shown is removed from the disk."""


def build(shelf: Shelf | None = None, desk: Desk | None = None) -> gr.Blocks:
    """The page with its queue. ``start`` launches it; it can be mounted too."""
    shelf, desk = shelf or Shelf(), desk or Desk()
    page: gr.Blocks = gr.Blocks(
        title="diffalign", analytics_enabled=False, delete_cache=(KEPT_S // 6, KEPT_S)
    )
    with page:
        gr.Markdown(TITLE)
        fields = []
        with gr.Tabs() as tabs:
            for title, draw in TABS:
                with gr.Tab(title, id=title.split()[0].lower()) as tab:
                    fields.append(draw(shelf, desk))
                fields[-1].watch(tab)
        restore(page, tabs, fields)

        def leave(request: gr.Request) -> None:
            desk.stop(visitor_of(request))

        page.unload(leave)
    page.queue(max_size=WAITING, default_concurrency_limit=8)
    return page


def restore(page: gr.Blocks, tabs: gr.Tabs, fields: Sequence[Fields]) -> None:
    """Fill the fields from the address when the page is opened."""
    targets = [component for tab in fields for component in tab.components.values()]

    def read(text: str) -> dict[Component | gr.Tabs, object]:
        query = dict(parse_qsl(text[1:ADDRESS], keep_blank_values=True))
        name = query.pop("tab", "")
        target = next((tab for tab in fields if tab.name == name), None)
        if target is None:
            return {tabs: gr.skip()}
        values, unusable = target.read(query)
        if unusable:
            gr.Warning(f"The address holds values that cannot be used: {', '.join(unusable)}.")
        updates: dict[Component | gr.Tabs, object] = {tabs: gr.Tabs(selected=target.name)}
        updates.update((component, value) for component, value in values.items())
        return updates

    page.load(
        read,
        gr.Textbox(visible=False),
        [tabs, *targets],
        js="() => [window.diffalignAddress ?? window.location.search]",
        show_progress="hidden",
        api_visibility="private",
    )


def head() -> str:
    """What notes the address before the first tab writes its own, and how wide the page is."""
    return (
        "<script>window.diffalignAddress = window.location.search</script>"
        f"<style>{_asset('frame.css')}</style>"
    )


def style() -> str:
    """The style sheet of what lies inside the page."""
    return _asset("page.css")


def _asset(name: str) -> str:
    return (files("diffalign.app") / name).read_text(encoding="utf-8")


def theme() -> gr.Theme:
    """Colours and fonts; the fonts are the visitor's own, so nothing is fetched."""
    return gr.themes.Default(
        primary_hue=gr.themes.colors.blue,
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
