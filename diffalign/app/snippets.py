"""What is on the screen, as Python and as a command line; both run as they stand."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from importlib import import_module

from diffalign import __version__
from diffalign.core.option import options_of
from diffalign.core.registry import METHODS, TECHNIQUES, written
from diffalign.core.search import Method
from diffalign.core.seeds import seed_of
from diffalign.core.technique import Technique
from diffalign.generate.models import Model


def command(*words: object, **options: object) -> str:
    """A command of ours: ``steps=4`` is --steps 4, a list repeats its option, None is left out."""
    parts = ["diffalign", *map(str, words)]
    for name, value in options.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            if item is not None:
                parts += [f"--{name.replace('_', '-')}", str(item)]
    return shlex.join(parts)


def commands(*lines: str) -> str:
    """Several commands, one a line, long ones broken before their options."""
    return "\n".join(
        line.replace(" --", " \\\n    --") if len(line) > 90 else line for line in lines
    )


def text_of(technique: Technique) -> str:
    """A technique as the command line takes it. Raises: ValueError where it has no text."""
    return written(TECHNIQUES, technique)


def method_text(method: Method[object]) -> str:
    """A method as the command line takes it. Raises: ValueError where it has no text."""
    return written(METHODS, method)


def texts_of(techniques: Sequence[Technique]) -> str:
    """A group of techniques as the command line takes it."""
    return "+".join(map(text_of, techniques))


def python_of(item: Technique | Method[object]) -> str:
    """A technique or method as Python, with the options that are not the usual ones; by its name
    where it is no part of this package."""
    cls = type(item)
    if getattr(import_module("diffalign"), cls.__name__, None) is not cls:
        if isinstance(item, Method):
            return f"da.core.registry.METHODS.make({method_text(item)!r})[0]"
        return f"da.core.registry.parse({text_of(item)!r})[0]"
    options = [
        f"{name}={literal(getattr(item, name))}"
        for name, spec in options_of(cls).items()
        if getattr(item, name) != spec.default
    ]
    return f"da.{cls.__name__}({', '.join(options)})"


def literal(value: object) -> str:
    """A value as Python reads it back."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, tuple):
        inside = ", ".join(map(literal, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return repr(value)


def loading(model: Model) -> str:
    """Python that loads the model."""
    if model.kind == "embedded":
        return f"pipe = da.load({model.name!r})"
    dtype = str(model.pipe.dtype)
    return (
        "import torch\nfrom diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({model.name!r}, dtype={dtype})\n"
        f'pipe.to("{model.pipe.device}")'
    )


def arguments(call: Mapping[str, object]) -> str:
    """Arguments of a call."""
    return "".join(f", {name}={literal(value)}" for name, value in call.items())


def runs(
    model: Model, prompt: str, seed: int, variants: Sequence[tuple[Sequence[Technique], Model]]
) -> str:
    """Python that draws variants, techniques and how the model is called, on the same noise."""
    number = seed_of(prompt, 0, base=seed)
    blocks = [
        f"# diffalign {__version__}",
        "import torch\n\nimport diffalign as da",
        loading(model),
    ]
    blocks.append(f"prompt = {prompt!r}\nseed = {number}  # from the page's seed {seed}")
    for place, (techniques, setting) in enumerate(variants):
        tools = "".join(f", {python_of(technique)}" for technique in techniques)
        blocks.append(
            f"with da.apply(pipe{tools}) as session:\n"
            "    noise = torch.Generator().manual_seed(seed)\n"
            f"    image = pipe(prompt, generator=noise{arguments(setting.call)}).images[0]\n"
            f'image.save("column-{place}.png")\n'
            "print(session.report())"
        )
    return "\n\n".join(blocks) + "\n"


def search(
    model: Model,
    prompt: str,
    seed: int,
    method: Method[object],
    reward: str,
    kernel: str | None,
    nfe: int,
    techniques: Sequence[Technique],
) -> str:
    """Python of a search."""
    tools = "".join(f"{python_of(technique)}, " for technique in techniques)
    lines = [
        f"# diffalign {__version__}\nimport diffalign as da\n",
        loading(model),
        "result = da.align(",
        "    pipe,",
        f"    {prompt!r},",
        f"    method={python_of(method)},",
        f"    reward={reward!r},",
        f"    budget=da.Budget(nfe={nfe}),",
    ]
    lines += [f"    techniques=({tools}),"] if tools else []
    lines += [f"    kernel={kernel!r},"] if kernel else []
    lines += [f"    seed={seed},"]
    lines += [f"    {name}={literal(value)}," for name, value in model.call.items()]
    return "\n".join([*lines, ")", "print(result)", 'result.save("aligned")']) + "\n"
