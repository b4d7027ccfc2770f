"""Which techniques work on a pipeline, which not and why, and what each costs."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass
from typing import Any

from diffalign.core import Context
from diffalign.core.registry import techniques
from diffalign.families.family import Family
from diffalign.families.table import family_of
from diffalign.seams.swap import original_class


@dataclass(frozen=True, slots=True)
class Support:
    """One technique on one pipeline.

    ``reason``: why not, empty when it works. ``cost``: the "Cost:" line of its documentation.
    """

    name: str
    works: bool
    reason: str
    cost: str


class SupportTable(tuple[Support, ...]):
    """What ``supports`` returns: rows to read by program, a table as text."""

    __slots__ = ()

    def __str__(self) -> str:
        width = max((len(s.name) for s in self), default=0)
        return "\n".join(
            f"{s.name:{width}}  {'yes' if s.works else 'no ':3}  {s.cost if s.works else s.reason}"
            for s in self
        )


def cost_of(cls: type) -> str:
    """The ``Cost:`` sentence of a technique's docstring on one line, empty when it has none."""
    found = re.search(
        r"Cost:\s*(.+?)(?:\n\s*\n|\n\s*[A-Z][\w ]*:|\Z)", inspect.getdoc(cls) or "", flags=re.S
    )
    return " ".join(found.group(1).split()) if found else ""


def context_of(pipe: Any, family: Family) -> Context:
    """What a technique would see if the pipeline were called with its defaults, guidance on."""
    cls = original_class(pipe)
    parameters = inspect.signature(cls.__call__).parameters
    default = (
        parameters[family.gates[0]].default
        if family.gates and family.gates[0] in parameters
        else None
    )
    open_scale = (
        float(default)
        if isinstance(default, int | float) and default > family.on_above
        else family.on_above + 3.0
    )
    scheduler = pipe.scheduler
    return Context(
        pipeline=cls.__name__,
        family=family.name,
        denoiser=family.denoisers[0],
        scheduler=original_class(scheduler).__name__,
        scale=open_scale + family.offset,
        scale_source="pipeline default",
        steps=int(getattr(parameters.get("num_inference_steps"), "default", 0) or 0),
        batch=1,
        flow="FlowMatch" in type(scheduler).__name__
        or getattr(scheduler.config, "prediction_type", "") == "flow_prediction",
        order=int(getattr(scheduler, "order", 1)),
        module=getattr(pipe, family.denoisers[0], None),
        pipe=pipe,
    )


def supports(pipe: Any) -> SupportTable:
    """Every registered technique on this pipeline object. Print it for a table.

    Raises ``UnsupportedModel`` with the reason when no technique can act on the pipeline's class.
    """
    family, _ = family_of(original_class(pipe))
    context = context_of(pipe, family)
    found = []
    for name, cls in techniques().items():
        required = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is f.default_factory is dataclasses.MISSING
        ]
        reason = ""
        if cls.kind == "guidance":  # type: ignore[attr-defined]
            reason = family.check(pipe) or ""
        if not reason and not required:
            try:
                technique = cls()
                technique.resolve(context)
                if hasattr(technique, "refuses"):
                    reason = technique.refuses(pipe, family) or ""
            except (
                ValueError
            ) as error:  # UnsupportedModel, or options that have no default for this model
                reason = str(error)
        found.append(Support(name, not reason, reason, cost_of(cls)))
    return SupportTable(found)
