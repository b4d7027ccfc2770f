"""Autoguidance: two denoisers called by hand, a state in place of a module, and what is refused."""

import copy
import functools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import diffalign as da
from diffalign.core import COND, BlockTechnique, Pass, StepInfo, UnsupportedModel
from diffalign.core.registry import from_config, make, to_config
from diffalign.families import FAMILIES
from diffalign.guidance import CFG, AutoGuidance
from diffalign.testing.beside.adapters import flux_pictures, unet_pictures
from diffalign.testing.beside.base import Part
from diffalign.testing.contracts import GuidanceContract
from diffalign.testing.deep import deep_pipeline
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

SD, WAN = "StableDiffusionPipeline", "WanPipeline"
EPS = torch.finfo(torch.float32).eps
pytestmark = pytest.mark.filterwarnings(
    "ignore:The call asks", "ignore:The negative prompt has no effect"
)


class TestAutoGuidance(GuidanceContract):
    def make(self):
        return AutoGuidance(2.5, weak=nn.Identity())

    def off(self):
        return AutoGuidance(1.0, weak=nn.Identity()), CFG(1.0)

    def rows(self, steps, batch):
        return 2 * steps * batch

    def test_config_and_text_round_trip(self):
        """Settings cannot hold a model: they mark it, and ask for it when they are read."""
        config = to_config(self.make())
        assert config == {"name": "auto-guidance", "scale": 2.5, "weak": "given as tensors"}
        with pytest.raises(TypeError, match=r"AutoGuidance\(weak=...\) .* pass it again"):
            from_config(config)


def weaker(pipe, name):
    other = tiny_pipeline(type(pipe).__name__, seed=1)
    return getattr(other, name)


def call(pipe, *techniques, steps=2, batch=2, **more):
    inputs = {**tiny_inputs(type(pipe).__name__, steps=steps, batch=batch), **more}
    with da.apply(pipe, *techniques) as session:
        return final(pipe, inputs), session.report()


@pytest.mark.parametrize(
    "name",
    [SD, "StableDiffusion3Pipeline", "FluxPipeline", pytest.param(WAN, marks=pytest.mark.slow)],
)
def test_a_step_is_two_denoisers_called_by_hand(name, monkeypatch):
    """What reaches the scheduler, from the very arguments with which the denoiser was called."""
    pipe = tiny_pipeline(name)
    denoiser = FAMILIES[name].denoisers[0]
    strong, weak = getattr(pipe, denoiser), weaker(pipe, denoiser)
    calls, outputs = [], []
    strong.register_forward_pre_hook(lambda _, a, k: calls.append((a, k)), with_kwargs=True)
    step = type(pipe.scheduler).step

    @functools.wraps(step)
    def noted(self, model_output, *rest, **options):
        outputs.append(model_output)
        return step(self, model_output, *rest, **options)

    monkeypatch.setattr(type(pipe.scheduler), "step", noted)
    _, report = call(pipe, AutoGuidance(2.5, weak=weak), steps=1)
    assert report.rows == 2 * 2
    (args, kwargs), (arrived,) = calls[0], outputs
    with torch.no_grad():
        one, two = (model(*args, **{**kwargs, "return_dict": False})[0] for model in (strong, weak))
    expected = two.double() + 2.5 * (one.double() - two.double())
    assert (arrived - expected).abs().max() <= 8 * 2.5 * EPS * expected.abs().max()
    assert (arrived - one).abs().max() > 1e-2 * one.abs().max()


def test_the_ends_of_the_scale():
    pipe = tiny_pipeline(SD)
    weak = weaker(pipe, "unet")
    alone, _ = call(pipe, CFG(1.0))
    off, report = call(pipe, AutoGuidance(1.0, weak=weak))
    assert torch.equal(off, alone)
    assert report.rows == 4
    twin = copy.deepcopy(pipe)
    twin.unet = weak
    zero, report = call(pipe, AutoGuidance(0.0, weak=weak))
    assert torch.equal(zero, call(twin, CFG(1.0))[0])
    assert report.rows == 4


def test_a_state_is_a_copy_with_other_weights():
    pipe = tiny_pipeline(SD)
    weak = weaker(pipe, "unet")
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    module, _ = call(pipe, AutoGuidance(2.0, weak=weak))
    state, _ = call(pipe, AutoGuidance(2.0, weak=weak.state_dict()))
    assert torch.equal(module, state)
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    lacking = dict(list(weak.state_dict().items())[1:])
    with pytest.raises(UnsupportedModel, match=r"names and shapes .* 'conv_in.weight' differs"):
        call(pipe, AutoGuidance(2.0, weak=lacking))


def test_attention_techniques_act_in_both():
    """Each run is a mix of what the two models make under the same techniques."""
    for name in (SD, "FluxPipeline"):
        pipe = tiny_pipeline(name)
        attribute = FAMILIES[name].denoisers[0]
        weak = weaker(pipe, attribute)
        twin = copy.deepcopy(pipe)
        setattr(twin, attribute, weak)
        others = da.NAG(3.0, tau=2.5, alpha=0.5, sigma=(0.0, math.inf)), da.PLADIS(1.5)
        on, report = call(pipe, AutoGuidance(2.5, weak=weak), *others, steps=1)
        strong, base = call(pipe, CFG(1.0), *others, steps=1)
        other, _ = call(twin, CFG(1.0), *others, steps=1)
        expected = other.double() + 2.5 * (strong.double() - other.double())
        bound = 64 * 2.5 * EPS * max(x.abs().max() for x in (strong, other))
        assert (on - expected).abs().max() <= bound
        assert report.layers == base.layers


@dataclass(frozen=True, slots=True)
class Halved(BlockTechnique[None]):
    """Lets every block do half of what it does."""

    def around(self, block, streams, site, step, state):
        return tuple((a + b) / 2 for a, b in zip(streams, block())), state


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_block_techniques_act_in_both(name):
    pipe = deep_pipeline(name)
    weak = deep_pipeline(name).transformer
    with torch.no_grad():
        for parameter in weak.parameters():
            parameter.mul_(0.9)
    twin = copy.deepcopy(pipe)
    twin.transformer = weak
    on, report = call(pipe, AutoGuidance(2.5, weak=weak), Halved(), steps=1)
    strong, base = call(pipe, CFG(1.0), Halved(), steps=1)
    other, _ = call(twin, CFG(1.0), Halved(), steps=1)
    expected = other.double() + 2.5 * (strong.double() - other.double())
    bound = 64 * 2.5 * EPS * max(x.abs().max() for x in (strong, other))
    assert (on - expected).abs().max() <= bound
    assert (on - call(pipe, AutoGuidance(2.5, weak=weak), steps=1)[0]).abs().max() > 20 * bound
    assert report.layers == base.layers


class Sized(nn.Module):
    """A wrapper without a length, as compiled models are to whoever asks whether they are true."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __len__(self):
        raise TypeError("no length")

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_a_wrapped_weak_model():
    pipe = tiny_pipeline(SD)
    weak = weaker(pipe, "unet")
    bare, _ = call(pipe, AutoGuidance(2.5, weak=weak))
    assert torch.equal(call(pipe, AutoGuidance(2.5, weak=Sized(weak)))[0], bare)


def test_refusals_say_what_to_do():
    pipe = tiny_pipeline(SD)
    with pytest.raises(UnsupportedModel, match="is the pipeline's own denoiser"):
        call(pipe, AutoGuidance(2.0, weak=pipe.unet))
    flux = tiny_pipeline("FluxPipeline").transformer
    with pytest.raises(UnsupportedModel, match=r"must be a UNet2DConditionModel; got a Flux"):
        call(pipe, AutoGuidance(2.0, weak=flux))
    wider = copy.deepcopy(pipe.unet)
    wider.register_to_config(in_channels=9)
    with pytest.raises(UnsupportedModel, match=r"must have in_channels=4; got 9"):
        call(pipe, AutoGuidance(2.0, weak=wider))
    for name, pictures in (("FluxPipeline", flux_pictures), (SD, unet_pictures)):
        seen = tiny_pipeline(name)
        weak = copy.deepcopy(getattr(seen, FAMILIES[name].denoisers[0]))
        refused = pytest.raises(UnsupportedModel, match="load the IP-Adapter into both")
        with pictures(seen) as arguments, refused:
            call(seen, AutoGuidance(2.0, weak=weak), batch=2, **arguments(Part()))
    experts = tiny_pipeline(WAN, variant="2.2")
    with pytest.raises(UnsupportedModel, match="two denoisers"):
        call(experts, AutoGuidance(2.0, weak=copy.deepcopy(experts.transformer)), batch=1)
    with pytest.raises(TypeError, match="must be a denoiser"):
        AutoGuidance(2.0, weak=3)
    with pytest.raises(TypeError, match="weak"):
        AutoGuidance(2.0)
    with pytest.raises(ValueError, match=r"auto-guidance needs weak=...: a denoiser of the class"):
        make("auto-guidance", {"scale": 2.0})


def test_passes():
    technique = AutoGuidance(2.0, weak=nn.Identity())
    step = StepInfo(0, 4, 1.0)
    assert technique.passes(step, None) == (COND, Pass("weak", True))
    assert not technique.needs_uncond
