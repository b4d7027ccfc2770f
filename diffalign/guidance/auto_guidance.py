"""Autoguidance: away from a weaker model of the same kind."""

import copy
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Self

from torch.nn import Module

from diffalign.core import (
    CALL,
    COND,
    Context,
    Guidance,
    Pass,
    StepInfo,
    Tensor,
    UnsupportedModel,
    auto,
    filled,
    option,
)
from diffalign.core.option import completed, derived
from diffalign.families import family_named
from diffalign.seams.swap import original_class, unwrapped

WEAK = Pass("weak", True)
# entries of a denoiser's config that say what it reads and predicts
INTERFACE = (
    "in_channels",
    "out_channels",
    "patch_size",
    "cross_attention_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
    "caption_channels",
    "text_dim",
    "text_embed_dim",
)
# what an IP-Adapter adds to a denoiser that reads its pictures
PICTURES = ("encoder_hid_proj", "image_proj")


@dataclass(frozen=True, slots=True)
class AutoGuidance(Guidance[None]):
    """Mixes with a weaker model in place of the unconditional one: ``w + scale * (cond - w)``.

    Karras et al. 2024, arXiv:2406.02507: the weak model, smaller or less trained, gets the same
    prompt and makes the same mistakes, only larger. Settings cannot
    hold a model: read back, they ask for ``weak`` again.
    Cost: 2 passes per step, one of them of the weak model; 1 where ``scale`` is 0 or 1.
    Raises: ``UnsupportedModel`` for a weak model of another class or with other inputs, and on
    pipelines with two denoisers.
    """

    scale: float = auto(CALL, "1 is off, 0 the weak model", usual=(1.0, 5.0))
    _: KW_ONLY
    weak: Module | Mapping[str, Tensor] = option(
        meaning="a denoiser of the class of the pipeline's own, or a state dict for a copy of it",
        saved="tensors",
    )
    # the denoiser of the weak pass
    denoiser: Module | None = derived(None)

    acts_alone: ClassVar[bool] = True

    def check(self) -> None:
        if not isinstance(self.weak, Module | Mapping):
            raise TypeError(
                "AutoGuidance(weak=...) must be a denoiser such as a UNet2DConditionModel, or a "
                f"state dict of one; got {self.weak!r}. Settings cannot hold it: pass it again."
            )

    @property
    def needs_uncond(self) -> bool:
        return False

    @property
    def extra_passes(self) -> tuple[Pass, ...]:
        return () if self.scale == 1.0 else (self._weak_pass(),)

    def _weak_pass(self) -> Pass:
        return Pass(WEAK.name, True, module=self.denoiser)

    def resolve(self, context: Context) -> Self:
        weak, module = self.weak, context.module
        if not isinstance(weak, Module):
            if module is None:
                raise ValueError("AutoGuidance(weak=...) needs a model where there is no pipeline.")
            weak = with_state(module, weak)
        return completed(filled(self, context), denoiser=weak)

    def refuses(self, context: Context) -> str | None:
        if context.module is None or self.denoiser is None:
            return None
        own, weak = (unwrapped(module) for module in (context.module, self.denoiser))
        if own is weak:
            return (
                "weak=... is the pipeline's own denoiser, and there is nothing to guide away from"
            )
        if original_class(own) is not original_class(weak):
            return (
                f"weak=... must be a {original_class(own).__name__}; got a "
                f"{original_class(weak).__name__}"
            )
        for name in INTERFACE:
            values = own.config.get(name), weak.config.get(name)
            if values[0] != values[1]:
                return f"weak=... must have {name}={values[0]}; got {values[1]}"
        for name in PICTURES:
            if getattr(own, name, None) is not None and getattr(weak, name, None) is None:
                return (
                    f"weak=... has no {name}, and the pipeline's own denoiser reads pictures by "
                    "it; load the IP-Adapter into both"
                )
        if context.pipe is not None and len(family_named(context.family).present(context.pipe)) > 1:
            return "it has two denoisers, and weak=... is one"
        return None

    def passes(self, step: StepInfo, state: None) -> tuple[Pass, ...]:
        if self.scale == 1.0:
            return (COND,)
        return (self._weak_pass(),) if self.scale == 0.0 else (COND, self._weak_pass())

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: None
    ) -> tuple[Tensor, None]:
        if len(preds) == 1:
            return next(iter(preds.values())), None
        return step.mix(preds[COND], preds[WEAK], self.scale), None


def with_state(module: Module, state: Mapping[str, Tensor]) -> Module:
    """A copy of ``module`` with the tensors of ``state``; buffers outside it are shared.

    Raises: ``UnsupportedModel`` where names or shapes are not those of the module.
    """
    known = module.state_dict()
    wrong = sorted(known.keys() ^ state.keys()) or [
        name for name, value in known.items() if value.shape != state[name].shape
    ]
    if wrong:
        raise UnsupportedModel(
            f"AutoGuidance(weak=...) must have the names and shapes of {type(module).__name__}'s "
            f"state; {wrong[0]!r} differs. A model of another size is given as a module."
        )
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    twin = copy.deepcopy(module, shared)
    twin.load_state_dict(
        {name: state[name].to(value) for name, value in known.items()}, assign=True
    )
    return twin
