"""What ``align`` was given, read and checked before anything is loaded or run."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real

from torch import Tensor

from diffalign.alignment.order import AnyReward, reward_of
from diffalign.core.budget import Budget, read_budget
from diffalign.core.registry import KERNELS, parse
from diffalign.core.reward import Reward
from diffalign.core.technique import Technique
from diffalign.core.types import Pipeline
from diffalign.seams.guiders_in import as_technique
from diffalign.seams.swap import original_class
from diffalign.seams.trajectory.call import COPIES, check_names, names_of
from diffalign.seams.trajectory.kernels import Kernel
from diffalign.search.video.choice import expander_class, extends

AnyKernel = Kernel | str

# arguments of the pipeline that a run sets -> what to give in their place
SET: Mapping[str, str] = {
    "generator": "pass an integer as seed= instead",
    "latents": "noises follow from seed= and the method",
    "output_type": "the result has image, frames and tensor",
    "return_dict": "the result is the same for all pipelines",
}

# arguments that count something
WHOLE = ("num_inference_steps", "num_frames", "chunks", "overlap", "height", "width")


def budget_of(budget: Budget | str | None) -> Budget | None:
    """A budget, or the one of a text such as ``"nfe=400"``."""
    if isinstance(budget, str):
        try:
            return read_budget(budget)
        except ValueError as error:
            raise ValueError(f"align(budget={budget!r}): {error}") from error
    if budget is not None and not isinstance(budget, Budget):
        raise TypeError(
            "align(budget=...) takes a budget like da.Budget(nfe=400) or its text, like 'nfe=400'; "
            f"got {budget!r}."
        )
    return budget


def kernel_of(kernel: AnyKernel | None) -> Kernel | None:
    """A kernel, or the one of that text."""
    names = f"or a name: {', '.join(KERNELS.names())}"
    if isinstance(kernel, str):
        kernels: tuple[Kernel, ...] = KERNELS.make(kernel)
        if len(kernels) != 1:
            raise ValueError(f"align(kernel={kernel!r}) must name one kernel; got {len(kernels)}.")
        return kernels[0]
    if isinstance(kernel, type):
        raise TypeError(
            f"align(kernel=...) takes an object, {names}; got the class {kernel.__name__}. Write "
            f"da.{kernel.__name__}()."
        )
    if kernel is not None and not callable(getattr(kernel, "coefficients", None)):
        raise TypeError(f"align(kernel=...) takes a kernel like da.Eta(), {names}; got {kernel!r}.")
    return kernel


def techniques_of(techniques: Technique | str | Sequence[Technique | str]) -> tuple[Technique, ...]:
    """Techniques, or those of texts; one alone is a sequence of one."""
    items = techniques if isinstance(techniques, list | tuple) else (techniques,)
    read: list[Technique] = []
    for item in items:
        read += parse(item) if isinstance(item, str) else (as_technique(item),)
    for technique in read:
        if not isinstance(technique, Technique):
            raise TypeError(
                "align(techniques=...) takes techniques like da.CFG(5.0) or their names; got "
                f"{technique!r}. `diffalign techniques` lists them."
            )
    return tuple(read)


def rewards_of(name: str, rewards: AnyReward | Iterable[AnyReward]) -> tuple[Reward, ...]:
    """Rewards, or those of texts; one alone is a sequence of one."""
    if isinstance(rewards, str) or callable(rewards):
        return (reward_of(rewards),)
    if not isinstance(rewards, Iterable):
        raise TypeError(f"align({name}=...) takes names or rewards; got {rewards!r}.")
    return tuple(map(reward_of, rewards))


def prompts_of(prompt: str | Sequence[str]) -> list[str]:
    """The prompts, one or several."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    several = isinstance(texts, Sequence) and len(texts) > 0
    if not several or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"align(prompt=...) takes a text, or a list of at least one text; got {prompt!r}."
        )
    return list(texts)


def seed_in(seed: int) -> int:
    """An integer. Raises: TypeError for anything else."""
    try:
        return operator.index(seed)
    except TypeError:
        raise TypeError(f"align(seed=...) must be an integer; got {seed!r}.") from None


def check_run(
    batch: int | None, folder: str | os.PathLike[str] | None, **functions: object
) -> None:
    """Raise for a batch, a folder or functions that cannot be used."""
    if batch is not None and not _counts(batch):
        raise ValueError(
            f"align(batch=...) must be an integer of at least 1, or None; got {batch!r}."
        )
    if folder is not None and not isinstance(folder, str | os.PathLike):
        raise TypeError(f"align(folder=...) takes the path of a folder, or None; got {folder!r}.")
    if folder == "":
        raise ValueError(
            "align(folder=...) is empty; name a folder ('.' is the working directory), or leave "
            "it out."
        )
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"align({name}=...) takes a function, or None; got {function!r}.")


def check_call(pipe: Pipeline, call: Mapping[str, object], known: Iterable[str]) -> None:
    """Raise for arguments of the pipeline that it does not have, that a run sets, or that are no
    numbers. ``known``: names of ``align`` itself."""
    cls = original_class(pipe)
    check_names(f"align(...) and {cls.__name__}", _names(cls), call, known)
    for name, value in call.items():
        if name in SET and value is not None:
            raise ValueError(f"align({name}=...) is set by the sampler; {SET[name]}.")
        if name in COPIES and value is not None and value != 1:
            raise ValueError(
                f"align({name}={value!r}) makes no more images: a search makes as many as its "
                "budget=... or method lets it, and result.top holds the best. Leave it out; for "
                "results of their own give a list of prompts."
            )
        if name in WHOLE and value is not None and not _counts(value):
            raise ValueError(f"align({name}=...) must be an integer of at least 1; got {value!r}.")
        if not _finite(name, value):
            raise ValueError(f"align({name}=...) must be a finite number; got {value!r}.")


def _names(cls: type) -> set[str]:
    """Named arguments of a pipeline's call, and of the chunks of a video."""
    chunks = (expander_class(cls).__init__,) if extends(cls) else ()
    return names_of(cls, *chunks) - {"pipe"} | {"clip"}


def _counts(value: object) -> bool:
    """Whether it is an integer of at least 1."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _finite(name: str, value: object) -> bool:
    """False for infinities and NaN, and for a guidance scale that is a text."""
    if isinstance(value, Real):
        return math.isfinite(value)
    if not name.endswith(("guidance_scale", "cfg_scale")):
        return True
    return bool(value.isfinite().all()) if isinstance(value, Tensor) else not isinstance(value, str)
