"""The models of the page: those of a list and no others, opened when they are first wanted."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from diffalign.core.technique import Technique
from diffalign.core.types import Keywords
from diffalign.embedded.load import MODELS, load, pipelines
from diffalign.generate import schedulers
from diffalign.generate.models import Blueprint, Model, Setting, open_model
from diffalign.generate.verdicts import Detector
from diffalign.rewards import available
from diffalign.rewards.base import REWARDS
from diffalign.seams import SupportTable, apply, supports
from diffalign.seams.plan import context_of, resolve

USUAL = "emoji"
"""The model that the page starts with."""


def models_in(entry: str) -> tuple[str, ...]:
    """The models that one ``--allow`` adds: a hub id, a model's folder, or the models in a folder.

    Raises: ValueError for what is neither.
    """
    folder = Path(entry).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or entry.count("/") != 1:
            raise ValueError(f"--allow {entry!r} is no folder here and no hub id like owner/name.")
        return (entry,)
    if (folder / "model_index.json").is_file():
        return (str(folder),)
    inside = sorted(path.parent for path in folder.glob("*/model_index.json"))
    if not inside:
        raise ValueError(
            f"--allow {entry!r} holds no model; a model is a folder with a model_index.json."
        )
    return tuple(map(str, inside))


class Open:
    """A loaded model, and what the page needs to know of it."""

    def __init__(self, name: str) -> None:
        self.model = open_model(name, media="videos")
        self.blueprint = Blueprint.named(name, "videos")

    @property
    def name(self) -> str:
        """As the list has it."""
        return self.model.name

    @cached_property
    def judge(self) -> Detector | None:
        """The judge that ships with an embedded model, None for others."""
        name = MODELS[self.name].judge if self.model.kind == "embedded" else ""
        judge: Detector | None = load(name) if name else None
        return judge

    @cached_property
    def supports(self) -> SupportTable:
        """Every technique: does it work here, and why not."""
        return supports(self.model.pipe)

    def works(self, names: Sequence[str]) -> list[str]:
        """Those of ``names`` that work on this model."""
        usable = {support.name for support in self.supports if support.works}
        return [name for name in names if name in usable]

    def resolved(self, classes: Mapping[str, type[Technique]]) -> dict[str, Technique]:
        """Techniques with the options that they have on this model by default; those that have none
        are left out."""
        known = {}
        for name in self.works(list(classes)):
            context = context_of(self.model.pipe, self.blueprint.family)
            try:
                known[name] = resolve(classes[name](), context, {})
            except (ValueError, LookupError):
                continue
        return known

    def setting(self, steps: int, scale: float, negative: str = "") -> Model:
        """The model for runs with these settings.

        Raises: ValueError for what it cannot do.
        """
        schedulers.check_steps(self.model.pipe.scheduler, steps)
        setting = Setting(steps=steps, scale=scale, negative_prompt=negative or None)
        self.blueprint.check(setting, ())
        call = self.blueprint.call(setting, steps, scale)
        facts = {
            **self.model.facts,
            "steps": steps,
            "scale": self.blueprint.scale(scale),
            "negative_prompt": negative or None,
        }
        scale = self.blueprint.scale(scale)
        return replace(self.model, steps=steps, scale=scale, call=call, facts=facts)

    def check(self, techniques: Sequence[Technique], call: Keywords) -> None:
        """Raise ValueError for techniques that conflict, or that cannot act on this model."""
        apply(self.model.pipe, *techniques)
        for technique in techniques:
            self.blueprint.check_technique(self.model.pipe, technique, call)


def rewards_here() -> tuple[str, ...]:
    """The rewards that need no files from elsewhere."""
    shipped = [r.name for r in available() if r.facts and r.facts.source == "in the package"]
    return (*shipped, "brightness", "redness", "jpeg-size")


class Shelf:
    """The models and rewards that the page may use. ``allow``: models beside the embedded ones;
    ``rewards``: beside those that ship; ``most``: models that stay loaded."""

    def __init__(
        self, allow: Sequence[str] = (), rewards: Sequence[str] = (), most: int = 3
    ) -> None:
        for name in rewards:
            REWARDS.get(name.partition(":")[0])
        self.rewards = tuple(dict.fromkeys((*rewards_here(), *rewards)))
        others = [name for entry in allow for name in models_in(entry)]
        self.names = tuple(dict.fromkeys((*pipelines(), *others)))
        self.most = most
        self._open: OrderedDict[str, Open] = OrderedDict()
        self._lock = threading.Lock()

    def offered(self, *, videos: bool) -> list[str]:
        """The names of a tab; one of images leaves out what is known to make videos."""
        hidden = {name for name, entry in MODELS.items() if entry.videos and not videos}
        return [name for name in self.names if name not in hidden]

    def images(self, name: str) -> Open:
        """The model of that name, loaded, which makes images. Raises: ValueError for others."""
        opened = self.open(name)
        if opened.model.videos:
            raise ValueError(f"{name} makes videos; use the tab Align.")
        return opened

    def open(self, name: str) -> Open:
        """The model of that name, loaded.

        Raises: ValueError for a name that is not on the list, and for one that cannot be used.
        """
        if name not in self.names:
            raise ValueError(
                f"{str(name)[:100]!r} is not on the list of this page, which has "
                f"{', '.join(self.names)}. Whoever runs the page can add a model: diffalign app "
                "--allow FOLDER or --allow owner/name."
            )
        with self._lock:
            if name not in self._open:
                self._open[name] = Open(name)
            self._open.move_to_end(name)
            while len(self._open) > self.most:
                self._open.popitem(last=False)
            return self._open[name]
