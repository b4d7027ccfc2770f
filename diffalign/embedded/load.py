"""Load the models that ship with the package by name; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.core.errors import nearest
from diffalign.core.types import Json, Pipeline

if TYPE_CHECKING:
    from diffalign.embedded.nets.audit import AuditJudge
    from diffalign.embedded.nets.clip import Clip
    from diffalign.embedded.nets.evaluator import EvaluatorNet
    from diffalign.embedded.nets.judge import Judge

__all__ = ["MODELS", "Available", "available", "load"]

FOLDER = Path(__file__).parent / "models"
INDEX = "model_index.json"


@contextmanager
def quiet() -> Iterator[None]:
    """No bars for a few megabytes, and no warning of what is meant: a field that AutoencoderTiny
    itself writes, an autoencoder that is no AutoencoderKL."""
    import diffusers
    import transformers

    tools = [module.utils.logging for module in (diffusers, transformers)]
    before = [(tool, tool.get_verbosity(), tool.is_progress_bar_enabled()) for tool in tools]
    try:
        for tool in tools:
            tool.set_verbosity_error()
            tool.disable_progress_bar()
        yield
    finally:
        for tool, level, bars in before:
            tool.set_verbosity(level)
            if bars:
                tool.enable_progress_bar()


def pipeline_in(folder: Path) -> Pipeline:
    """The pipeline of a folder in fp32 on the CPU, of the class that its index names. The global
    generator stays as it was, though AnyFlow-FAR's denoiser draws from it when it is made."""
    import torch
    from diffusers import DiffusionPipeline

    with quiet(), torch.random.fork_rng(devices=[]):
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _turbo(folder: Path) -> Pipeline:
    from diffalign.embedded.adapter import adapted

    return adapted(load(MODELS["emoji-turbo"].base), folder)


def _judge(folder: Path) -> Judge:
    from diffalign.embedded.nets.judge import load_judge

    return load_judge(folder)


def _audit(folder: Path) -> AuditJudge:
    from diffalign.embedded.nets.audit import load_audit

    return load_audit(folder)


def _clip(folder: Path) -> Clip:
    from diffalign.embedded.nets.clip import load_clip

    return load_clip(folder)


def _evaluator(folder: Path) -> EvaluatorNet:
    from diffalign.embedded.nets.evaluator import load_evaluator

    return load_evaluator(folder)


@dataclass(frozen=True)
class Entry:
    """One embedded model, installed or not."""

    # below ``models/``
    folder: str
    # what it is, in one line
    description: str
    # from the folder's path to the loaded model
    loader: Callable[[Path], object]
    # of a pipeline: steps and guidance scale of a run that names none, and further arguments of a
    # call where those of its class are others
    defaults: Mapping[str, float] = field(default_factory=dict)
    # of a pipeline: the detector that judges its images
    judge: str = ""
    # of a pipeline: the reward for its images
    reward: str = ""
    # of an adapter: the embedded pipeline that it changes
    base: str = ""
    # whether a pipeline makes videos
    videos: bool = False


MODELS: dict[str, Entry] = {
    "emoji": Entry(
        "emoji",
        "text to 64 x 64 emoji scenes: StableDiffusionPipeline, 20 steps, v-prediction",
        pipeline_in,
        {"steps": 20, "scale": 3.0},
        "emoji-judge",
        "emoji-clip",
    ),
    "emoji-turbo": Entry(
        "emoji-turbo",
        "emoji in one to four steps without guidance, an adapter of its denoiser",
        _turbo,
        {"steps": 4, "scale": 1.0},
        "emoji-judge",
        "emoji-clip",
        base="emoji",
    ),
    "emoji-dit": Entry(
        "emoji-dit",
        "text to 128 x 128 emoji scenes: StableDiffusion3Pipeline, 20 steps, flow matching",
        pipeline_in,
        {"steps": 20, "scale": 2.5},
        "emoji-judge-2",
        "emoji-clip-2",
    ),
    "emoji-video": Entry(
        "emoji-video",
        "text to clips of 13 frames in four chunks, 64 x 64: AnyFlowFARPipeline, 6 steps a chunk",
        pipeline_in,
        {
            "steps": 6,
            "scale": 3.0,
            "height": 64,
            "width": 64,
            "num_frames": 13,
            "max_sequence_length": 24,
        },
        "emoji-judge",
        "emoji-clip",
        videos=True,
    ),
    "emoji-judge": Entry(
        "emoji-judge",
        "detector of the emoji world: class, score, box and colour of each object",
        _judge,
    ),
    "emoji-judge-2": Entry(
        "emoji-judge-2",
        "detector of the world's second edition, 128 x 128",
        _judge,
    ),
    "emoji-judge-audit": Entry(
        "emoji-judge-audit",
        "second detector, of another architecture, that checks the first one",
        _audit,
    ),
    "emoji-judge-audit-2": Entry(
        "emoji-judge-audit-2",
        "second detector of the world's second edition",
        _audit,
    ),
    "emoji-clip": Entry(
        "emoji-clip",
        "open_clip dual encoder of 64 x 64 scenes and captions, with its tokenizer",
        _clip,
    ),
    "emoji-clip-2": Entry(
        "emoji-clip-2",
        "the dual encoder of the world's second edition, 128 x 128",
        _clip,
    ),
    "emoji-evaluator": Entry(
        "emoji-evaluator",
        "noisy latents of emoji and a prompt to a score, for DynamicCFG",
        _evaluator,
    ),
}
"""Name -> entry. Further embedded models add their own line."""


@dataclass(frozen=True)
class Available:
    """One model on disk."""

    name: str
    description: str
    # size of its files
    bytes: int


def available() -> tuple[Available, ...]:
    """The embedded models whose files are installed, in the order of ``MODELS``."""
    models = []
    for name, entry in MODELS.items():
        files = [path for path in folder_of(name).rglob("*") if path.is_file()]
        if files:
            size = sum(path.stat().st_size for path in files)
            models.append(Available(name, entry.description, size))
    return tuple(models)


def folder_of(name: str) -> Path:
    """Where the files of an embedded model are, or would be."""
    return FOLDER / MODELS[name].folder


def pipelines(*, videos: bool = True) -> tuple[str, ...]:
    """The embedded pipelines that are installed; ``videos``: also those that make videos."""
    return tuple(
        name
        for name, entry in MODELS.items()
        if folder_of(name).is_dir()
        and (folder_of(entry.base or name) / INDEX).is_file()
        and (videos or not entry.videos)
    )


def judge_of(model: str) -> str:
    """The detector of an embedded pipeline's images, "" for other models."""
    return MODELS[model].judge if model in MODELS else ""


def reward_of(model: str) -> str:
    """The reward for an embedded pipeline's images, "" for other models."""
    return MODELS[model].reward if model in MODELS else ""


def index_of(name: str) -> Json:
    """The model index of an embedded pipeline; that of an adapter is its base's with its scheduler.

    Raises: OSError and ValueError for an index that cannot be read.
    """
    base = MODELS[name].base
    index: Json = json.loads((folder_of(base or name) / INDEX).read_text("utf-8"))
    if base:
        settings = folder_of(name) / "scheduler" / "scheduler_config.json"
        index["scheduler"] = ["diffusers", json.loads(settings.read_text("utf-8"))["_class_name"]]
    return index


def load(name: str) -> Any:
    """The embedded model in fp32 on the CPU; "emoji" is a plain ``StableDiffusionPipeline``.

    Raises ValueError for an unknown name, and for a known one whose files are not installed.
    """
    if name not in MODELS:
        raise ValueError(
            f"name: expected an embedded model, got {name!r}; nearest: {nearest(name, MODELS)}"
        )
    folder = folder_of(name)
    if not folder.is_dir():
        raise ValueError(
            f"name: the files of {name!r} are not installed (expected models/{folder.name}); "
            "reinstall diffalign"
        )
    return MODELS[name].loader(folder)
