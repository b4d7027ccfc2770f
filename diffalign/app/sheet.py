"""What the tabs that draw columns show: pictures, costs, curves, reports, and the same as code."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import gradio as gr
from gradio.components import Component
from PIL import Image

from diffalign.app.columns import HEADS, Column, curves, enlarged, pairs, reports
from diffalign.app.controls import Values
from diffalign.app.desk import Desk, Memory, Run, bar, visitor_of

Outputs = dict[Component, object]


@dataclass(frozen=True, slots=True)
class Sheet:
    """Columns that are drawn, with the code that draws them."""

    columns: tuple[Column, ...]
    # all columns of the run
    total: int
    python: str
    shell: str
    # the column that others are laid over
    base: int = 0

    @property
    def finished(self) -> bool:
        """Whether every column is there."""
        return len(self.columns) == self.total


@dataclass(frozen=True, slots=True)
class Frame:
    """The components that show a sheet."""

    slider: gr.ImageSlider
    gallery: gr.Gallery
    table: gr.Dataframe
    plot: gr.Image
    report: gr.Textbox
    python: gr.Code
    shell: gr.Code
    # the visitor's images, and which of them is the base
    images: gr.State

    @property
    def components(self) -> list[Component]:
        """All of them."""
        return [getattr(self, name) for name in self.__slots__]

    def show(self, sheet: Sheet) -> Outputs:
        """Updates that show a sheet, whole or in part."""
        images = [column.image for column in sheet.columns]
        base = min(sheet.base, len(images) - 1)
        outputs: Outputs = {
            self.slider: (enlarged(images[base]), enlarged(images[-1])),
            self.gallery: pairs(sheet.columns),
            self.table: [column.cells for column in sheet.columns],
            self.python: sheet.python,
            self.shell: sheet.shell,
            self.images: (images, base),
        }
        if sheet.finished:
            outputs[self.report] = reports(sheet.columns)
            picture = curves(sheet.columns)
            outputs[self.plot] = gr.Image(picture, visible=picture is not None)
        return outputs


def frame(label: str) -> Frame:
    """Draw the components here. ``label``: what lies on either side of the slider."""
    images = gr.State(([], 0), time_to_live=3600)
    slider = before_after(label)
    gallery = pictures("All columns on the same noise; click one to lay it over the first")
    table = gr.Dataframe(
        headers=HEADS, label="What each column cost", interactive=False, wrap=True, type="array"
    )
    plot = chart("Effective scale, and agreement of the branches, by step")
    with gr.Accordion("Reports in full", open=False):
        report = gr.Textbox(show_label=False, lines=12, max_lines=30, buttons=["copy"])
    python, shell = code()

    def pick(state: tuple[list[Image.Image], int], event: gr.SelectData) -> object:
        pictures, base = state
        if not (isinstance(event.index, int) and event.index < len(pictures)):
            return gr.skip()
        return enlarged(pictures[base]), enlarged(pictures[event.index])

    gallery.select(
        pick, images, slider, queue=False, show_progress="hidden", api_visibility="private"
    )
    return Frame(slider, gallery, table, plot, report, python, shell, images)


def before_after(label: str) -> gr.ImageSlider:
    """Draw two images under a line that can be dragged."""
    gr.Markdown(label, elem_classes=["heading"])
    return gr.ImageSlider(
        label=label,
        show_label=False,
        type="pil",
        format="png",
        interactive=False,
        max_height=420,
        elem_classes=["pixels"],
    )


def pictures(label: str) -> gr.Gallery:
    """Draw a gallery, which can be downloaded."""
    gr.Markdown(label, elem_classes=["heading"])
    return gr.Gallery(
        label=label,
        show_label=False,
        format="png",
        columns=4,
        fit_columns=False,
        height="auto",
        allow_preview=False,
        object_fit="contain",
        buttons=["download_all"],
        interactive=False,
        elem_classes=["pixels", "columns"],
    )


def chart(label: str) -> gr.Image:
    """Draw the place of a chart, which is there once it has something to show."""
    return gr.Image(
        label=label,
        show_label=False,
        type="pil",
        format="png",
        interactive=False,
        visible=False,
        buttons=["download", "fullscreen"],
    )


def code() -> tuple[gr.Code, gr.Code]:
    """Draw the two boxes with code: Python, and commands."""
    with gr.Accordion("Copy as Python or as command line", open=False):
        python = gr.Code(language="python", label="Python", interactive=False, wrap_lines=True)
        shell = gr.Code(language="shell", label="Command line", interactive=False, wrap_lines=True)
    return python, shell


class Keyed(Protocol):
    """What a visitor asks for."""

    @property
    def key(self) -> Hashable:
        """Equal where the sheet is."""
        ...


K = TypeVar("K", bound=Keyed)


def drawing(
    order_of: Callable[[Values], K],
    draw: Callable[[K, Run[Sheet]], None],
    desk: Desk,
    shown: Frame,
) -> Callable[..., Iterator[Outputs]]:
    """The event of a tab that draws a sheet: what is drawn already is shown from memory."""
    memory: Memory[Sheet] = Memory()

    def run(
        values: Values,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[Outputs]:
        order = order_of(values)
        sheet = memory.get(order.key)
        if sheet is not None:
            yield shown.show(sheet)
            return

        def work(run: Run[Sheet]) -> None:
            draw(order, run)

        for sheet in desk.run(visitor_of(request), work, bar(progress)):
            yield shown.show(sheet)
        if sheet is not None and sheet.finished:
            memory.put(order.key, sheet)

    return run
