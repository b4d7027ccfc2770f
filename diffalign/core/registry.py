"""Things by name: techniques, rewards, methods and more, for the command line, the page and saved
settings. Importing a class never needs it.

A name is that of an exported class in lower case with hyphens. Packages join by an entry point
group such as ``diffalign.techniques``, notebooks by ``register``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, cast

from diffalign.core.errors import nearest
from diffalign.core.option import REQUIRED, Option, options_of
from diffalign.core.search import Method
from diffalign.core.technique import Technique
from diffalign.core.types import Json
from diffalign.core.values import converted, plain, split, value_text

T = TypeVar("T")
Target = str | Callable[..., T]
"""A class or function, or where it lives as "module:name": imported when it is first asked for."""

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


# names whose capitals do not begin words
WRITTEN = {"ReNO": "reno"}


def kebab(name: str) -> str:
    """``"IntervalCFG"`` -> ``"interval-cfg"``."""
    return (
        WRITTEN.get(name)
        or re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()
    )


class Registry(Generic[T]):
    """Makers of ``T`` by name, and ``T`` as text, as JSON data and back.

    ``noun``: what it holds, for errors; ``advice``: a sentence that ends "unknown name" errors.
    ``rooms``: packages whose exports it takes where ``belongs`` says so. ``targets``: further
    names. ``unlisted``: names that saved settings may hold and no list shows. ``group``: of entry
    points.
    """

    def __init__(
        self,
        noun: str,
        group: str,
        *,
        rooms: Iterable[str] = (),
        targets: Mapping[str, Target[T]] | None = None,
        unlisted: Mapping[str, str] | None = None,
        belongs: Callable[[object], bool] = callable,
        needs: str = "a class or a function",
        advice: str = "",
    ) -> None:
        self.noun, self.group, self.rooms = noun, group, tuple(rooms)
        self.targets: dict[str, Target[T]] = dict(targets or {})
        self.unlisted = dict(unlisted or {})
        self.registered: dict[str, Target[T]] = {}
        self.belongs, self.needs, self.advice = belongs, needs, advice

    @cached_property
    def plugins(self) -> dict[str, str]:
        """What other packages bring, not imported yet; they may not take a name of ours."""
        entries = {entry.name: entry.value for entry in entry_points(group=self.group)}
        for name in sorted(entries.keys() & self._ours().keys()):
            raise ValueError(
                f"The plugin {entries[name]!r} registers the {self.noun} {name!r}, which is taken; "
                "it must choose another name."
            )
        return entries

    def _ours(self) -> dict[str, Target[T]]:
        exports: dict[str, Target[T]] = {}
        for room in self.rooms:
            module = import_module(room)
            for export in module.__all__:
                value = getattr(module, export)
                if self.belongs(value):
                    exports[kebab(export)] = value
        return exports | self.targets

    def _listed(self) -> dict[str, Target[T]]:
        return self._ours() | self.plugins | self.registered

    def register(self, name: str, target: Callable[..., T]) -> None:
        """Give a class of yours a name; a name that you gave before is given anew.

        Raises: ValueError for a name that is taken or not in lower case with hyphens, TypeError for
        a class of another kind.
        """
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(
                f"register(name=...) must be in lower case with hyphens, like 'my-{self.noun}'; "
                f"got {name!r}."
            )
        if not self.belongs(target):
            raise TypeError(f"register({name!r}, ...) takes {self.needs}; got {target!r}.")
        if name in self._ours() or name in self.plugins or name in self.unlisted:
            raise ValueError(f"The {self.noun} name {name!r} is taken; choose another.")
        self.registered[name] = target

    def names(self) -> tuple[str, ...]:
        """Every name, in alphabetical order."""
        return tuple(sorted(self._listed()))

    def all(self) -> dict[str, Callable[..., T]]:
        """Name -> class or function, in alphabetical order."""
        return {name: self.get(name) for name in self.names()}

    def get(self, name: str) -> Callable[..., T]:
        """The class or function of that name.

        Raises: ValueError with the nearest names where there is none.
        """
        listed = self._listed()
        target = listed.get(name) or self.unlisted.get(name)
        if target is None:
            near = nearest(name, listed)
            raise ValueError(
                f"Unknown {self.noun} {name!r}. Nearest: {near}. {self.advice}".rstrip()
            )
        return cast("Callable[..., T]", _imported(target) if isinstance(target, str) else target)

    def build(self, name: str, options: Mapping[str, object]) -> T:
        """One of them with these options, whose values are Python objects or texts.

        Raises: ValueError for unknown names, with the nearest ones, and for bad values.
        """
        cls = self.get(name)
        known = options_of(cls)
        values = {}
        for key, value in options.items():
            if key not in known:
                raise ValueError(f"{name} has no option {key!r}. Nearest: {nearest(key, known)}.")
            values[key] = converted(value, known[key].readable, f"{name}:{key}")
        for key, spec in known.items():
            if spec.default is REQUIRED and key not in values:
                raise ValueError(f"{name} needs {key}=...: {spec.meaning}.")
        return cls(**values)

    def make(self, text: str) -> tuple[T, ...]:
        """``"name:key=value,key=value+name2"`` -> two of them, in that order."""
        return tuple(self._part(part.strip(), text) for part in text.split("+"))

    def _part(self, part: str, text: str) -> T:
        name, _, rest = part.partition(":")
        if not name.strip():
            raise ValueError(
                f"{self.noun.capitalize()} {text!r} has an empty part; write name:key=value+name2. "
                f"{self.advice}".rstrip()
            )
        options: dict[str, str] = {}
        for item in filter(None, split(rest)):
            key, equals, value = item.partition("=")
            if not equals:
                raise ValueError(f"The {self.noun} option {item!r} in {text!r} is not key=value.")
            options[key.strip().replace("-", "_")] = value.strip()
        return self.build(name.strip().lower(), options)

    def name_of(self, item: object) -> str:
        """The name of an object's class, or its class name where it has none here."""
        cls = type(item)
        place = f"{cls.__module__}:{cls.__qualname__}"
        targets = {**self._listed(), **self.unlisted}
        names = (name for name, target in targets.items() if target is cls or target == place)
        return next(names, cls.__name__)

    def to_config(self, item: object) -> Json:
        """``item`` as JSON data, ``{"name": ..., options}``; ``from_config`` is the inverse."""
        options = options_of(type(item)).items()
        saved = {
            key: _saved(spec, getattr(item, key))
            for key, spec in options
            if spec.saved != "omitted"
        }
        return {"name": self.name_of(item), **saved}

    def from_config(self, config: Mapping[str, Any]) -> T:
        """What ``to_config`` wrote down."""
        options = {key: value for key, value in config.items() if key != "name"}
        return self.build(config["name"], options)


def written(registry: Registry[T], item: T) -> str:
    """``item`` as the registry's ``make`` reads it; options at their default are left out.

    Raises: ValueError for an option that has no text, such as a tensor or a function.
    """
    items, name = [], registry.name_of(item)
    for key, spec in options_of(type(item)).items():
        value = getattr(item, key)
        if value == spec.default:
            continue
        if not isinstance(value, str | bool | int | float | tuple | None):
            kind = type(value).__name__
            raise ValueError(f"{name}: the option {key!r} ({kind}) has no text.")
        text = value_text(value)
        quote = "'" if '"' in text else '"'
        quoted = isinstance(value, str) and not set(text).isdisjoint(",=' \"")
        items.append(f"{key}={quote}{text}{quote}" if quoted else f"{key}={text}")
    return f"{name}:{','.join(items)}" if items else name


def _imported(place: str) -> object:
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)


def _saved(spec: Option, value: Any) -> object:
    """An option as JSON data. Tensors leave a mark and objects their class name, which the
    technique refuses when read back."""
    if spec.saved == "objects":
        several = value if isinstance(value, list | tuple) else [value]
        names = [item if isinstance(item, str) else type(item).__name__ for item in several]
        return names if several is value else names[0]
    return "given as tensors" if value is not None and spec.saved == "tensors" else plain(value)


def _is_technique(value: object) -> bool:
    parameters = getattr(value, "__dataclass_params__", None)
    frozen = parameters is not None and parameters.frozen
    return isinstance(value, type) and frozen and hasattr(value, "seam")


TECHNIQUES: Registry[Technique] = Registry(
    "technique",
    "diffalign.techniques",
    rooms=("diffalign.guidance", "diffalign.attention", "diffalign.pruning"),
    unlisted={"diffusers-guider": "diffalign.seams.guiders_in:DiffusersGuider"},
    belongs=_is_technique,
    needs="a frozen dataclass that derives from a contract of diffalign.core, such as TwoBranches",
    advice="`diffalign techniques` lists all.",
)
"""The techniques: what ``apply`` takes."""

register = TECHNIQUES.register
name_of, to_config, from_config = TECHNIQUES.name_of, TECHNIQUES.to_config, TECHNIQUES.from_config
make, parse = TECHNIQUES.build, TECHNIQUES.make


def _is_method(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Method) and value is not Method


METHODS: Registry[Method[Any]] = Registry(
    "method",
    "diffalign.methods",
    rooms=("diffalign.search", "diffalign.noise_opt"),
    belongs=_is_method,
    needs="a frozen dataclass that derives from diffalign.core.Method",
    advice="`diffalign methods` lists all.",
)
"""The methods: what ``align(method=...)`` takes."""


KERNELS: Registry[Any] = Registry(
    "kernel",
    "diffalign.kernels",
    targets={
        name: f"diffalign.seams.trajectory.kernels:{cls}"
        for name, cls in (
            ("native", "Native"),
            ("eta", "Eta"),
            ("flow-sde", "FlowSDE"),
            ("vp-flow", "VPFlow"),
        )
    },
)
"""How ``align`` draws noise in the steps of a scheduler: what ``align(kernel=...)`` takes."""


def methods() -> dict[str, type[Method[Any]]]:
    """Every method, those of other packages and of yours included: name -> class."""
    return cast("dict[str, type[Method[Any]]]", METHODS.all())


def techniques() -> dict[str, type[Technique]]:
    """Every technique, those of other packages and of yours included: name -> class."""
    return cast("dict[str, type[Technique]]", TECHNIQUES.all())
