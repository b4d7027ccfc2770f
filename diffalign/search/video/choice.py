"""Which expander extends a pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.core import Meter, UnsupportedModel
from diffalign.core.types import Pipeline
from diffalign.seams.swap import original_class
from diffalign.search.video.anyflow import AnyFlowFAR
from diffalign.search.video.base import PipelineExpander
from diffalign.search.video.helios import Helios
from diffalign.search.video.last_frame import LastFrame
from diffalign.search.video.ltx_condition import LTXCondition
from diffalign.search.video.skyreels import SkyReelsV2
from diffalign.search.video.wan_vace import WanVACE

EXPANDERS: tuple[type[PipelineExpander], ...] = (
    AnyFlowFAR,
    Helios,
    WanVACE,
    LTXCondition,
    SkyReelsV2,
    LastFrame,
)


def expander_class(cls: type) -> type[PipelineExpander]:
    """The expander of a pipeline class; a user's own subclass has that of its base.

    Raises: ``UnsupportedModel`` for a pipeline that cannot extend a video.
    """
    for base in cls.__mro__:
        for expander in EXPANDERS:
            if base.__name__ in expander.pipelines:
                return expander
    names = ", ".join(name for expander in EXPANDERS for name in expander.pipelines)
    raise UnsupportedModel(
        f"{cls.__name__} cannot extend a video chunk after chunk; these can: {names}."
    )


def extends(cls: type) -> bool:
    """Whether a pipeline class can extend a video."""
    try:
        expander_class(cls)
    except UnsupportedModel:
        return False
    return True


def expander_of(
    pipe: Pipeline,
    techniques: Sequence[object] = (),
    meter: Meter | None = None,
    **options: object,
) -> PipelineExpander:
    """The expander of a pipeline, not open yet: ``with expander_of(pipe, prompt=...) as expander``.

    ``options``: arguments of the pipeline, with one prompt, and those of the expander, such as
    ``chunks``. Raises: ``UnsupportedModel`` for a pipeline that cannot extend a video; ValueError
    and TypeError for arguments that cannot work.
    """
    return expander_class(original_class(pipe))(pipe, techniques, meter, **options)
