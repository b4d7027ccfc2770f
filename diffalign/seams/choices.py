"""Ready choices of techniques for a purpose."""

from __future__ import annotations

from typing import Any

from diffalign.core import UnsupportedModel
from diffalign.core.errors import nearest
from diffalign.core.registry import parse
from diffalign.seams.support import supports
from diffalign.seams.swap import original_class

PRESETS: dict[str, tuple[str, ...]] = {
    "fast": ("adaptive-guidance",),
    "quality": ("apg",),
    "negative": ("nag",),
}
"""Purpose -> techniques by their command-line names, every option left to the model's own presets.
"""


def preset(name: str, pipe: Any) -> tuple[Any, ...]:
    """A tuple of techniques for ``apply(pipe, *preset("fast", pipe))``.

    ``name``: "fast" saves evaluations (``AdaptiveGuidance``; its threshold is the published one
    until ``diffalign calibrate adaptive-guidance`` has measured yours, and the report says which),
    "quality" keeps a guidance scale that is too strong from spoiling the image (``APG``),
    "negative" makes a negative prompt work at any scale (``NAG`` with the call's own).
    Cost: that of the techniques, see ``supports(pipe)``; nothing is computed here. Raises
    ValueError for another name, ``UnsupportedModel`` with the reason when one of the techniques
    cannot act on ``pipe``.
    """
    if name not in PRESETS:
        raise ValueError(
            f"preset(name={name!r}) must be one of {', '.join(PRESETS)}; nearest: "
            f"{nearest(str(name), PRESETS)}."
        )
    table = {support.name: support for support in supports(pipe)}
    refused = next((table[part] for part in PRESETS[name] if not table[part].works), None)
    if refused is not None:
        raise UnsupportedModel(
            f"preset({name!r}) needs {refused.name} on {original_class(pipe).__name__}: "
            f"{refused.reason}"
        )
    return tuple(technique for part in PRESETS[name] for technique in parse(part))
