"""One pipeline call as a sampler makes it: the same arguments for any number of images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.core import UnsupportedModel
from diffalign.core.errors import nearest
from diffalign.core.types import Keywords, Pipeline
from diffalign.families import Family, family_of
from diffalign.seams.plan import Arguments, bind, described
from diffalign.seams.swap import original_class
from diffalign.seams.trajectory.schedule import one_or_all

# arguments that follow the position in the loop, which a segment counts from 0
LOOP_KEYED: Mapping[str, tuple[Any, str]] = {
    "control_guidance_start": (0.0, "a ControlNet's window"),
    "control_guidance_end": (1.0, "a ControlNet's window"),
    "denoising_end": (None, "an end before the last step; run(state, until=...) stops there"),
    "cfg_trunc_ratio": (1.0, "an end of guidance; use a technique with stop=..."),
    "skip_guidance_layers": (None, "skip-layer guidance of the pipeline; use da.SkipLayerGuidance"),
    "callback_on_step_end": (None, "a callback with step numbers"),
    "callback": (None, "a callback with step numbers"),
}
COPIES = ("num_images_per_prompt", "num_videos_per_prompt")
# taken by pipelines through their **kwargs
BESIDE = ("callback", "callback_steps")
# schedulers whose trajectory cannot be cut or repeated -> why
UNCUT = {
    "DPMSolverSDEScheduler": (
        "it draws from one random tree for all images, which cannot be cut or divided"
    ),
    "IPNDMScheduler": "it has no noise levels, so nobody can say what its steps predict",
}


def names_of(cls: type, *others: Callable[..., Any]) -> set[str]:
    """Named arguments of a pipeline's call, and of other functions."""
    calls = [base.__call__ for base in {cls, described(cls)}]  # type: ignore[operator]
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p for f in (*calls, *others) for p in inspect.signature(f).parameters.values()]
    return {p.name for p in parameters if p.kind in kinds} - {"self"}


def check_names(who: str, names: set[str], call: Iterable[str], known: Iterable[str] = ()) -> None:
    """Raise TypeError for the first argument of a call that is not among a pipeline's ``names``.

    ``known``: names that may be meant beside them.
    """
    # modular pipelines name none of their arguments
    if "prompt" not in names:
        return
    for name in call:
        if name not in names and name not in BESIDE:
            near = nearest(name, {*names, *known})
            raise TypeError(f"{who} have no argument {name!r}. Nearest: {near}.")


class Call:
    """Arguments of a pipeline that trajectories share.

    Raises: ``UnsupportedModel`` where the pipeline takes no start latents, and for arguments that
    follow the position in the loop; ValueError for arguments that the sampler sets, TypeError for
    those that the pipeline does not have.
    """

    def __init__(self, pipe: Pipeline, options: Keywords) -> None:
        self.pipe, self.options = pipe, options
        # number of images -> embeddings with a row for each
        self._repeated: dict[int, Keywords] = {}
        cls = original_class(pipe)
        check_names(f"PipelineSampler(...) and {cls.__name__}", names_of(cls), options)
        self.family: Family = family_of(cls)
        self.bound: Arguments = bind(cls, pipe, (), options)
        values = self.bound.values
        if self.family.remembers is not None:
            raise UnsupportedModel(
                f"{cls.__name__} makes a video chunk after chunk, so it has no one trajectory to "
                "cut. Search with LinearSearch or TreeOfFrames."
            )
        if "latents" not in values or "image" in values or "video" in values:
            raise UnsupportedModel(
                f"{cls.__name__} does not start from latents=, so its trajectories cannot be cut."
            )
        scheduler = original_class(pipe.scheduler).__name__
        if scheduler in UNCUT:
            raise UnsupportedModel(f"{scheduler}: {UNCUT[scheduler]}. Use DDIMScheduler.")
        for name, (neutral, what) in LOOP_KEYED.items():
            if values.get(name, neutral) not in (neutral, [neutral]):
                raise UnsupportedModel(
                    f"{name}={values[name]!r} is {what}: it follows the position in the loop, and "
                    "a segment counts from 0. Leave it out."
                )
        for name in ("latents", "generator", "output_type", "return_dict"):
            if options.get(name) is not None:
                raise ValueError(
                    f"PipelineSampler({name}=...) is set by the sampler; leave it out."
                )
        if self.texts == 0:
            raise ValueError(
                f"PipelineSampler needs prompt=... or {self.family.embeddings}=...; got neither."
            )

    @property
    def texts(self) -> int:
        """Prompts of the call, as texts or as embeddings."""
        for name in ("prompt", self.family.embeddings):
            value = self.bound.values.get(name)
            if value is not None:
                return 1 if isinstance(value, str) else len(value)
        return 0

    @property
    def least(self) -> int:
        """The smallest number of images of one call."""
        return self.texts * self._copies if self.texts > 1 else 1

    @property
    def _copies(self) -> int:
        values = self.bound.values
        return next((int(values[name]) for name in COPIES if values.get(name)), 1)

    def of(self, images: int) -> Keywords:
        """The arguments for that many images.

        A single prompt makes any number; several make their own number only.
        Raises: ValueError for another number.
        """
        if images == self.texts * self._copies:
            return dict(self.options)
        name = next((name for name in COPIES if name in self.bound.values), None)
        if self.texts == 1 and self.bound.values.get("prompt") is None:
            # pipelines repeat texts, and not all of them what they are given in place of texts
            return {**self.options, **({name: 1} if name else {}), **self._rows(images)}
        if self.texts == 1 and name is not None:
            return {**self.options, name: images}
        raise ValueError(
            f"The call has {self.texts} prompts and makes {self.texts * self._copies} images; got "
            f"a state of {images}. Make a sampler of one prompt to run any number."
        )

    def _rows(self, images: int) -> Keywords:
        """The embeddings and masks of the one prompt, a row for each image."""
        if images not in self._repeated:
            self._repeated[images] = {
                name: value.repeat_interleave(images, 0)
                if isinstance(value, Tensor)
                else value * images
                for name, value in self.options.items()
                if name.endswith(("embeds", "mask")) and not name.startswith("ip_adapter")
                if isinstance(value, Tensor | list) and len(value) == 1
            }
        return self._repeated[images]

    def __call__(
        self,
        latents: Tensor | None,
        generators: Sequence[torch.Generator],
        output: str,
        function: Callable[..., Any] | None = None,
    ) -> Tensor:
        """The pipeline's answer as a tensor [B, ...].

        ``function``: how the pipeline is called, None for ``pipe(...)`` with its sessions.
        """
        arguments = {
            **self.of(len(generators)),
            "latents": latents,
            "generator": one_or_all(generators),
            "output_type": output,
            "return_dict": False,
        }
        call = self.pipe if function is None else function
        result = call(**arguments)[0]
        if not isinstance(result, Tensor):
            raise UnsupportedModel(
                f"{original_class(self.pipe).__name__} returned {type(result).__name__} instead of "
                f"a tensor for output_type={output!r}."
            )
        return result

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline as if no session were active on it."""
        return original_class(self.pipe).__call__(self.pipe, *args, **kwargs)
