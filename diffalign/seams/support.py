"""Which techniques work on a pipeline, which not and why, and what each costs."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

from diffalign.core import Context, Guidance, Technique, UnsupportedModel
from diffalign.core.option import REQUIRED, options_of
from diffalign.core.registry import techniques
from diffalign.families import family_of
from diffalign.seams.plan import context_of, refusal
from diffalign.seams.swap import original_class


@dataclass(frozen=True, slots=True)
class Support:
    """One technique on one pipeline."""

    # registered name
    name: str
    works: bool
    # why not, empty when it works
    reason: str
    # the "Cost:" sentence of its documentation
    cost: str


class SupportTable(tuple[Support, ...]):
    """What ``supports`` returns: rows to read by program, a table as text."""

    __slots__ = ()

    def __str__(self) -> str:
        width = max((len(support.name) for support in self), default=0)
        return "\n".join(
            f"{support.name:{width}}  {'yes' if support.works else 'no ':3}  "
            f"{support.cost if support.works else support.reason}"
            for support in self
        )


def supports(pipe: Any) -> SupportTable:
    """Every registered technique on this pipeline object. Print it for a table.

    Raises: ``UnsupportedModel`` with the reason when no technique can act on the pipeline's class.
    """
    family = family_of(original_class(pipe))
    try:
        context, unusable = context_of(pipe, family), ""
    except UnsupportedModel as error:  # the scheduler, which every technique needs
        context, unusable = None, str(error)
    table = []
    for name, cls in techniques().items():
        reason = unusable if context is None else reason_against(cls, context)
        table.append(Support(name, not reason, reason, cost_of(cls)))
    return SupportTable(table)


def reason_against(technique: Technique | type[Technique], context: Context) -> str:
    """Why a technique cannot act on the pipeline of ``context``, empty when it can.

    A class stands for its default options; one that cannot be made without options is not refused.
    """
    distilled = family_of(original_class(context.pipe)).check(context.pipe)
    guidance = technique if isinstance(technique, type) else type(technique)
    if distilled and issubclass(guidance, Guidance) and not guidance.acts_alone:
        return distilled
    try:
        if isinstance(technique, type):
            if any(option.default is REQUIRED for option in options_of(technique).values()):
                return ""
            technique = technique()
        fresh = context.fresh()
        technique = technique.resolve(fresh)
        if distilled and isinstance(technique, Guidance) and technique.needs_uncond:
            return distilled
        return refusal(technique, fresh) or ""
    except (ValueError, LookupError) as error:  # an option that has no value for this model, too
        return str(error)


def cost_of(cls: type) -> str:
    """The "Cost:" sentence of a technique's docstring on one line, empty when it has none."""
    pattern = r"Cost:\s*(.+?)(?:\n\s*\n|\n\s*[A-Z][\w ]*:|\Z)"
    match = re.search(pattern, inspect.getdoc(cls) or "", flags=re.S)
    return " ".join(match.group(1).split()).replace("``", "") if match else ""
