"""The closed loop: what reaches ``scheduler.step`` is the guided prediction, or the run stops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffalign.core import GuidanceMismatch
from diffalign.families.family import Family
from diffalign.seams.denoiser.branch_log import PENDING
from diffalign.seams.denoiser.clock import Clock
from diffalign.seams.swap import original_class


class ClosedLoop:
    """Compares every step on the device; reads the flags at step 0 and at the end, so that no other
    step waits. Where the prediction is handed on as it is, small latents wait and are compared
    together.

    Exact for rows that hand the prediction on as it is (a sign or a slice is exact too); 4 eps of
    its dtype, times how far the arithmetic amplifies rounding, where the pipeline maps it
    (``family.affine``) or gets the algebraic form of weight ``k``.
    """

    def __init__(self, pipe: Any, family: Family, clock: Clock) -> None:
        self.name, self.family, self.clock = original_class(pipe).__name__, family, clock
        # the pipeline computes c + k (c - u) or u + s (c - u) with a placeholder scale; k is the
        # weight of (c - u) that the algebraic answer must undo
        self.k = family.placeholder - 1.0 + family.offset
        self._waiting: list[tuple[int, Tensor]] = []
        self._flags: list[tuple[int, Tensor]] = []

    def check(
        self, guided: Tensor | None, algebraic: Tensor | None, arrived: Tensor, sample: Tensor
    ) -> None:
        """``arrived``, ``sample``: arguments of ``scheduler.step``. ``algebraic``: the conditional
        prediction, where that form was used."""
        if guided is None:
            raise GuidanceMismatch(
                "scheduler.step ran without a denoiser call before it; the guidance had no effect "
                "at this step."
            )
        index = self.clock.calls
        expected = self.family.to_step(guided, arrived)
        size: Tensor | None = None
        if self.family.affine:
            s = self.clock.sigmas[self.clock.offset + index]
            expected = (sample + expected) * (1.0 - s)
            # the pipeline divides x - x0 by the noise level, so rounding of x0 grows as the level
            # falls
            size = expected.abs().amax() + sample.abs().amax() / max(s, 1e-6)
        elif algebraic is not None:
            size = expected.abs().amax() + algebraic.abs().amax()
        if expected.shape != arrived.shape:
            raise GuidanceMismatch(
                f"The scheduler got {list(arrived.shape)}, the guidance computed "
                f"{list(expected.shape)}."
            )
        if size is None:
            both = torch.stack((expected.to(arrived.dtype), arrived))
            self._waiting.append((index, both.detach() if both.requires_grad else both))
            if len(self._waiting) * 2 * arrived.numel() > PENDING:
                self._compare()
        else:
            expected, arrived = expected.detach(), arrived.detach()
            slack = 4 * torch.finfo(guided.dtype).eps * (1.0 + 2.0 * self.k) * size
            wrong = (arrived - expected.to(arrived.dtype)).abs().amax() > slack
            self._flags.append(
                (index, torch.stack((~torch.isfinite(guided.detach()).all(), wrong.detach())))
            )
        if index == 0:
            self.verify()

    def _compare(self) -> None:
        if self._waiting:
            both = torch.stack([pair for _, pair in self._waiting]).flatten(2)  # [steps, 2, values]
            expected, arrived = both[:, 0], both[:, 1]
            flags = torch.stack(
                (~torch.isfinite(expected).all(1), (arrived != expected).any(1)), dim=1
            )
            self._flags += [(index, flag) for (index, _), flag in zip(self._waiting, flags)]
            self._waiting.clear()

    @torch.no_grad()
    def verify(self) -> None:
        """Read the flags collected so far, with one synchronisation, and raise for the first bad
        step."""
        self._compare()
        flags, self._flags = self._flags, []
        if not flags:
            return
        values = torch.stack([flag for _, flag in flags]).tolist()
        for (index, _), (infinite, wrong) in zip(flags, values):
            if infinite:
                raise GuidanceMismatch(
                    f"The guided prediction is not finite at step {index}. Lower the scale or use "
                    "a wider dtype."
                )
            if wrong:
                raise GuidanceMismatch(
                    f"What reached the scheduler at step {index} is not the guided prediction: "
                    f"{self.name} changes the prediction in a way "
                    "that diffalign does not know. Without this check the image would be silently "
                    "wrong."
                )
