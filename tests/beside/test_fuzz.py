"""Random calls in a session of techniques that are off, or that do what the pipeline does, against
the plain call: no difference where there must be none.

``DIFFALIGN_FUZZ=1000 pytest tests/beside/test_fuzz.py`` runs so many; a failure names its seed, and
``DIFFALIGN_FUZZ_FROM=417`` begins there.
"""

import copy
import inspect
import os
import random
from collections import Counter
from contextlib import ExitStack, nullcontext

import diffusers
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

import diffalign as da
from diffalign.core.registry import TECHNIQUES, techniques
from diffalign.families import FAMILIES
from diffalign.seams.plan import context_of
from diffalign.seams.support import reason_against
from diffalign.testing.beside.check import differences, footprint
from diffalign.testing.beside.examples import NEUTRAL
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_names, tiny_pipeline, tiny_recipe

pytestmark = [pytest.mark.exhaustive, pytest.mark.filterwarnings("ignore")]
CALLS = int(os.environ.get("DIFFALIGN_FUZZ", "100"))
FIRST = int(os.environ.get("DIFFALIGN_FUZZ_FROM", "0"))
NOISE = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
OURS = (da.UnsupportedModel, da.GuidanceMismatch, da.SessionError)


class Faded(PipelineCallback):
    """A callback object of diffusers' own kind."""

    tensor_inputs = ["latents"]  # noqa: RUF012

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        return {"latents": 0.98 * callback_kwargs["latents"]}


def reading(pipe, index, time, tensors):
    vars(pipe).get("_guidance_scale")
    return {}


def fading(pipe, index, time, tensors):
    return {"latents": 0.99 * tensors["latents"]}


def rising(pipe, index, time, tensors):
    pipe._guidance_scale = 3.0 + index
    return {}


CALLBACKS = {
    "reading": lambda: reading,
    "fading": lambda: fading,
    "rising": lambda: rising,
    "object": lambda: Faded(cutoff_step_ratio=None, cutoff_step_index=1),
    "objects": lambda: MultiPipelineCallbacks([Faded(cutoff_step_ratio=None, cutoff_step_index=1)]),
}


def off(name):
    """The technique of that name, doing what the pipeline does."""
    return TECHNIQUES.build(name, NEUTRAL[name].options)


class Case:
    """One random call, the same for the same seed."""

    def __init__(self, seed):
        self.rng = rng = random.Random(seed)
        self.name = rng.choice([name for name in tiny_names() if name in FAMILIES])
        recipe = tiny_recipe(self.name)
        self.make = {
            "variant": rng.choice(recipe.variants),
            "text": recipe.text and rng.random() < 0.4,
            "dtype": rng.choice([torch.float32, torch.float32, torch.bfloat16]),
        }
        self.call = {
            **self.make,
            "batch": 1 if "VACE" in self.name else rng.choice([1, 1, 2, 3]),
            "steps": rng.choice([1, 2, 3]) if recipe.slow else rng.choice([1, 2, 3, 4, 5]),
            "seed": rng.randrange(5),
            "guided": rng.random() < 0.8,
        }
        self.cls = getattr(diffusers, self.name)
        self.parameters = inspect.signature(self.cls.__call__).parameters
        self.scheduler = self._scheduler()
        self.extras = self._extras()
        self.callback = rng.choice([None, None, *CALLBACKS])
        self.shape = rng.choice(["apply", "apply", "nested", "enable", "twice", "shared"])
        self.techniques = self._techniques()

    def _scheduler(self):
        if self.rng.random() < 0.5:
            return None
        current = type(tiny_pipeline(self.name, **self.make).scheduler).__name__
        return self.rng.choice(FLOW if current.startswith("FlowMatch") else NOISE)

    def _extras(self):
        """Further arguments that the pipeline's call knows."""
        rng, extras = self.rng, {}
        possible = {
            "num_images_per_prompt": lambda: rng.choice([1, 2]),
            "guidance_rescale": lambda: rng.choice([0.0, 0.7]),
            "eta": lambda: rng.choice([0.0, 0.5, 1.0]),
            "return_dict": lambda: rng.choice([True, False]),
            "output_type": lambda: rng.choice(["latent", "latent", "pt", "np"]),
            "clip_skip": lambda: rng.choice([None, 1]),
            "guidance_scale": lambda: rng.choice([0.0, 0.5, 1.0, 1.5, 3.0, 7.5]),
            "true_cfg_scale": lambda: rng.choice([1.0, 1.5, 4.0]),
            "cross_attention_kwargs": lambda: rng.choice([None, {}]),
            "joint_attention_kwargs": lambda: rng.choice([None, {}]),
            "attention_kwargs": lambda: rng.choice([None, {}]),
            "cfg_trunc_ratio": lambda: rng.choice([0.5, 1.0]),
            "cfg_truncation": lambda: rng.choice([0.5, 1.0]),
            "cfg_normalization": lambda: rng.choice([True, False]),
            "guess_mode": lambda: rng.choice([False, True]),
        }
        for name, draw in possible.items():
            value = draw()
            if name in self.parameters and rng.random() < 0.5:
                extras[name] = value
        return extras

    def _techniques(self):
        """Up to three names of techniques that must change nothing, and how each is switched
        off."""
        names = [n for n, neutral in NEUTRAL.items() if neutral.branch == "both"]
        context = context_of(self.pipeline(), FAMILIES[self.name])
        names = [n for n in names if n != "dynamic-cfg" and not reason_against(off(n), context)]
        guidances = [n for n in names if techniques()[n].seam == "denoiser"]
        chosen = [n for n in names if n not in guidances and self.rng.random() < 0.4]
        if guidances and (self.rng.random() < 0.85 or not chosen):
            chosen.append(self.rng.choice(guidances))
        self.rng.shuffle(chosen)
        return chosen

    def __str__(self):
        parts = {**self.call, **self.extras}
        text = ", ".join(f"{key}={value}" for key, value in parts.items())
        return (
            f"{self.name}({text}) with {self.scheduler or 'its scheduler'}, callback "
            f"{self.callback}, {self.shape} {'+'.join(self.techniques)}"
        )

    def pipeline(self):
        pipe = tiny_pipeline(self.name, **self.make)
        if self.scheduler:
            cls = getattr(diffusers, self.scheduler)
            pipe.scheduler = cls.from_config(pipe.scheduler.config)
        return pipe

    def inputs(self):
        inputs = {**tiny_inputs(self.name, **self.call), **self.extras}
        images = self.extras.get("num_images_per_prompt", 1)
        inputs["generator"] = [
            torch.Generator().manual_seed(100 * self.call["seed"] + row)
            for row in range(self.call["batch"] * images)
        ]
        if self.call["batch"] * images == 1 and self.call["seed"] % 2:
            (inputs["generator"],) = inputs["generator"]
        if self.callback and "callback_on_step_end" in self.parameters:
            inputs["callback_on_step_end"] = CALLBACKS[self.callback]()
        return inputs

    def result(self, pipe):
        """The result of one call, or the error that ended it, and where the global generator is.

        Some pipelines encode their images with it.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            try:
                return final(pipe, self.inputs()), torch.get_rng_state()
            except Exception as error:
                return error, torch.get_rng_state()

    def sessions(self, pipe, stack):
        """Open the techniques in this case's way."""
        chosen = list(map(off, self.techniques))
        if self.shape == "enable":
            da.enable(pipe, *chosen)
            stack.callback(da.disable, pipe)
        elif self.shape == "nested":
            for technique in chosen:
                stack.enter_context(da.apply(pipe, technique))
        else:
            stack.enter_context(da.apply(pipe, *chosen))


def differ(case, a, b):
    """By how much two results differ more than they may; 0 if they do not."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not a.numel():
        return 0.0  # a call for no images
    worst = float((a.nan_to_num().double() - b.nan_to_num().double()).abs().max())
    # these pipelines map each prediction before they mix them, so what they are handed comes back
    # up to rounding: the bound of tests/seams/denoiser/test_identity.py in the call's dtype
    eps = torch.finfo(case.make["dtype"]).eps
    bound = 25 * eps * float(a.abs().max()) if FAMILIES[case.name].affine else 0.0
    return worst if worst > bound else 0.0


def verdict(case):
    """What became of a case: equal, refused, an error with and without us; or what is wrong."""
    pipe = case.pipeline()
    before = footprint(pipe)
    plain, generator = case.result(pipe)
    restless = set(differences(before, footprint(pipe)))
    before, neighbour = footprint(pipe), copy.copy(pipe)
    other = da.apply(neighbour, da.PLADIS(0.0)) if case.shape == "shared" else nullcontext()
    with ExitStack() as stack:
        try:
            stack.enter_context(other)
            case.sessions(pipe, stack)
        except OURS as error:
            return "error" if isinstance(plain, Exception) else f"refused: {error}"
        results = [case.result(pipe) for _ in range(1 + (case.shape == "twice"))]
    after, _ = case.result(pipe)
    if isinstance(plain, Exception):
        alike = all(isinstance(result, Exception) for result, _ in results)
        return "error" if alike else "WRONG: only we run"
    if isinstance(after, Exception) or differ(case, plain, after):
        return "WRONG: something was left behind"
    if changed := set(differences(before, footprint(pipe))) - restless:
        return f"WRONG: left changed {sorted(changed)[:3]}"
    for result, drawn in results:
        if isinstance(result, OURS):
            return f"refused: {result}"
        if isinstance(result, Exception):
            return f"WRONG: {type(result).__name__} {result}"
        if distance := differ(case, plain, result):
            return f"WRONG: differs by {distance}"
        if not torch.equal(drawn, generator):
            return "WRONG: the global generator moved"
    return "equal"


@pytest.mark.parametrize("start", range(FIRST, FIRST + CALLS, 50))
def test_random_calls(start, record_property):
    outcomes, wrong = Counter(), []
    for seed in range(start, min(start + 50, FIRST + CALLS)):
        case = Case(seed)
        outcome = verdict(case)
        outcomes[outcome.partition(":")[0]] += 1
        if outcome.startswith("WRONG"):
            wrong.append(f"seed {seed}: {outcome}\n  {case}")
        elif os.environ.get("DIFFALIGN_FUZZ_SHOW"):
            print(seed, outcome)
    record_property("outcomes", dict(outcomes))
    print(dict(outcomes))
    assert not wrong, "\n" + "\n".join(wrong)
    assert outcomes["equal"] >= 0.5 * sum(outcomes.values()), dict(outcomes)
