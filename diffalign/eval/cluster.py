"""Units on Ray (Moritz et al. 2018, arXiv:1712.05889): a pool of actors, each with a model of its
own. What a lost actor had in hand is done again by another one.

Ray carries prompts and errors, and no image. The files of a run stand in its folder, which
every machine of the cluster must see under the same path; they are those of any other engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from diffalign.eval.benchmarks import Item
from diffalign.eval.files import RunError

if TYPE_CHECKING:
    import numpy as np

Work = Callable[[Item], None]
"""Makes or scores one unit; raises ``RunError``."""
TRIES = 3
"""How often a unit is begun again because its actor was lost, before the run ends."""
STORE = 100_000_000
"""Bytes of Ray's memory for objects on one machine; no image goes through it."""


class Actor:
    """One member of the pool; it prepares its work when the first unit comes, once in its life."""

    def __init__(self, prepare: Callable[[], Work], items: Sequence[Item]) -> None:
        self.prepare, self.items = prepare, {item.index: item for item in items}
        self.work: Work | None = None

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, list[object]]:
        """The unit of a batch of one number; its error, "" if it is finished."""
        (index,), error = batch["index"].tolist(), ""
        try:
            if self.work is None:
                self.work = self.prepare()
            self.work(self.items[index])
        except RunError as problem:
            error = str(problem)
        except Exception as problem:  # else Ray's own message, which hides it
            error = f"prompt {index}: {type(problem).__name__}: {problem}"
        return {"index": [index], "error": [error]}


def spread(
    prepare: Callable[[], Work],
    items: Sequence[Item],
    workers: int,
    *,
    accelerator: bool = False,
    progress: Callable[[int], None] = lambda units: None,
) -> None:
    """Do the units of ``items`` on ``workers`` actors of the cluster that RAY_ADDRESS names, or of
    one that is started on this machine and lives until the program ends.

    ``prepare`` is called in each actor and gives what does a unit; it must be such as can be
    pickled. ``accelerator``: each actor takes one, where the cluster has any. ``progress`` is told
    of each finished unit.
    Raises: ``RunError`` for the first unit that fails, and when actors are lost again and again;
    what is finished is kept.
    """
    if not items:
        return
    import ray
    import ray.exceptions

    _start(workers)
    try:
        for row in _rows(prepare, items, workers, accelerator):
            if row["error"]:
                raise RunError(row["error"])
            progress(1)
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(
            f"Ray gave up: {reason}. What is finished is kept; the same command goes on from there."
        ) from error


def _start(workers: int) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine, without its page and
    without reports to anybody."""
    import logging

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else lines of its own on the terminal
    os.environ.setdefault("RAY_worker_niceness", "0")  # as fast as any other engine
    import ray

    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        return
    ray.init(
        num_cpus=workers + 1,
        include_dashboard=False,
        object_store_memory=STORE,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _rows(
    prepare: Callable[[], Work], items: Sequence[Item], workers: int, accelerator: bool
) -> Iterator[dict[str, str]]:
    """What the actors say of each unit, as it comes."""
    import logging

    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    numbers = [{"index": item.index} for item in items]
    data = ray.data.from_items(numbers, override_num_blocks=len(numbers)).map_batches(
        Actor,
        batch_size=1,
        concurrency=workers,
        fn_constructor_args=(prepare, items),
        num_cpus=1,
        num_gpus=1 if accelerator and ray.cluster_resources().get("GPU") else 0,
        max_restarts=-1,
        max_task_retries=TRIES,
    )
    yield from data.iter_rows()
