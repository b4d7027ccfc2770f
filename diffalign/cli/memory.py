"""The most memory that a piece of work took."""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """``with Peak(device) as peak: ...; peak.bytes`` is the most that was taken at one time.

    On CUDA what torch allocated there, on the CPU of Linux what is resident of the process, loaded
    models among it; None elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device.type == "cpu":
            self._readable = _forget()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self.device.type == "cpu" and self._readable:
            self.bytes = _resident()


def _forget() -> bool:
    """Begin anew with the peak of the resident memory; False where the system cannot."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _resident() -> int | None:
    """The peak of the resident memory in bytes."""
    match = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text("utf-8"), flags=re.M)
    return None if match is None else 1024 * int(match[1])
