"""How much more memory something needs while it runs."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch

EVERY = 0.002
"""Seconds between two looks at the memory of the process."""


class PeakMemory(AbstractContextManager["PeakMemory"]):
    """Measures the largest memory inside a block beyond what was in use when it began.

    ``bytes`` afterwards: on a CUDA device what PyTorch had allocated there, whose peak counter is
    set back; elsewhere the resident memory of the process, looked at every 2 ms, so shorter peaks
    may be missed and memory that PyTorch kept from earlier work counts as used already.
    """

    bytes: int = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._done = threading.Event()
        self._before = self._peak = 0
        self._watch = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._before = self._peak = _resident()
            self._watch.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            import torch

            self._peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self._done.set()
            self._watch.join()
            self._peak = max(self._peak, _resident())
        self.bytes = max(0, self._peak - self._before)

    def _look(self) -> None:
        while not self._done.wait(EVERY):
            self._peak = max(self._peak, _resident())


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
