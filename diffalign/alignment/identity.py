"""What a run is: its settings, and what else its folder must be able to tell from other runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import Module

from diffalign.alignment.problem import PipelineProblem
from diffalign.alignment.scoring import name_of
from diffalign.core.errors import UnsupportedModel
from diffalign.core.identity import model_hash
from diffalign.core.registry import METHODS, to_config
from diffalign.core.reward import Reward
from diffalign.core.search import Method
from diffalign.core.types import Json, Pipeline
from diffalign.core.values import plain
from diffalign.rewards.weighted import Weighted
from diffalign.seams.swap import original_class


def settings_of(method: Method[object], problem: PipelineProblem, reward: Reward) -> Json:
    """What results and their images say of the run."""
    from diffalign import __version__

    setting = problem.setting
    return {
        "diffalign": __version__,
        "prompt": problem.prompt,
        "base_seed": problem.seed,
        "method": METHODS.to_config(method),
        "reward": name_of(reward),
        "techniques": [to_config(technique) for technique in setting.techniques],
        "kernel": None if setting.kernel is None else repr(setting.kernel),
        "pipeline": original_class(setting.pipe).__name__,
        "scheduler": original_class(setting.pipe.scheduler).__name__,
        "call": plain(_readable(setting.call)),
    } | ({} if setting.clip is None else {"clip": _digest(setting.clip)})


def marks_of(pipe: Pipeline, reward: Reward, ties: Sequence[Reward]) -> Json:
    """What else must be the same to continue a run: weights, adapters, scheduler and functions.

    Cost: a few bytes of each tensor of the pipeline.
    """
    parts = {
        name: part
        for name, part in sorted(getattr(pipe, "components", {}).items())
        if isinstance(part, Module)
    }
    config = dict(getattr(pipe.scheduler, "config", {}))
    return {
        "weights": {name: _weights(part) for name, part in parts.items()},
        "adapters": {name: _adapters(part) for name, part in parts.items()},
        "scheduler_config": plain({k: v for k, v in config.items() if not k.startswith("_")}),
        "functions": [_place(r) for r in (reward, *ties)],
    }


def _weights(part: Module) -> str:
    dtype = getattr(part, "dtype", None)
    try:
        return f"{model_hash(part)} {dtype}"
    except UnsupportedModel:  # the weights are offloaded
        return f"{type(part).__name__} {dtype}"


def _adapters(part: Any) -> list[list[object]]:
    """Each active adapter with each of its scales."""
    found = {
        (str(adapter), float(layer.scaling.get(adapter, 1.0)))
        for layer in part.modules()
        if hasattr(layer, "lora_B") and not getattr(layer, "disable_adapters", False)
        for adapter in getattr(layer, "active_adapters", ())
        if adapter in layer.lora_B
    }
    return [list(pair) for pair in sorted(found)]


def _place(reward: Reward) -> object:
    """What tells a function from others; of other rewards their name, of a sum its parts."""
    if isinstance(reward, Weighted):
        return [[weight, _place(getattr(part, "reward", part))] for weight, part in reward.parts]
    if not isinstance(reward, FunctionType):
        return name_of(reward)
    code = reward.__code__
    # the module is left out: a script is another one when it is imported
    plain_values = (
        value for value in code.co_consts if isinstance(value, int | float | str | tuple)
    )
    constants = [value for value in plain_values if value != reward.__doc__]
    digest = hashlib.sha256(code.co_code + repr((code.co_names, constants)).encode())
    return f"{reward.__qualname__} {digest.hexdigest()[:16]}"


def _digest(tensor: Tensor) -> str:
    """What tells a tensor from others."""
    values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    shape = str(list(values.shape)).encode()
    return hashlib.sha256(shape + values.tobytes()).hexdigest()[:16]


def _readable(value: object) -> object:
    """A value of the call as JSON data: of tensors and pictures a digest, of objects their type."""
    if isinstance(value, Mapping):
        return {str(name): _readable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(item) for item in value]
    if isinstance(value, Tensor):
        return f"Tensor {_digest(value)}"
    if isinstance(value, Image.Image):
        return f"Image {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    return value if isinstance(value, str | int | float | None) else type(value).__name__
