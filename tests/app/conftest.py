"""The models of the page, its desk, and the running page in a browser."""

import pytest


@pytest.fixture(scope="session")
def shelf():
    from diffalign.app.shelf import Shelf

    return Shelf()


@pytest.fixture(scope="session")
def opened(shelf):
    """The embedded model as the page has it."""
    return shelf.open("emoji")


@pytest.fixture
def run():
    """A run whose news are a list."""
    from diffalign.app.desk import Run

    return Run("visitor", lambda run: None)


def told(run):
    """Everything that a run has told but its steps."""
    from diffalign.app.desk import Progress

    news = [run.news.get_nowait() for _ in range(run.news.qsize())]
    return [item for item in news if not isinstance(item, Progress)]


@pytest.fixture(scope="session")
def news():
    return told
