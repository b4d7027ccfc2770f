"""From what the user wrote to what the pipeline gets: arguments, gates and resolved techniques."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from diffalign.core import Context, Guidance, Meter, Technique, UnsupportedModel
from diffalign.core.errors import warn_once
from diffalign.core.option import CALL, options_of
from diffalign.core.registry import name_of
from diffalign.families import FAMILIES, Family, family_of
from diffalign.seams import swap
from diffalign.seams.attention import sites
from diffalign.seams.denoiser.record import Resolved
from diffalign.seams.denoiser.space import parametrisation_of
from diffalign.seams.tokens.places import refusal as token_refusal


@dataclass(frozen=True, slots=True)
class Arguments:
    """Arguments of one call of the pipeline, by name."""

    # what the user gave
    given: Mapping[str, Any]
    # the same with the pipeline's defaults
    values: Mapping[str, Any]

    @property
    def steps(self) -> int:
        """Sampling steps asked for, 0 where they are not known."""
        for name in ("timesteps", "sigmas"):
            if self.values.get(name) is not None:
                return len(self.values[name])
        return int(self.values.get("num_inference_steps") or 0)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt of each image, in the pipeline's order: a prompt's images stand together.

        Empty where prompts are not given as text.
        """
        value = self.values.get("prompt")
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            return ()
        names = ("num_images_per_prompt", "num_videos_per_prompt")
        copies = next((int(self.values[name]) for name in names if self.values.get(name)), 1)
        return tuple(text for text in texts for _ in range(copies))

    @property
    def negative_prompt(self) -> str | None:
        """The negative prompt when it is one text, or one text for every image."""
        value = self.values.get("negative_prompt")
        texts = set(value) if isinstance(value, list | tuple) else {value}
        only = texts.pop() if len(texts) == 1 else None
        return only if isinstance(only, str) else None


@dataclass(frozen=True, slots=True)
class Plan:
    """One generation before it starts."""

    family: Family
    # what the pipeline is called with
    arguments: dict[str, Any]
    # what the user called it with, defaults filled in
    values: Mapping[str, Any]
    # denoiser -> its guidance; empty without one
    guidances: dict[str, Guidance[Any]]
    # registered name of the guidance, "" without one
    guidance_name: str
    # attention, block and token techniques
    others: tuple[Technique, ...]
    # the pipeline runs both branches
    opened: bool
    # value of each of the pipeline's own guidance options
    options: dict[str, Any]
    # options of the guidance that take the pipeline's own scale
    free: tuple[str, ...] = ()
    resolved: Resolved = field(default_factory=dict)

    @property
    def guess_mode(self) -> bool:
        """A ControlNet runs the conditional rows alone by itself."""
        return bool(self.values.get("guess_mode"))


def plan(
    pipe: Any,
    family: Family,
    techniques: Sequence[Technique],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    meter: Meter,
) -> Plan:
    """Bind the call, refuse what cannot work, resolve the techniques, set the pipeline's gates.

    Raises: ``UnsupportedModel`` with the reason, before anything is changed.
    """
    call = bind(swap.original_class(pipe), pipe, args, kwargs)
    guided = any(isinstance(technique, Guidance) for technique in techniques)
    reason = family.check(pipe)
    if guided:
        alone = all(t.acts_alone for t in techniques if isinstance(t, Guidance))
        _refuse(pipe, family, call, None if alone else reason)
    contexts = {
        name: context_of(pipe, family, name, call, meter)
        for name in (family.denoisers if techniques else ())
        if getattr(pipe, name, None) is not None
    }
    guidances: dict[str, Guidance[Any]] = {}
    others: list[Technique] = []
    resolved: Resolved = {}
    for name, context in contexts.items():
        for technique in techniques:
            if isinstance(technique, Guidance):
                guidances[name] = resolve(technique, context, resolved, _suffix(family, name))
                _warn(technique, guidances[name], context, call, techniques, family.embeddings)
            elif context is next(iter(contexts.values())):
                others.append(resolve(technique, context, resolved))
    if any(guidance.needs_uncond for guidance in guidances.values()):
        _refuse(pipe, family, call, reason)
    guidance_name = next((name_of(t) for t in techniques if isinstance(t, Guidance)), "")
    opened = _is_open(pipe, family, call) and reason is None
    arguments = dict(call.given)
    if guidances and family.gates and reason is None:
        opened = any(guidance.needs_uncond for guidance in guidances.values())
        arguments |= _gates(pipe, family, call, opened)
    if not opened:
        arguments = {k: v for k, v in arguments.items() if k not in family.only_guided}
    options = {o.name: call.values.get(o.name, o.neutral) for o in family.options}
    return Plan(
        family,
        arguments,
        call.values,
        guidances,
        guidance_name,
        tuple(others),
        opened,
        options,
        _free(techniques),
        resolved,
    )


def _free(techniques: Sequence[Technique]) -> tuple[str, ...]:
    """Options of the guidance that the user left to the pipeline's own scale."""
    return tuple(
        name
        for technique in techniques
        if isinstance(technique, Guidance)
        for name, spec in options_of(type(technique)).items()
        if spec.source == CALL and getattr(technique, name) is None
    )


@functools.cache
def _signature(cls: type) -> tuple[inspect.Signature, dict[str, Any], str]:
    """Signature of a pipeline's call, its defaults, and the name of its ``**`` argument or ""."""
    signature = inspect.signature(cls.__call__)
    parameters = signature.parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    rest = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD), "")
    return signature, defaults, rest


def described(cls: type) -> type:
    """The class that a family describes: ``cls``, or the one that it derives from."""
    return next((base for base in cls.__mro__ if base.__name__ in FAMILIES), cls)


def bind(cls: type, pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """The arguments of a call by name; names and defaults are those of the described class."""
    signature, defaults, rest = _signature(described(cls))
    arguments = dict(kwargs)
    if args or not kwargs.keys() <= defaults.keys():
        bound = signature.bind(pipe, *args, **kwargs)
        bound.arguments.pop(next(iter(signature.parameters)))
        arguments = dict(bound.arguments)
        arguments.update(arguments.pop(rest, {}))
    return Arguments(arguments, defaults | arguments)


def context_of(
    pipe: Any,
    family: Family,
    denoiser: str | None = None,
    call: Arguments | None = None,
    meter: Meter | None = None,
) -> Context:
    """What a technique sees of ``pipe``; without a ``call``, as if it were called with its
    defaults and its guidance on."""
    cls, scheduler = swap.original_class(pipe), pipe.scheduler
    name = denoiser or family.denoisers[0]
    arguments = call or bind(cls, pipe, (), {})
    gate = _gate_of(family, name)
    native = _native(family, gate, arguments.values)
    if call is None:
        scale = family.scale(native) if native is not None and native > family.on_above else 0.0
        scale = scale or family.scale(family.on_above + 3.0)
    else:
        # the first gate decides whether the pipeline guides at all
        opens = family.scale(_native(family, _gate_of(family, family.denoisers[0]), call.values))
        scale = family.scale(native) if opens != 1.0 else 1.0
    if family.check(pipe) is not None:  # what the call names is an input of the model
        scale = 1.0
    return Context(
        pipeline=cls.__name__,
        family=family.name,
        denoiser=name,
        scheduler=swap.original_class(scheduler).__name__,
        scale=scale,
        scale_source="call" if gate in arguments.given else "pipeline default",
        steps=arguments.steps,
        flow=parametrisation_of(family, scheduler).flow,
        order=int(getattr(scheduler, "order", 1)),
        packed=family.packed,
        negative_prompt=arguments.negative_prompt,
        module=getattr(pipe, name, None),
        pipe=pipe,
        prompts=arguments.prompts,
        meter=meter,
        defaults=family.defaults,
        refusals=family.refusals,
    )


def _gate_of(family: Family, denoiser: str) -> str:
    """The call argument with the scale of this denoiser, "" without one."""
    index = family.denoisers.index(denoiser)
    return family.gates[min(index, len(family.gates) - 1)] if family.gates else ""


def _native(family: Family, gate: str, values: Mapping[str, Any]) -> float | None:
    """The pipeline's own scale; a second gate that is not given follows the first."""
    value = values.get(gate)
    value = values.get(family.gates[0]) if value is None and family.gates else value
    return _number(value)


def _number(value: Any) -> float | None:
    """A number of the user's, also as a tensor or array of one; None for anything else."""
    if isinstance(value, int | float):
        return float(value)
    try:
        return float(value.item())
    except (AttributeError, ValueError, RuntimeError, TypeError):
        return None


def _is_given(value: Any) -> bool:
    """Whether the user asked for something: zero, False and None are off, and so is nothing."""
    number = _number(value)
    if number is not None:
        return number != 0.0
    return value is not None and (not hasattr(value, "__len__") or len(value) > 0)


def _refuse(pipe: Any, family: Family, call: Arguments, reason: str | None) -> None:
    for name, why in family.refuses.items():
        if _is_given(call.values.get(name)):
            raise UnsupportedModel(
                f"{name}={call.values[name]!r} cannot be combined with a guidance: {why}"
            )
    if reason is not None:
        raise UnsupportedModel(f"{swap.original_class(pipe).__name__}: {reason}")


def _suffix(family: Family, denoiser: str) -> str:
    """What tells the guidances of two denoisers apart in the report."""
    return f" [{denoiser}]" if len(family.gates) > 1 and denoiser != family.denoisers[0] else ""


def resolve(technique: Any, context: Context, resolved: Resolved, suffix: str = "") -> Any:
    """``technique`` with its options filled in; they and their sources go into ``resolved``."""
    context = context.fresh()
    answer = technique.resolve(context)
    reason = refusal(answer, context)
    if reason is not None:
        raise UnsupportedModel(
            f"{type(technique).__name__} cannot act on {context.pipeline}: {reason}"
        )
    options = {}
    for f in fields(answer):
        value = getattr(answer, f.name)
        if f.init and value is not None and not _is_hidden(f, answer):
            options[f.name] = (value, context.sources.get(f.name, ""))
    resolved[name_of(technique) + suffix] = options
    return answer


def refusal(technique: Technique, context: Context) -> str | None:
    """Why a resolved technique cannot act on the pipeline of ``context``, None when it can."""
    reason = context.refusal(name_of(technique), technique)
    if reason is None and technique.seam == "attention":
        reason = sites.refusal(family_of(swap.original_class(context.pipe)))
    if reason is None and technique.seam == "tokens":
        reason = token_refusal(family_of(swap.original_class(context.pipe)), context.pipe)
    return reason or technique.refuses(context)


def _is_hidden(f: Any, technique: Any) -> bool:
    """Tensors are not shown, nor the fractions of a window that is given in noise levels."""
    if f.metadata.get("tensors") or getattr(f.metadata.get("option"), "saved", "") == "tensors":
        return True
    return f.name in ("start", "stop") and getattr(technique, "sigma", None) is not None


def _warn(
    technique: Guidance[Any],
    resolved: Guidance[Any],
    context: Context,
    call: Arguments,
    techniques: Sequence[Technique],
    embeddings: str,
) -> None:
    name, scale = type(technique).__name__, technique.asked_scale
    if scale is not None and context.scale_source == "call" and scale != context.scale:
        warn_once(
            f"The call asks for guidance scale {context.scale:g} and {name} for {scale:g}; the "
            "technique's value is used."
        )
    names = ("negative_prompt", f"negative_{embeddings}")
    negative = any(call.given.get(key) is not None for key in names)
    if negative and not resolved.needs_uncond and not any(t.reads_negative for t in techniques):
        alone = resolved.asked_scale not in (None, 1.0)
        where, advice = ("", "") if alone else (" at scale 1", " or a scale above 1")
        warn_once(
            f"The negative prompt has no effect: {name}{where} never evaluates it. Use da.NAG"
            f"{advice}."
        )


def _is_open(pipe: Any, family: Family, call: Arguments) -> bool:
    """Whether the pipeline's own guidance is on in this call."""
    if not family.gates:
        return False
    native = _number(call.values.get(family.gates[0]))
    on = native is not None and native > family.on_above
    return on and family.negative_given(pipe, call.values)


def _gates(pipe: Any, family: Family, call: Arguments, opened: bool) -> dict[str, Any]:
    """Arguments that switch the pipeline's guidance on with a placeholder scale, or off.

    Its own options of guidance are set to neutral: the engine applies them.
    """
    present = [
        gate
        for name, gate in zip(family.denoisers, family.gates)
        if gate == family.gates[0] or getattr(pipe, name, None) is not None
    ]
    changed: dict[str, Any] = dict.fromkeys(present, family.placeholder if opened else family.off)
    changed |= _pictures(call, _is_open(pipe, family, call), opened)
    if opened:
        reason = family.missing_negative(pipe, call.values)
        if reason is not None:
            raise UnsupportedModel(f"{swap.original_class(pipe).__name__}: {reason}")
        if family.needs_negative and not family.negative_given(pipe, call.values):
            prompt = call.values.get("prompt")
            changed["negative_prompt"] = [""] * len(prompt) if isinstance(prompt, list) else ""
    changed |= {o.name: o.neutral for o in family.options if o.name in call.values}
    return changed


def _pictures(call: Arguments, before: bool, opened: bool) -> dict[str, Any]:
    """Pictures of adapters for a call whose guidance is on or off by us, not as the user wrote it.

    U-Nets and SD3 take the negative pictures in front of the others, where guidance is on.
    """
    name = "ip_adapter_image_embeds"
    pictures = call.values.get(name)
    if pictures is None or before == opened or f"negative_{name}" in call.values:
        return {}
    if opened:
        raise ValueError(
            f"{name} has no negative pictures, since this call asks for no guidance, and the "
            "technique guides. Put the negative pictures in front and ask for a guidance scale "
            "above 1."
        )
    if isinstance(pictures, list | tuple):
        return {name: [tensor.chunk(2)[1] for tensor in pictures]}
    return {name: pictures.chunk(2)[1]}
