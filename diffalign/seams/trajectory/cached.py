"""Trajectories by a feature cache of diffusers, for drafts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

from diffalign.core import Meter, UnsupportedModel
from diffalign.core.types import Pipeline
from diffalign.seams.denoiser.cache import is_cached
from diffalign.seams.swap import original_class, unwrapped
from diffalign.seams.trajectory.kernels import Kernel
from diffalign.seams.trajectory.sampler import PipelineSampler


class CachedSampler(PipelineSampler):
    """A sampler whose denoisers run diffusers' first-block cache while it is open.

    ``cache``: relative change of the first block's output below which the other blocks are
    skipped. NFE counts a skipped evaluation as a whole one.
    Raises: ``UnsupportedModel`` where a denoiser has no such cache, or one is on already.
    """

    def __init__(
        self,
        pipe: Pipeline,
        techniques: Sequence[Any] = (),
        meter: Meter | None = None,
        kernel: Kernel | None = None,
        *,
        cache: float,
        **call: Any,
    ) -> None:
        super().__init__(pipe, techniques, meter, kernel, **call)
        self.cache, self._stack = cache, ExitStack()
        with self._caching():
            pass

    @contextmanager
    def _caching(self) -> Iterator[None]:
        family = self.segments.call.family
        with ExitStack() as stack:
            for name in family.present(self.pipe):
                stack.enter_context(first_block_cache(getattr(self.pipe, name), self.cache))
            yield

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._caching())
            super().__enter__()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stack:
            super().__exit__(kind, error, trace)


@contextmanager
def first_block_cache(denoiser: Any, threshold: float) -> Iterator[None]:
    """Within the block, a denoiser runs the first-block cache; afterwards it is as it was."""
    from diffusers import FirstBlockCacheConfig

    module = unwrapped(denoiser)
    name = original_class(module).__name__
    if not hasattr(module, "enable_cache"):
        raise UnsupportedModel(
            f"{name} has no feature cache; draft by fewer steps or by techniques instead."
        )
    if is_cached(module):
        raise UnsupportedModel(f"{name} runs a feature cache already; disable it for drafts.")
    hooked = {part for part in module.modules() if "_diffusers_hook" in vars(part)}
    try:
        module.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(
            f"{name} cannot run the first-block cache ({error}); draft by fewer steps or by "
            "techniques instead."
        ) from error
    try:
        yield
    finally:
        module.disable_cache()
        # diffusers leaves its empty registries behind
        for part in module.modules():
            if part not in hooked:
                vars(part).pop("_diffusers_hook", None)
