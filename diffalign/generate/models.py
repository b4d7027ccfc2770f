"""Models by name: an embedded name, a folder or a hub id becomes a loaded pipeline that is checked
for the run it is to do.

The cheapest checks come first: the model index is read before any weights.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffalign.core.errors import UnsupportedModel, nearest
from diffalign.core.technique import Technique
from diffalign.core.types import Json, Keywords, Pipeline
from diffalign.families import Family, family_of
from diffalign.generate import schedulers
from diffalign.generate.errors import BadOption
from diffalign.search.video.choice import extends

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
Media = Literal["images", "videos", "continued videos"]
"""Images only, videos too, or also videos of pipelines that need a clip to begin with."""
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a model is to be run; None takes the model's own value."""

    steps: int | None = None
    # guidance scale, 1 is off
    scale: float | None = None
    # one text for all images
    negative_prompt: str | None = None
    # height and width in pixels
    size: tuple[int, int] | None = None
    # short name, see ``schedulers.NAMES``
    scheduler: str | None = None
    # one of ``DTYPES``; None is fp32 on a CPU and bf16 elsewhere
    dtype: str | None = None
    # "auto" is the first accelerator, else the CPU
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded pipeline and how it is run."""

    name: str
    kind: Literal["embedded", "folder", "hub"]
    pipe: Pipeline
    steps: int
    # guidance scale in effect, 1 where nothing guides
    scale: float
    # arguments of the pipeline that all images share
    call: Keywords
    # what saved images say of the run, besides what the pipeline says itself
    facts: Json

    @property
    def scheduler(self) -> str:
        """Class name of the scheduler."""
        return type(self.pipe.scheduler).__name__

    @property
    def videos(self) -> bool:
        """Whether it makes videos."""
        return "num_frames" in inspect.signature(type(self.pipe).__call__).parameters

    @property
    def size(self) -> dict[str, int]:
        """Height and width as the call names them, empty for the model's own."""
        return {name: self.call[name] for name in ("height", "width") if name in self.call}


def open_model(
    name: str,
    setting: Setting = Setting(),
    variants: Sequence[Sequence[Technique]] = (),
    media: Media = "images",
) -> Model:
    """The model ``name`` for a run with ``setting``; ``variants``: groups of techniques that it is
    to run with, one group after another. ``media``: what it may make and go on from.

    Raises: ValueError when something cannot be used; ``BadOption`` when it is one of the setting.
    """
    blueprint = Blueprint.named(name, media)
    blueprint.check(setting, variants)
    scheduler = blueprint.scheduler
    if setting.scheduler is not None:
        scheduler = schedulers.class_name(setting.scheduler, blueprint.scheduler)
    device, dtype = place(setting.device, setting.dtype)
    steps = setting.steps or int(blueprint.default("steps", "num_inference_steps"))
    scale = blueprint.defaults.get("scale") if setting.scale is None else setting.scale
    pipe = blueprint.load(dtype, device)
    schedulers.replace(pipe, scheduler)
    schedulers.check_steps(pipe.scheduler, steps)
    factor = int(getattr(pipe, "vae_scale_factor", 1))
    if setting.size is not None and any(side % factor for side in setting.size):
        height, width = setting.size
        raise BadOption(
            "size", f"must be a multiple of {factor} for this model; got {width}x{height}."
        )
    call = blueprint.call(setting, steps, scale)
    for technique in (technique for group in variants for technique in group):
        blueprint.check_technique(pipe, technique, call)
    facts = {
        "model": name,
        "negative_prompt": setting.negative_prompt,
        "steps": steps,
        "scale": blueprint.scale(scale),
        "size": list(setting.size) if setting.size else None,
    }
    return Model(name, blueprint.kind, pipe, steps, blueprint.scale(scale), call, facts)


def family_for(cls: type, media: Media) -> Family:
    """The family of a pipeline class; one that only extends videos has a plain one.

    Raises: ``UnsupportedModel`` for what cannot be used.
    """
    try:
        return family_of(cls)
    except UnsupportedModel:
        if media == "images" or not extends(cls):
            raise
        return Family(cls.__name__)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A pipeline that is known and not loaded."""

    name: str
    kind: Literal["embedded", "folder", "hub"]
    # folder or hub id
    source: str
    cls: type
    family: Family
    # class name
    scheduler: str
    # steps and scale of an embedded model, and further arguments where the pipeline's are others
    defaults: dict[str, float]

    @classmethod
    def named(cls, name: str, media: Media = "images") -> Blueprint:
        """The model behind a name.

        Raises ValueError when it is unknown, refused, or makes something else from prompts.
        """
        import diffusers

        from diffalign.embedded.load import MODELS

        kind, source, index = _index(name)
        class_name = index.get("_class_name")
        pipeline = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
        if not isinstance(pipeline, type):
            raise ValueError(
                f"{name}: the pipeline class {class_name!r} is not part of diffusers "
                f"{diffusers.__version__}; use it from Python."
            )
        family = family_for(pipeline, media)
        scheduler = str((index.get("scheduler") or ("", ""))[1])
        defaults = dict(MODELS[name].defaults) if kind == "embedded" else {}
        blueprint = cls(name, kind, source, pipeline, family, scheduler, defaults)
        blueprint._check_inputs(media)
        return blueprint

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The arguments of the pipeline's call."""
        return dict(inspect.signature(self.cls.__call__).parameters)  # type: ignore[operator]

    def _check_inputs(self, media: Media) -> None:
        """Raise ValueError unless prompts, and a clip where there is one, are all it takes."""
        use = "Use diffalign.apply(pipe, ...) in Python."
        parameters = self.parameters
        videos = media != "images" and "num_frames" in parameters
        clip = ("image", "video") if media == "continued videos" else ()
        known = () if videos else ("image", "control_image", "video")
        inputs: list[str] = [name for name in known if name in parameters]
        inputs += [
            name
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            and name not in ("self", "prompt", *inputs, *clip)
        ]
        if "num_frames" in parameters and not videos:
            raise ValueError(
                f"{self.cls.__name__} makes videos, and only images are made here. {use}"
            )
        if "prompt" not in parameters or inputs:
            what = ", ".join(inputs) or "no prompt"
            raise ValueError(
                f"{self.cls.__name__} takes {what}; only prompts are given here. {use}"
            )

    def check(self, setting: Setting, variants: Sequence[Sequence[Technique]]) -> None:
        """What can be said before weights are read: conflicts of techniques, missing arguments."""
        from diffalign.seams import apply

        for group in variants:  # an object without components is enough to see these
            apply(object.__new__(self.cls), *group)
        for option, value, argument in (
            ("negative_prompt", setting.negative_prompt, "negative_prompt"),
            ("size", setting.size, "height"),
        ):
            if value is not None and argument not in self.parameters:
                raise BadOption(
                    option, f"{self.cls.__name__} takes no {argument}; leave the option out."
                )

    def default(self, option: str, argument: str) -> Any:
        """The model's own value of an option, which the pipeline calls ``argument``."""
        return self.defaults.get(option) or self.parameters[argument].default

    def scale(self, scale: float | None) -> float:
        """The guidance scale in effect when the user asks for ``scale``; 1 is off."""
        default = self.parameters[self.family.gates[0]].default
        return self.family.scale(default if scale is None else self.family.native(scale))

    def call(self, setting: Setting, steps: int, scale: float | None) -> Keywords:
        """The arguments of the pipeline that all images share."""
        arguments: Keywords = {"num_inference_steps": steps}
        if scale is not None:
            arguments[self.family.gates[0]] = self.family.native(scale)
        if setting.negative_prompt is not None:
            arguments["negative_prompt"] = setting.negative_prompt
        elif self.family.needs_negative and self.scale(scale) != 1.0:
            arguments["negative_prompt"] = ""
        usual = self.defaults.items()
        arguments |= {key: int(value) for key, value in usual if key not in ("steps", "scale")}
        if setting.size is not None:
            arguments["height"], arguments["width"] = setting.size
        return arguments

    def load(self, dtype: str, device: str) -> Pipeline:
        """The pipeline, its own progress bar off. ``dtype``: name of a torch dtype."""
        import diffusers
        import torch
        import transformers

        from diffalign.embedded import load

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        try:
            if self.kind == "embedded":
                pipe = load(self.name)  # float32 on the CPU
                if dtype != "float32":
                    pipe.to(getattr(torch, dtype))
            else:
                pipe = diffusers.DiffusionPipeline.from_pretrained(
                    self.source,
                    dtype=getattr(torch, dtype),
                    local_files_only=self.kind == "folder",
                )
        except OSError as error:
            raise ValueError(f"{self.name}: {error}") from error
        pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def check_technique(self, pipe: Pipeline, technique: Technique, call: Keywords) -> None:
        """Refuse what would fail in the first generation: an unguidable model, a scheduler or
        option that the technique cannot work with."""
        from diffalign.seams.plan import bind, context_of
        from diffalign.seams.support import reason_against

        context = context_of(pipe, self.family, call=bind(self.cls, pipe, (), call))
        reason = reason_against(technique, context)
        if reason:
            raise ValueError(f"{type(technique).__name__} on {self.name}: {reason}")


def place(device: str, dtype: str | None) -> tuple[str, str]:
    """Device and torch dtype by name."""
    import torch

    best = (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )
    name = best if device == "auto" else device
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise BadOption(
            "device", f"{device!r} cannot be used here; {best!r} can. ({error})"
        ) from error
    short = dtype or ("fp32" if name == "cpu" else "bf16")
    if short not in DTYPES:
        raise BadOption("dtype", f"must be one of {', '.join(DTYPES)}; got {dtype!r}.")
    return name, DTYPES[short]


def _index(name: str) -> tuple[Literal["embedded", "folder", "hub"], str, Json]:
    """Kind, source and model index of ``name``; touches the network for a hub id only."""
    from diffalign.embedded.load import MODELS, folder_of, pipelines

    if name in MODELS:
        folder = folder_of(name)
        if not folder.is_dir():
            raise ValueError(
                f"the embedded model {name!r} is not installed; `diffalign models` lists what is."
            )
        if name not in pipelines():
            raise ValueError(
                f"{name!r} does not make images; a model is "
                f"{', '.join(pipelines()) or 'a folder or a hub id'}."
            )
        return "embedded", str(folder), _read(folder, name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(
                f"the folder {name!r} has no model_index.json; a model is a folder that "
                "`save_pretrained` of a pipeline wrote."
            )
        return "folder", str(folder), _read(folder)
    if not HUB_ID.fullmatch(name):
        near = nearest(name, pipelines() or MODELS)
        raise ValueError(
            f"unknown model {name!r}: no embedded model and no folder. Nearest embedded names: "
            f"{near}. A hub id is owner/name."
        )
    return "hub", name, _hub_index(name)


def _read(folder: Path, embedded: str | None = None) -> Json:
    """The model index of a folder; ``embedded``: the name of the embedded model in it."""
    from diffalign.embedded.load import index_of

    try:
        if embedded is not None:
            return index_of(embedded)
        index: Json = json.loads((folder / "model_index.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the model index of {str(folder)!r} cannot be read: {error}") from error
    return index


def _hub_index(name: str) -> Json:
    """The model index of a hub id."""
    from diffusers import DiffusionPipeline

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # a line for every attempt to connect, else
    try:
        return dict(DiffusionPipeline.load_config(name))
    except Exception as error:  # the hub client has many: not found, gated, no network, bad answer
        why = (
            "the hub cannot be reached; check the network, or give a folder"
            if _offline(error)
            else " ".join(str(error).split())[:300]
        )
        raise ValueError(f"no folder {name!r}, and as a hub id it cannot be read: {why}") from error
    finally:
        logger.setLevel(level)


def _offline(error: BaseException | None) -> bool:
    """Whether a failed connection is behind an error of the hub client."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return any(
        isinstance(e, ConnectionError | socket.gaierror)
        or type(e).__name__ in ("ConnectError", "ConnectTimeout")
        for e in chain
    )
