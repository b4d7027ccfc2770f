"""The desk: runs of all visitors come one after another, each can be watched and stopped by its
visitor, and what a run raises becomes a sentence on the page."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

import gradio as gr

from diffalign.app.bounds import refusal
from diffalign.core.errors import Cancelled

T = TypeVar("T")
STOPPED = "Stopped. The pipeline is as it was; start again whenever you like."
TICK = 0.2
"""Seconds between two looks at a run."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    done: int
    total: int
    # what is being done
    text: str


@dataclass(slots=True)
class Run(Generic[T]):
    """One run of one visitor."""

    visitor: str
    work: Callable[[Run[T]], None]
    news: SimpleQueue[T | Progress] = field(default_factory=SimpleQueue)
    stopped: threading.Event = field(default_factory=threading.Event)

    def tell(self, news: T | Progress) -> None:
        """Show this to the visitor."""
        self.news.put(news)

    def check(self) -> None:
        """Raise ``Cancelled`` once the visitor has stopped the run."""
        if self.stopped.is_set():
            raise Cancelled(STOPPED)


class Desk:
    """One worker for all visitors. ``most``: runs that may wait; further ones are refused."""

    def __init__(self, most: int = 12) -> None:
        self.most = most
        self._worker = ThreadPoolExecutor(1, "diffalign-desk")
        self._lock = threading.Lock()
        self._runs: dict[str, Run[object]] = {}

    def run(
        self,
        visitor: str,
        work: Callable[[Run[T]], None],
        progress: Callable[[Progress], None] = lambda news: None,
    ) -> Iterator[T]:
        """Yield what ``work`` tells, as it comes; ``progress`` is told the rest.

        Raises: ``gr.Error`` with one line for what cannot run, after ``stop``, when too many runs
        wait, and for a second run of the same visitor.
        """
        run = Run(visitor, work)
        with self._lock:
            self._admit(run)
            future = self._worker.submit(self._do, run)
        try:
            yield from self._news(run, future, progress)
        finally:  # the visitor may be gone
            run.stopped.set()
            future.cancel()
            with self._lock:
                self._runs.pop(visitor, None)

    def warm(self, work: Callable[[], object]) -> None:
        """Do this before the first run, for nobody."""
        self._worker.submit(work)

    def stop(self, visitor: str) -> None:
        """End the visitor's run at its next step; without one, nothing happens."""
        with self._lock:
            run = self._runs.get(visitor)
        if run is not None:
            run.stopped.set()

    def close(self) -> None:
        """Stop every run and take no more."""
        for visitor in list(self._runs):
            self.stop(visitor)
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _admit(self, run: Run[T]) -> None:
        if run.visitor in self._runs:
            raise refusal("A run of yours is not finished yet. Stop it first, or wait for it.")
        if len(self._runs) > self.most:
            raise refusal(f"{self.most} runs are waiting already; come back in a moment.")
        self._runs[run.visitor] = run  # type: ignore[assignment]

    def _do(self, run: Run[T]) -> None:
        run.check()
        try:
            run.work(run)
        except Exception as error:
            if run.stopped.is_set():  # whatever the stop became on its way up
                raise Cancelled(STOPPED) from error
            raise

    def _news(
        self, run: Run[T], future: Future[None], progress: Callable[[Progress], None]
    ) -> Iterator[T]:
        """News until the run ends; the newest of those that came together, and the last."""
        while not future.done():
            if not future.running():
                self._wait(run, future, progress)
            wait([future], timeout=TICK)  # a browser cannot draw every step
            yield from self._newest(run, progress)
        yield from self._newest(run, progress)
        try:
            future.result()
        except (Cancelled, CancelledError) as error:
            raise refusal(STOPPED) from error
        except (ValueError, TypeError, LookupError) as error:
            raise refusal(error) from error
        except Exception as error:
            raise gr.Error(
                f"The run failed: {type(error).__name__}. The terminal of the page says more."
            ) from error

    def _wait(
        self, run: Run[T], future: Future[None], progress: Callable[[Progress], None]
    ) -> None:
        """Say how many are ahead, and leave the line where the visitor stops."""
        if run.stopped.is_set() and future.cancel():
            raise refusal(STOPPED)
        with self._lock:
            ahead = list(self._runs).index(run.visitor)
        if ahead:
            runs = "1 run is" if ahead == 1 else f"{ahead} runs are"
            progress(Progress(0, 1, f"waiting; {runs} ahead"))

    def _newest(self, run: Run[T], progress: Callable[[Progress], None]) -> Iterator[T]:
        news: list[T | Progress] = []
        with suppress(Empty):
            while True:
                news.append(run.news.get_nowait())
        results = [item for item in news if not isinstance(item, Progress)]
        steps = [item for item in news if isinstance(item, Progress)]
        if steps:
            progress(steps[-1])
        if results:
            yield results[-1]


def visitor_of(request: gr.Request | None) -> str:
    """Who asks: one name for each open page."""
    name = None if request is None else request.session_hash
    return name or f"without-page-{next(_NUMBERS)}"


_NUMBERS = itertools.count()


def bar(progress: gr.Progress) -> Callable[[Progress], None]:
    """What shows ``Progress`` in gradio's own bar."""

    def show(news: Progress) -> None:
        progress((news.done, news.total), desc=news.text)

    return show


class Memory(Generic[T]):
    """The results of the last ``size`` different runs, so that examples answer at once."""

    def __init__(self, size: int = 24) -> None:
        self.size = size
        self._results: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> T | None:
        """The result of an equal run, None where there is none."""
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
            return self._results.get(key)

    def put(self, key: Hashable, result: T) -> None:
        """Remember a result; the oldest makes room."""
        with self._lock:
            self._results[key] = result
            while len(self._results) > self.size:
                self._results.popitem(last=False)
