"""Pipelines without a family: what their denoisers cost is counted, and nothing is changed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from diffalign.core import Meter
from diffalign.core.types import Keywords, Pipeline
from diffalign.seams.denoiser.call import pipeline_call
from diffalign.seams.swap import Handler, intercepted

DENOISERS = ("transformer", "transformer_2", "unet")


@contextmanager
def counted(pipe: Pipeline, meter: Meter) -> Iterator[None]:
    """Within the block each row that enters a denoiser of ``pipe`` is charged before it runs.

    Raises: ``BudgetExceeded`` in place of the call that would pass the budget.
    """
    modules = [m for name in DENOISERS if (m := getattr(pipe, name, None)) is not None]
    handlers: dict[object, tuple[str, Handler]] = {
        module: ("__call__", functools.partial(_charge, module, meter)) for module in modules
    }
    with intercepted(handlers):
        yield


def _charge(
    module: object,
    meter: Meter,
    original: Callable[..., object],
    args: tuple[object, ...],
    kwargs: Keywords,
) -> object:
    meter.charge(rows=pipeline_call("", module, original, args, kwargs).rows)
    return original(*args, **kwargs)
