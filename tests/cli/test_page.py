"""``diffalign app``: what it passes on, and what it refuses before anything starts."""

import sys

import pytest


@pytest.fixture
def started(monkeypatch):
    """The ``Start`` of the page, which is not opened."""
    from diffalign.app import start  # here, so that not every process of the tests loads gradio

    seen = []

    class Stub:
        url, public = "http://127.0.0.1:7860/", None

        def __init__(self, options):
            seen.append(options)

        def wait(self):
            pass

    monkeypatch.setattr(start, "Server", Stub)
    return seen


def test_its_options_reach_the_page(run, started):
    from diffalign.app.start import Start

    result = run(
        *("app", "--allow", "owner/name", "--host", "0.0.0.0", "--port", "8000"),
        *("--auth", "me:pass:word", "--waiting", "3", "--reward", "redness"),
    )
    assert result.stdout == "The page is at http://127.0.0.1:7860/ (Ctrl-C ends it)\n"
    (options,) = started
    assert options == Start(
        host="0.0.0.0",
        port=8000,
        auth=("me", "pass:word"),
        allow=["owner/name"],
        rewards=["redness"],
        waiting=3,
    )


def test_a_page_for_everybody_is_said_to_be_one(run, started):
    assert "--auth asks for a password" in run("app", "--host", "0.0.0.0").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--auth", "me"), "NAME:PASSWORD"),
        (("--auth", ":word"), "NAME:PASSWORD"),
        (("--waiting", "0"), "at least 1"),
        (("--allow", "no/such/folder"), "no folder here and no hub id"),
        (("--reward", "no-such"), "Unknown reward"),
    ],
)
def test_bad_options_are_one_line(run, arguments, words):
    result = run("app", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_without_gradio_it_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffalign.app.start", None)
    result = run("app")
    assert result.exit_code == 2
    assert "pip install 'diffalign[app]'" in result.stderr
