import math

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

from diffalign.core import COND, UNCOND, Context, StepInfo
from diffalign.families import families
from diffalign.guidance import APG, CFG
from diffalign.testing.contracts import GuidanceContract


class TestAPG(GuidanceContract):
    def make(self):
        return APG(3.0, eta=0.2, cap=6.0, momentum=-0.5)

    def off(self):
        return APG(1.0, cap=6.0, momentum=-0.5), CFG(1.0)

    def rows(self, steps, batch):
        return 2 * steps * batch


class TestAPGOnFlow(TestAPG):
    flow = True


def pair(seed=0, rows=3):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, 3, generator=rng), torch.randn(rows, 2, 3, generator=rng)


def combine(technique, cond, uncond, step=None, state=None):
    step = StepInfo(0, 10, 1.0) if step is None else step
    return technique.combine(
        {COND: cond, UNCOND: uncond}, step, technique.init(len(cond)) if state is None else state
    )


def test_hand_value():
    # difference (-1, 2); along (1, 2) it is (0.6, 1.2), across it (-1.6, 0.8); 1 + 2 * -1.6 = -2.2
    # and 2 + 2 * 0.8 = 3.6
    out, _ = combine(
        APG(3.0, cap=math.inf, momentum=0.0), torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 0.0]])
    )
    torch.testing.assert_close(out, torch.tensor([[-2.2, 3.6]]), atol=1e-6, rtol=0)


def test_neutral_settings_are_cfg_to_rounding():
    contract = TestAPG()
    a = contract.sample(APG(3.0, eta=1.0, cap=math.inf, momentum=0.0)).sample
    b = contract.sample(CFG(3.0)).sample
    # eps -> x0 -> eps divides by s: 8 roundings per step, each at most eps * |x| / s with s >= 0.04
    # at the last step
    bound = 8 * contract.steps * torch.finfo(torch.float32).eps * b.abs().max() / 0.04
    assert (a - b).abs().max() < bound


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("cap", [0.7, 2.0, math.inf])
@pytest.mark.parametrize("momentum", [0.0, -0.75, 0.4])
def test_agrees_with_an_independent_implementation_over_steps(eta, cap, momentum):
    made, state = APG(4.0, eta=eta, cap=cap, momentum=momentum), None
    buffer = MomentumBuffer(momentum)
    for i in range(4):
        cond, uncond = pair(i)
        out, state = combine(made, cond, uncond, StepInfo(i, 4, 1.0), state)
        # the same algorithm in diffusers: there the weight counts from the conditional prediction,
        # and 0 is no cap
        expected = normalized_guidance(
            cond,
            uncond,
            3.0,
            buffer,
            eta=eta,
            norm_threshold=0.0 if cap == math.inf else cap,
            use_original_formulation=True,
        )
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=0)


def test_cap_limits_each_image_by_its_own_norm():
    cond, uncond = pair()
    made = APG(2.0, eta=1.0, cap=0.5, momentum=0.0)
    out, _ = combine(made, cond, uncond)
    assert torch.allclose((out - cond).flatten(1).norm(dim=1), torch.full((3,), 0.5), atol=1e-5)
    near = cond - 0.01 * torch.ones_like(cond)  # within the cap: untouched
    assert torch.allclose(combine(made, cond, near)[0] - cond, cond - near, atol=1e-6)


def test_a_second_evaluation_starts_from_the_same_momentum():
    made = APG(4.0, eta=1.0, cap=math.inf, momentum=0.5)
    (c0, u0), (c1, u1), (c2, u2) = pair(0), pair(1), pair(2)
    _, state = combine(made, c0, u0, StepInfo(0, 4, 1.0))
    _, state = combine(made, c1, u1, StepInfo(1, 4, 1.0), state)
    again, after = combine(made, c2, u2, StepInfo(1, 4, 0.9, evaluation=1), state)
    torch.testing.assert_close(again, c2 + 3.0 * ((c2 - u2) + 0.5 * (c0 - u0)), atol=1e-5, rtol=0)
    assert torch.equal(after.latest, state.latest)
    # the next step builds on the first evaluation's momentum
    following, _ = combine(made, c0, u0, StepInfo(2, 4, 0.8), after)
    torch.testing.assert_close(
        following, c0 + 3.0 * ((c0 - u0) + 0.5 * ((c1 - u1) + 0.5 * (c0 - u0))), atol=1e-5, rtol=0
    )


def test_a_conditional_image_of_zeros_has_no_direction():
    out, _ = combine(APG(3.0, cap=math.inf, momentum=0.0), torch.zeros(1, 4), torch.ones(1, 4))
    assert out.tolist() == [[-2.0] * 4]


@pytest.mark.parametrize(
    ("family", "cap", "momentum"),
    [("sdxl", 15.0, -0.5), ("sd", 7.5, -0.75), ("dit", 5.0, -0.5), ("wan", math.inf, -0.5)],
)
def test_presets_say_where_they_come_from(family, cap, momentum):
    defaults = next(f.defaults for f in families() if f.name == family)
    context = Context("P", family, "unet", "DDIMScheduler", 5.0, "call", 20, defaults=defaults)
    made, sources = APG().resolve(context), context.sources
    assert (made.scale, made.cap, made.momentum) == (5.0, cap, momentum)
    assert "family" in sources["cap"] if family == "wan" else "2410.02416" in sources["cap"]
    assert "2410.02416" in sources["momentum"]


@pytest.mark.parametrize(
    ("options", "word"),
    [({"cap": 0.0}, "cap"), ({"momentum": -2.0}, "momentum"), ({"eta": math.nan}, "eta")],
)
def test_bad_options_are_named(options, word):
    with pytest.raises(ValueError, match=f"APG.*{word}"):
        APG(**options)
