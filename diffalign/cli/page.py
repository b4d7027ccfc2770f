"""``diffalign app``: the page in a browser."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from diffalign.cli import show
from diffalign.cli.problem import BadInput, checking, command

USE, SEE = "What it may use", "Who may see it"


def _option(panel: str, help: str, *names: str) -> object:
    return typer.Option(*names, help=help, rich_help_panel=panel)


Allow = Annotated[
    list[str] | None,
    _option(USE, "A model's folder, a folder of models, or a hub id; repeatable.", "--allow"),
]
Rewards = Annotated[
    list[str] | None, _option(USE, "A reward whose files are here; repeatable.", "--reward")
]
Waiting = Annotated[int, _option(USE, "Runs that may wait for their turn.", "--waiting")]
Host = Annotated[str, _option(SEE, "Address to listen at; 0.0.0.0 is the whole network.", "--host")]
Port = Annotated[int | None, _option(SEE, "The first free one from 7860 if left out.", "--port")]
Share = Annotated[bool, _option(SEE, "A public link through gradio's servers.", "--share")]
Auth = Annotated[
    str | None,
    typer.Option(
        "--auth",
        help="NAME:PASSWORD that visitors must give.",
        envvar="DIFFALIGN_AUTH",
        rich_help_panel=SEE,
    ),
]
Browser = Annotated[bool, _option(SEE, "Open a browser.", "--browser")]


@command
def app(
    allow: Allow = None,
    reward: Rewards = None,
    waiting: Waiting = 12,
    host: Host = "127.0.0.1",
    port: Port = None,
    share: Share = False,
    auth: Auth = None,
    browser: Browser = False,
) -> None:
    """Compare, align, evaluate in a browser, on this machine; needs the extra app."""
    name, colon, password = (auth or "").partition(":")
    if auth is not None and not (name and colon and password):
        raise BadInput("--auth must be NAME:PASSWORD.")
    if waiting < 1:
        raise BadInput(f"--waiting must be at least 1; got {waiting}.")
    open_to_all = auth is None and (share or host not in ("127.0.0.1", "localhost", "::1"))
    with _no_collections():
        try:
            from diffalign.app.start import Server, Start
        except ImportError as error:
            raise BadInput(
                f"the page needs gradio: pip install 'diffalign[app]' ({error})"
            ) from error
        start = Start(
            host=host,
            port=port,
            share=share,
            auth=(name, password) if auth is not None else None,
            allow=allow or (),
            rewards=reward or (),
            waiting=waiting,
            browser=browser,
        )
        try:
            with checking():
                server = Server(start)
        except OSError as error:
            raise BadInput(f"--host, --port: the page cannot listen there. {error}") from error
    show.text(f"The page is at {server.public or server.url} (Ctrl-C ends it)")
    if open_to_all:
        show.text(
            "Whoever reaches this address can use this machine's model; --auth asks for a password."
        )
    server.wait()


@contextmanager
def _no_collections() -> Iterator[None]:
    """Imports keep nearly all that they make: a fifth of the start went to collections that found
    nothing to free."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
