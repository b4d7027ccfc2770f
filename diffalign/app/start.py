"""Starting the page: what it may use, who may see it, and what is removed when it ends."""

from __future__ import annotations

import importlib
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from diffalign.app.desk import Desk
from diffalign.app.page import build, head, style, theme
from diffalign.app.shelf import USUAL, Shelf


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How the page is started."""

    host: str = "127.0.0.1"
    # None: the first free one from 7860 on
    port: int | None = None
    # a public link through gradio's servers
    share: bool = False
    # (name, password), None for everybody
    auth: tuple[str, str] | None = None
    # folders and hub ids beside the embedded models
    allow: Sequence[str] = ()
    # rewards beside those that ship
    rewards: Sequence[str] = ()
    # runs that may wait
    waiting: int = 12
    # open a browser
    browser: bool = False


class Server:
    """The running page; ``close`` ends it and removes its files."""

    def __init__(self, start: Start) -> None:
        shelf = Shelf(start.allow, start.rewards)
        self._rest = ExitStack()
        try:
            self._open(start, shelf)
        except BaseException:  # such as a port that is taken
            self._rest.close()
            raise
        # so that the first visitor does not wait for it
        self.desk.warm(lambda: shelf.open(USUAL).judge)

    def _open(self, start: Start, shelf: Shelf) -> None:
        # the libraries of the usual model before there is a page, the model while a browser loads
        # it: whoever clicks at once waits for neither
        importlib.import_module("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
        folder = self._rest.enter_context(tempfile.TemporaryDirectory(prefix="diffalign-app-"))
        self._rest.callback(_environment("GRADIO_TEMP_DIR", folder))
        self.desk = Desk(start.waiting)
        self._rest.callback(self.desk.close)
        self.page = build(shelf, self.desk)
        self._rest.callback(self.page.close, verbose=False)
        _, self.url, self.public = self.page.launch(
            server_name=start.host,
            server_port=start.port,
            share=start.share,
            auth=start.auth,
            inbrowser=start.browser,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=["api"],
            run_history=False,
            enable_monitoring=False,
            max_file_size="1mb",
            theme=theme(),
            css=style(),
            head=head(),
        )

    def close(self) -> None:
        """End the page: its runs stop at their next step, its files are removed."""
        self._rest.close()

    def wait(self) -> None:
        """Until the process is interrupted or told to end."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            self.page.block_thread()
        finally:
            self.close()


def _environment(name: str, value: str) -> Callable[[], None]:
    """Set a variable of the environment; what is returned takes it back."""
    before = os.environ.get(name)
    os.environ[name] = value

    def restore() -> None:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before

    return restore
