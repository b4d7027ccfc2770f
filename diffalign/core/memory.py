"""The most memory that a piece of work took."""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """``with Peak(device) as peak: ...; peak.bytes`` is the most that was taken at one time, and
    ``peak.more`` how much of it was not in use when the block began.

    On CUDA what torch allocated there, on the CPU of Linux what is resident of the process, loaded
    models among it; both None elsewhere. The counter of the system, or of torch, begins anew.
    """

    bytes: int | None = None
    more: int | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before: int | None = None

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu" and _forget():
            self._before = _resident()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is None:
            return
        if self.device.type == "cuda":
            import torch

            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self.bytes = _resident()
        self.more = None if self.bytes is None else max(0, self.bytes - self._before)


def _forget() -> bool:
    """Begin anew with the peak of the resident memory; False where the system cannot."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _resident() -> int | None:
    """The peak of the resident memory in bytes; just begun anew, what is resident now."""
    match = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text("utf-8"), flags=re.M)
    return None if match is None else 1024 * int(match[1])
