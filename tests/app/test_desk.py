"""One worker, many visitors: order, news, stop, refusals, and what is remembered."""

import threading

import gradio as gr
import pytest

from diffalign.app.desk import Desk, Memory, Progress, visitor_of
from diffalign.core import Cancelled
from diffalign.eval.files import RunError


@pytest.fixture
def desk():
    desk = Desk(most=1)
    yield desk
    desk.close()


@pytest.fixture
def busy(desk):
    """A run of somebody else that goes on until it is stopped."""
    begun = threading.Event()

    def work(run):
        begun.set()
        run.stopped.wait(60)
        run.check()

    def consume():
        with pytest.raises(gr.Error, match="Stopped"):
            list(desk.run("other", work))

    thread = threading.Thread(target=consume)
    thread.start()
    assert begun.wait(60)
    yield
    desk.stop("other")
    thread.join()


def test_news_come_and_the_last_is_never_lost(desk):
    steps = []

    def work(run):
        for i in range(3):
            run.tell(Progress(i, 3, "drawing"))
            run.tell(f"image {i}")

    results = list(desk.run("me", work, steps.append))
    assert results[-1] == "image 2"
    assert steps[-1] == Progress(2, 3, "drawing")
    assert list(desk.run("me", lambda run: run.tell("again"))) == ["again"]


def test_a_stopped_run_ends_and_the_worker_is_free(desk):
    begun = threading.Event()

    def work(run):
        run.tell("first")
        begun.set()
        run.stopped.wait(60)
        run.check()

    news = desk.run("me", work)
    assert next(news) == "first"
    desk.stop("me")
    with pytest.raises(gr.Error, match="Stopped") as caught:
        list(news)
    assert not caught.value.print_exception
    assert list(desk.run("me", lambda run: run.tell("next"))) == ["next"]


def test_whatever_a_stop_becomes_on_its_way_up_is_a_stop(desk):
    def work(run):
        run.tell("first")
        run.stopped.wait(60)
        try:
            run.check()
        except Cancelled as error:
            raise RunError("prompt 3 failed") from error

    news = desk.run("me", work)
    next(news)
    desk.stop("me")
    with pytest.raises(gr.Error, match="Stopped"):
        list(news)


def test_a_visitor_who_leaves_stops_the_run(desk):
    ended = threading.Event()

    def work(run):
        run.tell("first")
        run.stopped.wait(60)
        ended.set()

    news = desk.run("me", work)
    next(news)
    news.close()
    assert ended.wait(60)


def test_one_who_waits_is_told_and_may_leave_the_line(desk, busy):
    steps, waiting = [], threading.Event()

    def progress(news):
        steps.append(news)
        waiting.set()

    def leave():
        waiting.wait(60)
        desk.stop("me")

    threading.Thread(target=leave).start()
    with pytest.raises(gr.Error, match="Stopped"):
        list(desk.run("me", lambda run: run.tell("never"), progress))
    assert steps[0].text == "waiting; 1 run is ahead"


def test_a_second_run_and_a_full_line_are_refused(desk, busy):
    with pytest.raises(gr.Error, match="not finished yet"):
        next(desk.run("other", lambda run: None))
    waiting = desk.run("second", lambda run: run.tell("second"))
    thread = threading.Thread(target=lambda: list(waiting))
    thread.start()
    while "second" not in desk._runs:
        pass
    with pytest.raises(gr.Error, match="1 runs are waiting already"):
        next(desk.run("third", lambda run: None))
    desk.stop("other")
    thread.join()


@pytest.mark.parametrize("error", [ValueError("bad <scale>"), LookupError("bad <scale>")])
def test_what_the_user_did_wrong_is_one_line(desk, error):
    def work(run):
        raise error

    with pytest.raises(gr.Error, match="bad &lt;scale&gt;") as caught:
        list(desk.run("me", work))
    assert not caught.value.print_exception


def test_what_nobody_expected_is_named_on_the_page_and_told_in_the_terminal(desk):
    def work(run):
        raise RuntimeError("a path of this machine")

    with pytest.raises(gr.Error, match="The run failed: RuntimeError") as caught:
        list(desk.run("me", work))
    assert caught.value.print_exception
    assert "path" not in caught.value.message


def test_a_closed_desk_ends_its_runs():
    desk = Desk()
    done = []
    desk.warm(lambda: done.append(1))
    desk.close()
    assert done == [1]


def test_the_memory_holds_the_newest():
    memory = Memory(2)
    for key in "abc":
        memory.put(key, key.upper())
    assert [memory.get(key) for key in "abc"] == [None, "B", "C"]
    memory.get("b")
    memory.put("d", "D")
    assert memory.get("c") is None


def test_every_open_page_is_a_visitor_of_its_own():
    assert visitor_of(None) != visitor_of(None)
