"""Evaluation: GenEval, contact sheets, settings in PNG files. Submodules load on first use; importing this package loads nothing."""

from importlib import import_module
from types import ModuleType

__all__ = ["geneval", "geneval_prompts", "geneval_summary", "png", "sheet"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
