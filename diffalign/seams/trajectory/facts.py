"""What is known of trajectories before any of them has run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffalign.core import Technique
from diffalign.core.types import Keywords, Pipeline
from diffalign.core.words import Shift, Words
from diffalign.seams.guiders_in import as_technique
from diffalign.seams.session import active
from diffalign.seams.trajectory.grid import Grid
from diffalign.seams.trajectory.kernels import Kernel, Native, std_at, why_alike
from diffalign.seams.trajectory.price import rows_of
from diffalign.seams.trajectory.segments import Segments
from diffalign.seams.words import tower_of

if TYPE_CHECKING:
    import torch


class Facts:
    """Noise levels, cost and kernel of the trajectories of one pipeline, prompt and techniques."""

    # whether the techniques are active on the pipeline
    is_open = False

    def __init__(
        self,
        pipe: Pipeline,
        techniques: Sequence[Any],
        kernel: Kernel | None,
        call: Keywords,
        shift: Shift | None = None,
    ) -> None:
        self.pipe, self.segments = pipe, Segments(pipe, call, shift)
        self.techniques: tuple[Technique, ...] = tuple(map(as_technique, techniques))
        self.kernel: Kernel = Native() if kernel is None else kernel
        self._words: Words | None = None
        # rows of one image at each evaluation, empty before somebody asks
        self._rows: tuple[int, ...] = ()

    @property
    def grid(self) -> Grid:
        """The noise levels of a trajectory."""
        return self.segments.grid

    def noise(self, seeds: Sequence[int]) -> torch.Tensor:
        """The start noise [B, ...] that the pipeline draws by the seeds."""
        return self.segments.draw(seeds)[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of start noise."""
        return self.segments.noise.dtype

    @property
    def count(self) -> int:
        """Evaluations of one whole trajectory."""
        return self.grid.count

    @property
    def branches(self) -> bool:
        """Whether two children of one state can differ: the kernel draws noise."""
        return self.kernel.branches(self.grid)

    @property
    def deterministic(self) -> str | None:
        """Why children of one state are alike and which kernel would do, None where they differ."""
        return why_alike(self.kernel, self.grid)

    def price(self, first: int = 0, last: int | None = None) -> int:
        """Largest number of denoiser rows of one image between two evaluations, None for the end.

        It is known before any compute; what is run is never more.
        """
        if not self._rows:
            outer = active(self.pipe)
            techniques = outer if self.is_open else (*outer, *self.techniques)
            self._rows = rows_of(self.segments.call, techniques, self.grid)
        return sum(self._rows[first:last])

    def std(self, step: int) -> float:
        """Standard deviation of the noise that the kernel adds at an evaluation, 0 for none.

        Raises: ``UnsupportedModel`` for the scheduler's own steps, which do not say.
        """
        return std_at(self.kernel, self.grid, step)

    @property
    def words(self) -> Words:
        """The vocabulary of the pipeline's first text encoder.

        Raises: ``UnsupportedModel`` where there is none that pools its text.
        """
        if self._words is None:
            self._words = tower_of(self.pipe)
        return self._words
