"""What every guidance must do, as tests to inherit; written for our own techniques and for yours.

class TestMyGuidance(GuidanceContract):
    def make(self): return MyGuidance(3.0)
    def off(self): return MyGuidance(1.0), CFG(1.0)
    def rows(self, steps, batch): return 2 * steps * batch

A class that ``diffalign`` does not ship must have a name first: ``da.register("my-guidance",
MyGuidance)``.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffalign.core import Guidance, Tensor
from diffalign.core.option import Option, options_of
from diffalign.core.registry import TECHNIQUES
from diffalign.core.values import alternatives
from diffalign.testing.oracles import Trace, TwoGaussians, run


def ddim(prediction_type: str = "epsilon") -> DDIMScheduler:
    """DDIM as Stable Diffusion configures it, down to a clean image."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


class GuidanceRuns:
    """The runs of a guidance that its contract looks at: exact denoisers under diffusers' DDIM."""

    # flow matching instead of DDIM
    flow: ClassVar[bool] = False
    steps: ClassVar[int] = 8
    batch: ClassVar[int] = 3
    # of one latent
    shape: ClassVar[tuple[int, ...]] = (4, 5, 6)
    # 0 asks for equal bits; a technique that cannot give them states its derived bound, relative
    # to the largest value
    off_tolerance: ClassVar[float] = 0.0
    # what the pipeline would ask for
    scale: ClassVar[float] = 3.0

    def make(self) -> Any:
        """The technique, acting."""
        raise NotImplementedError

    def off(self) -> tuple[Any, Any]:
        """The technique switched off, and the plain guidance that it must then equal."""
        raise NotImplementedError

    def rows(self, steps: int, batch: int) -> int:
        """Denoiser rows that ``make()`` costs, worked out by hand from its documentation."""
        raise NotImplementedError

    def scheduler(self) -> Any:
        """A fresh scheduler that the technique supports."""
        return FlowMatchEulerDiscreteScheduler(shift=3.0) if self.flow else ddim()

    def noise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(
            self.batch, *self.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        ).to(dtype)

    def model(self) -> TwoGaussians:
        """Rows differ in how far the prompt moves them, so that decisions per image differ too."""
        rng = torch.Generator().manual_seed(2)
        low, move = (
            torch.randn(self.batch, *self.shape, generator=rng, dtype=torch.float64)
            for _ in range(2)
        )
        reach = torch.linspace(0.2, 1.5, self.batch, dtype=torch.float64).reshape(
            -1, *(1,) * len(self.shape)
        )
        return TwoGaussians(low + reach * move, low, std=0.6)

    def sample(self, technique: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Trace:
        model = options.pop("model", None) or self.model()
        noise = options.pop("noise", self.noise(dtype))
        return run(
            technique, model, self.scheduler(), noise, steps=self.steps, scale=self.scale, **options
        )

    def make_for(self, rows: Sequence[int]) -> Any:
        """``make`` for those images; a technique that holds anything per image overrides this."""
        return self.make()


class GuidanceContract(GuidanceRuns):
    """Facts of a guidance, checked on exact denoisers under diffusers' DDIM.

    Subclasses write ``make``, ``off`` and ``rows``.
    """

    def test_off_is_plain_guidance(self) -> None:
        technique, plain = self.off()
        a, b = self.sample(technique).sample, self.sample(plain).sample
        worst = (a - b).abs().max().item()
        assert worst <= self.off_tolerance * b.abs().max().item(), (
            f"off differs from {plain} by {worst}"
        )

    def test_on_does_something(self) -> None:
        assert not torch.equal(self.sample(self.make()).sample, self.sample(self.off()[1]).sample)

    def test_rows_are_permutable(self) -> None:
        order = list(reversed(range(self.batch)))
        whole = self.sample(self.make())
        turned = self.sample(
            self.make_for(order), noise=self.noise()[order], model=self.model().select(order)
        )
        assert torch.equal(turned.sample, whole.sample[order])

    def test_rows_are_independent(self) -> None:
        whole = self.sample(self.make()).sample
        # one image alone: reductions may round differently, by a few last places per step and
        # weight
        bound = 64 * self.steps * torch.finfo(torch.float32).eps * whole.abs().max().item()
        for row in range(self.batch):
            alone = self.sample(
                self.make_for([row]), noise=self.noise()[[row]], model=self.model().select([row])
            ).sample
            assert (alone - whole[[row]]).abs().max().item() <= bound

    def test_cost_is_as_documented(self) -> None:
        assert self.sample(self.make()).rows == self.rows(self.steps, self.batch)

    def test_second_run_is_identical(self) -> None:
        technique = self.make()
        first, second = self.sample(technique), self.sample(technique)
        assert torch.equal(first.sample, second.sample)
        assert first.rows_per_call == second.rows_per_call

    def test_resumes_from_its_state(self) -> None:
        technique, cut = self.make(), self.steps // 2
        whole = self.sample(technique)
        half = self.sample(technique, stop=cut)
        state = copy.deepcopy(half.state)
        for _ in range(2):  # twice: continuing must not use the state up
            assert torch.equal(
                self.sample(technique, start=cut, state=half.state, noise=half.sample).sample,
                whole.sample,
            )
        if state is not None:
            order = list(reversed(range(self.batch)))
            turned = self.sample(
                self.make_for(order),
                start=cut,
                state=state.select(order),
                noise=half.sample[order],
                model=self.model().select(order),
            )
            assert torch.equal(turned.sample, whole.sample[order])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dtype_is_kept(self, dtype: torch.dtype) -> None:
        for guided in self.sample(self.make(), dtype).guided:
            assert guided.dtype == dtype
            assert guided.isfinite().all()

    def test_is_frozen_and_leaves_global_randomness_alone(self) -> None:
        technique, before = self.make(), torch.get_rng_state()
        self.sample(technique)
        assert torch.equal(torch.get_rng_state(), before)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(technique, dataclasses.fields(technique)[0].name, 2.0)

    def test_config_and_text_round_trip(self) -> None:
        technique = self.make()
        config = TECHNIQUES.to_config(technique)
        assert TECHNIQUES.from_config(json.loads(json.dumps(config))) == technique
        name = config.pop("name")
        options = (f"{key.replace('_', '-')}={_text(value)}" for key, value in config.items())
        assert TECHNIQUES.make(f"{name}:{','.join(options)}") == (technique,)

    def test_is_a_guidance_that_says_what_it_is(self) -> None:
        technique = self.make()
        assert isinstance(technique, Guidance)
        text = type(technique).__doc__ or ""
        assert "arXiv:" in text, "the docstring names the paper"
        assert "Cost:" in text, "the docstring says what it costs"

    def test_every_option_has_a_meaning_and_keeps_its_range(self) -> None:
        technique = self.make()
        for name, spec in options_of(type(technique)).items():
            assert spec.meaning, f"{name} has no meaning: write it with option() or auto()"
            assert spec.source or spec.default is None or _is_in_range(spec, spec.default), name
            for value in _bad_values(spec):
                with pytest.raises((ValueError, TypeError), match=name):
                    dataclasses.replace(technique, **{name: value})


def _is_in_range(spec: Option, value: Any) -> bool:
    entries = value if isinstance(value, tuple) else (value,)
    numbers = [entry for entry in entries if isinstance(entry, int | float)]
    return all(isinstance(entry, bool) or spec.holds(entry) for entry in numbers)


def _bad_values(spec: Option) -> list[Any]:
    """Values that the option must refuse, by its own words."""
    if spec.choices:
        return ["no such choice"]
    kinds = alternatives(spec.annotation)
    if bool in kinds:
        return ["yes"]
    if not {int, float} & set(kinds):
        return []
    bad: list[Any] = [math.nan, "three", True, *([] if spec.infinite else [math.inf])]
    if spec.low > -math.inf:
        bad += [spec.low - 1, *([spec.low] if spec.open_low else [])]
    if spec.high < math.inf:
        bad += [spec.high + 1, *([spec.high] if spec.open_high else [])]
    return bad


def _text(value: Any) -> str:
    """JSON data as the command line takes it."""
    if isinstance(value, list | tuple):
        return f"({','.join(json.dumps(item) for item in value)})"
    return str(value)
