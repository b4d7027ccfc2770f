"""What can go wrong, by name. Bad arguments are ValueError or TypeError; these are the rest."""

import warnings
from collections.abc import Iterable
from difflib import get_close_matches

_WARNED: set[str] = set()


class UnsupportedModel(ValueError):
    """A technique or a session cannot act on this pipeline, layer or scheduler; the message says
    why and what to do."""


class SessionError(RuntimeError):
    """A session is used against its rules: nested twice, closed out of order, or busy with another
    generation."""


class GuidanceMismatch(RuntimeError):
    """What reached the scheduler is not what the guidance computed: the result would be wrong, so
    the run stops."""


class Cancelled(RuntimeError):
    """A run was stopped, by ``session.cancel()`` or by its ``stop``; the pipeline is as it was
    before."""


class BudgetExceeded(RuntimeError):
    """A budget is used up. Search methods catch it and return the best result so far."""


def warn_once(message: str) -> None:
    """A warning about a choice that the user can change, once per process."""
    if message not in _WARNED:
        _WARNED.add(message)
        warnings.warn(message, UserWarning, stacklevel=2)


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names nearest to ``name`` as text for an error message; when none is near, all of a
    few or "none"."""
    names = sorted(known)
    matches = get_close_matches(name, names, n=count, cutoff=0.4) or (
        names if len(names) <= 2 * count else ["none"]
    )
    return ", ".join(matches)


def listed(items: Iterable[object]) -> str:
    """``a, b or c`` as text for an error message."""
    *others, last = [str(item) for item in items]
    return f"{', '.join(others)} or {last}" if others else last
