"""``--model``: an embedded name, a folder or a hub id, judged by its ``model_index.json`` before
any weights are read."""

from __future__ import annotations

import inspect
import json
import logging
import re
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from diffalign.cli.problem import BadInput, checking, one_line
from diffalign.core.errors import nearest
from diffalign.core.registry import name_of
from diffalign.families import Family, family_of
from diffalign.seams.plan import context_of

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Model:
    """A pipeline that is known but not loaded.

    ``source``: folder or hub id; ``scheduler``: class name; ``row``: how to guide it.
    """

    name: str
    kind: Literal["embedded", "folder", "hub"]
    source: str
    cls: Any
    family: Family
    scheduler: str

    def parameters(self) -> dict[str, inspect.Parameter]:
        """The arguments of the pipeline's call."""
        return dict(inspect.signature(self.cls.__call__).parameters)

    def native(self, scale: float | None) -> float:
        """The value of the pipeline's own scale argument for ``scale``, None is its default;
        ``family.off`` for 1."""
        if scale is not None:
            return self.family.native(scale)
        default = self.parameters()[self.family.gates[0]].default
        return float(default) if isinstance(default, int | float) else self.family.off

    def scale(self, scale: float | None) -> float:
        """The guidance scale in effect when the user asks for ``scale``; 1 is off."""
        return self.family.scale(self.native(scale))


def _embedded() -> dict[str, Path]:
    """Every embedded name with its folder, installed or not."""
    from diffalign.embedded.load import FOLDER, MODELS

    return {name: FOLDER / entry.folder for name, entry in MODELS.items()}


def _pipelines(known: dict[str, Path]) -> list[str]:
    return [name for name, folder in known.items() if (folder / "model_index.json").is_file()]


def _index(name: str) -> tuple[Literal["embedded", "folder", "hub"], str, dict[str, Any]]:
    """Kind, source and model index of ``name``; touches the network for a hub id only."""
    known = _embedded()
    if name in known:
        if not known[name].is_dir():
            raise BadInput(
                f"the embedded model {name!r} is not installed; `diffalign models` lists what is."
            )
        if name not in _pipelines(known):
            raise BadInput(
                f"{name!r} does not make images; --model takes "
                f"{', '.join(_pipelines(known)) or 'a folder or a hub id'}."
            )
        return (
            "embedded",
            str(known[name]),
            json.loads((known[name] / "model_index.json").read_text(encoding="utf-8")),
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        path = folder / "model_index.json"
        if not path.is_file():
            raise BadInput(
                f"the folder {name!r} has no model_index.json; --model takes a folder that "
                "`save_pretrained` of a pipeline wrote."
            )
        with checking(OSError):
            return "folder", str(folder), json.loads(path.read_text(encoding="utf-8"))
    if not HUB_ID.fullmatch(name):
        near = nearest(name, _pipelines(known) or known)
        raise BadInput(
            f"unknown model {name!r}: no embedded model and no folder. Nearest embedded names: "
            f"{near}. A hub id is owner/name."
        )
    from diffusers import DiffusionPipeline

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # a line for every attempt to connect, else
    try:
        return "hub", name, dict(DiffusionPipeline.load_config(name))
    except Exception as error:  # the hub client has many: not found, gated, no network, bad answer
        why = (
            "the hub cannot be reached; check the network, or give a folder"
            if _offline(error)
            else one_line(error)[:300]
        )
        raise BadInput(f"no folder {name!r}, and as a hub id it cannot be read: {why}") from error
    finally:
        logger.setLevel(level)


def _offline(error: BaseException | None) -> bool:
    """Whether a failed connection is behind an error of the hub client."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    return any(
        isinstance(e, ConnectionError | socket.gaierror)
        or type(e).__name__ in ("ConnectError", "ConnectTimeout")
        for e in seen
    )


def find(name: str) -> Model:
    """The model behind ``--model``.

    Raises ``BadInput`` when it is unknown, refused, or not a text-to-image pipeline.
    """
    kind, source, index = _index(name)
    import diffusers

    class_name = index.get("_class_name")
    cls = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    if not isinstance(cls, type):
        raise BadInput(
            f"{name}: the pipeline class {class_name!r} is not part of diffusers "
            f"{diffusers.__version__}; use it from Python."
        )
    with checking():
        family = family_of(cls)
    model = Model(name, kind, source, cls, family, str((index.get("scheduler") or ("", ""))[1]))
    parameters = model.parameters()
    inputs = [n for n in parameters if n in ("image", "control_image", "video")]
    inputs += [
        n
        for n, p in parameters.items()
        if p.default is p.empty
        and p.kind is p.POSITIONAL_OR_KEYWORD
        and n not in ("self", "prompt")
    ]
    if "num_frames" in parameters:
        raise BadInput(
            f"{cls.__name__} makes videos; the command line makes images. Use "
            "diffalign.apply(pipe, ...) in Python."
        )
    if "prompt" not in parameters or inputs:
        what = ", ".join(inputs) or "no prompt"
        raise BadInput(
            f"{cls.__name__} takes {what}; the command line gives prompts only. Use "
            "diffalign.apply(pipe, ...) in Python."
        )
    return model


def load(model: Model, dtype: str, device: str) -> Any:
    """The pipeline, its own progress bar off. ``dtype``: name of a torch dtype."""
    import diffusers
    import torch
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if model.kind == "embedded":
        from diffalign.embedded import load as embedded

        with checking(OSError):
            pipe = embedded(model.name)  # float32 on the CPU
        if dtype != "float32":
            pipe.to(getattr(torch, dtype))
        if device != "cpu":
            pipe.to(device)
    else:
        local = model.kind == "folder"
        with checking(OSError):
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                model.source, dtype=getattr(torch, dtype), local_files_only=local
            )
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_technique(
    model: Model, pipe: Any, techniques: tuple[Any, ...], scale: float | None, steps: int
) -> None:
    """Refuse what would fail in the first generation: an unguidable model, a scheduler or option a
    technique cannot work with."""
    context = context_of(pipe, model.family)
    context = replace(
        context,
        steps=steps,
        scale=model.scale(scale),
        scale_source="pipeline default" if scale is None else "call",
    )
    for technique in techniques:
        reason = model.family.check(pipe) if technique.kind == "guidance" else None
        with checking():
            technique.resolve(context)
            reason = reason or context.refusal(name_of(technique), technique)
            if not reason and hasattr(technique, "refuses"):
                reason = technique.refuses(context)
        if reason:
            raise BadInput(f"{type(technique).__name__} on {model.name}: {reason}")
