"""Guiders of diffusers on classic pipelines, our techniques on modular ones: each against the
native result."""

import copy
import dataclasses
import json
import re

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    LTX2Guidance,
    MagnitudeAwareGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.hooks import LayerSkipConfig
from diffusers.modular_pipelines.qwenimage import QwenImageAutoBlocks
from diffusers.modular_pipelines.stable_diffusion_3 import StableDiffusion3AutoBlocks
from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines.wan import Wan22Blocks, WanBlocks

import diffalign as da
from diffalign.core import COND, UNCOND, Guidance, Pass, StepInfo, UnsupportedModel
from diffalign.core.registry import from_config, make, techniques
from diffalign.guidance import CFG, AdaptiveGuidance, IntervalCFG, S2Guidance
from diffalign.guidance import SkipLayerGuidance as SLG
from diffalign.guidance.linear_ag import identity_of
from diffalign.guidance.linear_policy import LinearPolicy
from diffalign.seams.guiders_in import DiffusersGuider
from diffalign.seams.technique_guider import TechniqueGuider
from diffalign.testing.deep import deep_pipeline
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

pytestmark = pytest.mark.slow

BLOCKS = {
    "StableDiffusionXLPipeline": StableDiffusionXLAutoBlocks,
    "StableDiffusion3Pipeline": StableDiffusion3AutoBlocks,
    "QwenImagePipeline": QwenImageAutoBlocks,
    "WanPipeline": WanBlocks,
}
SD = "StableDiffusionPipeline"


# A diffusers guider on a classic pipeline
# -----------------------------------------------------------------------------------------


def classic(name, technique, scale=4.0, steps=3, batch=2, pipe=None, **options):
    pipe = tiny_pipeline(name) if pipe is None else pipe
    inputs = tiny_inputs(name, steps=steps, batch=batch)
    gate = "true_cfg_scale" if "true_cfg_scale" in inputs else "guidance_scale"
    with da.apply(pipe, technique) as session:
        return final(pipe, {**inputs, gate: scale, **options}), session.report()


@pytest.mark.parametrize(
    "name",
    [
        SD,
        "StableDiffusionXLPipeline",
        "StableDiffusion3Pipeline",
        "FluxPipeline",
        "WanPipeline",
        "QwenImagePipeline",
    ],
)
@pytest.mark.few(2)
def test_cfg_guider_is_cfg(name):
    ours, base = classic(name, CFG(4.0))
    theirs, report = classic(name, ClassifierFreeGuidance(guidance_scale=4.0))
    assert torch.equal(ours, theirs)
    assert (report.rows, report.guided_steps) == (base.rows, base.guided_steps)


@pytest.mark.slow
def test_cfg_guider_with_a_window_skips_the_pass():
    ours, _ = classic(SD, IntervalCFG(4.0, start=0.25, stop=0.75), steps=8)
    theirs, report = classic(
        SD, ClassifierFreeGuidance(guidance_scale=4.0, start=0.25, stop=0.75), steps=8
    )
    assert torch.equal(ours, theirs)
    assert report.rows == 2 * (8 + 4)
    used = ClassifierFreeGuidance(guidance_scale=4.0, start=0.25, stop=0.75)
    used.set_state(
        7, 8, torch.tensor(1.0)
    )  # as a run on a modular pipeline leaves it: past its window
    assert torch.equal(classic(SD, used, steps=8)[0], ours)
    off, report = classic(SD, ClassifierFreeGuidance(guidance_scale=1.0), steps=8)
    assert torch.equal(off, classic(SD, CFG(1.0), steps=8)[0])
    assert report.rows == 16


@dataclasses.dataclass(frozen=True, slots=True)
class ByHand(Guidance):
    """The same guider called as a user would call it, once per step, with its state kept on the
    object."""

    guider: object

    def passes(self, step, state):
        return (COND, UNCOND)

    def combine(self, preds, step, state):
        self.guider.set_state(
            step=step.index, num_inference_steps=step.count, timestep=torch.tensor(step.timestep)
        )
        pair = self.guider.prepare_inputs({"x": (torch.zeros(1), torch.zeros(1))})
        for batch, p in zip(pair, (COND, UNCOND)):
            batch.noise_pred = preds[p]
        return self.guider(pair).pred, None


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdaptiveProjectedGuidance(
            5.0,
            adaptive_projected_guidance_momentum=-0.5,
            eta=0.2,
            adaptive_projected_guidance_rescale=2.0,
        ),
        lambda: AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1),
        lambda: ClassifierFreeZeroStarGuidance(5.0, zero_init_steps=1),
        lambda: TangentialClassifierFreeGuidance(5.0),
        lambda: MagnitudeAwareGuidance(5.0, alpha=2.0),
        lambda: ClassifierFreeGuidance(5.0, guidance_rescale=0.7),
        lambda: ClassifierFreeGuidance(5.0, use_original_formulation=True),
    ],
    ids=["apg", "apg-mix", "zero-star", "tcfg", "magnitude", "rescale", "original"],
)
@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline"])
@pytest.mark.few(5)
def test_guiders_equal_calling_them_by_hand(make, name):
    given = make()
    if isinstance(given, MagnitudeAwareGuidance) and name != "FluxPipeline":
        with pytest.raises(
            RuntimeError, match="dim must be a 2-tuple"
        ):  # it takes a norm that torch has for packed latents only
            classic(name, given)
        return
    before = copy.deepcopy(vars(given))
    once, report = classic(name, given, steps=5)
    expected, _ = classic(name, ByHand(make()), steps=5)
    assert torch.equal(once, expected)
    assert torch.equal(classic(name, given, steps=5)[0], once)  # no momentum left over
    assert {k: str(v) for k, v in vars(given).items()} == {k: str(v) for k, v in before.items()}
    assert report.rows == 2 * 2 * 5
    assert not torch.equal(once, classic(name, CFG(5.0), steps=5)[0])


def test_state_of_a_guider_is_explicit():
    """Momentum moves with the rows; neither passes nor combine changes the state it is given."""
    technique = da.seams.guiders_in.as_technique(
        AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=0.5)
    )
    rng = torch.Generator().manual_seed(0)
    preds = [{p: torch.randn(3, 2, 4, 4, generator=rng) for p in (COND, UNCOND)} for _ in range(2)]
    steps = [StepInfo(i, 4, 1.0, timestep=1.0) for i in range(2)]
    start = technique.init(3)
    assert technique.passes(steps[0], start) == (COND, UNCOND)
    _, after = technique.combine(preds[0], steps[0], start)
    kept = after.guider.momentum_buffer.running_average.clone()
    whole, _ = technique.combine(preds[1], steps[1], after)
    assert torch.equal(after.guider.momentum_buffer.running_average, kept)
    assert start.guider.momentum_buffer is None
    turned = {p: v[[2, 0]] for p, v in preds[1].items()}
    part, _ = technique.combine(turned, steps[1], after.select([2, 0]))
    assert torch.allclose(
        part,
        whole[[2, 0]],
        rtol=0,
        atol=8 * torch.finfo(torch.float32).eps * whole.abs().max().item(),
    )
    wrong, _ = technique.combine(turned, steps[1], after.select([0, 2]))
    assert not torch.allclose(wrong, whole[[2, 0]], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "instead"),
    [
        (lambda: SkipLayerGuidance(skip_layer_config=LayerSkipConfig([1])), "da.SkipLayerGuidance"),
        (lambda: PerturbedAttentionGuidance(perturbed_guidance_layers=[1]), "da.PAG"),
        (lambda: SmoothedEnergyGuidance(seg_guidance_layers=[1]), "da.SEG"),
        (lambda: AutoGuidance(auto_guidance_layers=[1], dropout=0.1), "da.AutoGuidance"),
        (LTX2Guidance, r"LTX2Guidance combines up to 4 predictions \(pred_cond, .*_modality\)"),
    ],
)
def test_guiders_that_hook_layers_are_refused(make, instead):
    with pytest.raises(UnsupportedModel, match=instead):
        da.apply(tiny_pipeline(SD), make())


def test_settings_of_a_guider_round_trip():
    pipe = tiny_pipeline(SD)
    session = da.apply(pipe, AdaptiveProjectedGuidance(4.0, eta=0.3))
    saved = json.loads(json.dumps(session.config()))
    (again,) = da.techniques_of(saved)
    assert again == session.techniques[0]
    assert again.init(1).guider.eta == 0.3
    assert torch.equal(
        classic(SD, again)[0], classic(SD, AdaptiveProjectedGuidance(4.0, eta=0.3))[0]
    )
    assert (
        from_config({"name": "diffusers-guider", "guider": "ClassifierFreeGuidance"}).asked_scale
        == 7.5
    )
    with pytest.raises(ValueError, match="no guider 'Nothing'"):
        DiffusersGuider(guider="Nothing")
    with pytest.raises(ValueError, match="only one can form the prediction"):
        da.apply(pipe, CFG(), ClassifierFreeGuidance())


class Doubling(ClassifierFreeGuidance):
    """A guider of a user's own: the conditional prediction, twice."""

    def forward(self, pred_cond, pred_uncond=None):
        out = super().forward(pred_cond, pred_uncond)
        out.pred = 2 * pred_cond
        return out


def test_a_users_own_guider():
    @dataclasses.dataclass(frozen=True, slots=True)
    class Twice(Guidance):
        def passes(self, step, state):
            return (COND, UNCOND)

        def combine(self, preds, step, state):
            return 2 * preds[COND], None

    assert torch.equal(classic(SD, Doubling(3.0))[0], classic(SD, Twice())[0])


# Our techniques on modular pipelines
# ----------------------------------------------------------------------------------------------


def modular(name, guider=None, source=None, text=False):
    """A modular pipeline on the components of the tiny classic one; ``guider``: a function of the
    pipeline."""
    source = source or tiny_pipeline(name, text=text)
    blocks = BLOCKS[name]() if getattr(source, "transformer_2", None) is None else Wan22Blocks()
    for key in list(blocks.sub_blocks):
        if any(word in key for word in ("decode", "vae_encoder", "ip_adapter")) or (
            key == "text_encoder" and not text
        ):
            blocks.sub_blocks.pop(key)
    pipe = blocks.init_pipeline()
    pipe.update_components(
        **{
            k: v
            for k, v in source.components.items()
            if k in pipe._component_specs and v is not None
        }
    )
    if getattr(source, "transformer_2", None) is not None:
        pipe.register_to_config(boundary_ratio=0.5)
    if guider is not None:
        pipe.update_components(guider=guider(pipe))
    return pipe


def call(pipe, name, steps=4, batch=2, negative=True, **options):
    inputs = tiny_inputs(name, steps=steps, batch=batch)
    for key in ("output_type", "guidance_scale", "true_cfg_scale"):
        inputs.pop(key, None)
    inputs = {**inputs, **options}
    if name == "WanPipeline":
        inputs["negative_prompt_embeds"] = tiny_inputs(name, batch=batch, seed=9)[
            "prompt_embeds"
        ]  # equal shapes are asked for
        inputs.setdefault(
            "latents", torch.randn(batch, 4, 2, 4, 4, generator=torch.Generator().manual_seed(3))
        )  # the default is 16 channels
    if not negative:
        inputs = {k: v for k, v in inputs.items() if not k.startswith("negative")}
    return pipe(**inputs, output="latents")


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.slow
def test_cfg_on_modular_pipelines(name):
    native = call(modular(name, lambda _: ClassifierFreeGuidance(guidance_scale=4.0)), name)
    pipe = modular(name, lambda pipe: da.guider(CFG(4.0), pipe))
    assert torch.equal(call(pipe, name), native)
    report = pipe.guider.report()
    assert (
        report.rows,
        report.calls,
        report.nfe,
        report.steps,
        report.guided_steps,
        report.images,
    ) == (16, 8, 8.0, 4, 4, 2)
    windowed = call(
        modular(name, lambda _: ClassifierFreeGuidance(guidance_scale=4.0, start=0.25, stop=0.75)),
        name,
    )
    pipe = modular(name, lambda pipe: da.guider(IntervalCFG(4.0, start=0.25, stop=0.75), pipe))
    assert torch.equal(call(pipe, name), windowed)
    assert pipe.guider.report().rows == 2 * (4 + 2)
    assert not torch.equal(windowed, native)


class Later:
    """A judge that likes later candidates better."""

    sees = "x0"

    def score(self, latents, sigma, rows):
        return torch.arange(float(len(rows)))


# what a technique needs here beside its defaults
OPTIONS = {
    "adaptive-guidance": {"threshold": -1.0, "min_guided_steps": 1},
    "beta-cfg": {"gamma": 0.5},
    "dynamic-cfg": {"candidates": (1.0, 5.0), "evaluators": (Later(),)},
    "interval-cfg": {"stop": 0.5},
    "magnitude-aware": {"alpha": 0.5},
    "s2-guidance": {"blocks": ("*",), "start": 0.0, "stop": 1.0},
    "skip-layer-guidance": {"layers": (0,), "start": 0.0, "stop": 1.0},
    "auto-guidance": {},
}
GUIDANCES = [name for name, cls in techniques().items() if cls.seam == "denoiser"]


@pytest.mark.parametrize("technique", GUIDANCES)
@pytest.mark.parametrize(
    "name", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "WanPipeline"]
)
@pytest.mark.few(6)
def test_modular_is_classic_to_rounding(name, technique, tmp_path):
    """The same latents through a classic session and a modular guider; passes run in one batch
    there and one by one here."""
    source = tiny_pipeline(name)
    inputs = tiny_inputs(name, steps=4)
    if name == "WanPipeline":
        inputs["negative_prompt_embeds"] = tiny_inputs(name, seed=9)["prompt_embeds"]
    channels = source.components.get(
        "unet", source.components.get("transformer")
    ).config.in_channels
    sizes = {
        "StableDiffusionXLPipeline": (8, 8),
        "StableDiffusion3Pipeline": (4, 4),
        "WanPipeline": (2, 4, 4),
    }
    latents = torch.randn(1, channels, *sizes[name], generator=torch.Generator().manual_seed(0))
    inputs |= {"latents": latents, "guidance_scale": 4.0}
    options = OPTIONS.get(technique, {})
    if technique == "auto-guidance":
        weak = tiny_pipeline(name, seed=1)
        options = {"weak": weak.components.get("unet", weak.components.get("transformer"))}
    made = make(technique, options if technique == "cfg-plus-plus" else options | {"scale": 4.0})
    if technique == "linear-ag":
        plan, weights = (
            ("guided", "estimated", "guided", "conditional"),
            torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64),
        )
        LinearPolicy(
            identity_of(source, 4, 4.0, latents.shape[1:], ""), plan, {1: weights}, {}, {}, 0
        ).save(tmp_path / "policy")
        made = dataclasses.replace(made, policy=str(tmp_path / "policy"))
    pipe = modular(name, lambda pipe: da.guider(made, pipe), source=source)
    try:
        with da.apply(source, made) as session:
            expected = final(source, dict(inputs))
    # flow models only, first-order samplers only: by the same words through both doors
    except UnsupportedModel as refusal:
        with pytest.raises(
            UnsupportedModel, match=re.escape(str(refusal).replace(name, type(pipe).__name__))
        ):
            call(pipe, name, batch=1, latents=latents)
        return
    got = call(pipe, name, batch=1, latents=latents)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 64 * torch.finfo(
        torch.float32
    ).eps * expected.abs().max()
    shape = (
        technique == "beta-cfg" and name == "WanPipeline"
    )  # classic: one row more, to learn the prediction's shape
    assert pipe.guider.report().rows == session.report().rows - shape


class Always(ClassifierFreeGuidance):
    """diffusers counts Heun's evaluations as steps, and so stops guiding after half of them."""

    def _is_cfg_enabled(self):
        return True


@pytest.mark.slow
def test_evaluations_of_heun_are_not_steps():
    name = "StableDiffusionXLPipeline"
    pipe = modular(name)
    pipe.update_components(scheduler=HeunDiscreteScheduler.from_config(pipe.scheduler.config))
    pipe.update_components(guider=Always(guidance_scale=4.0))
    native = call(pipe, name)
    seen = []

    @dataclasses.dataclass(frozen=True, slots=True)
    class Look(CFG):
        def passes(self, step, state):
            seen.append((step.index, step.evaluation, step.count))
            return CFG.passes(self, step, state)

    pipe.update_components(guider=da.guider(Look(4.0), pipe))
    assert torch.equal(call(pipe, name), native)
    assert seen == [(i // 2, i % 2, 4) for i in range(7)]


def test_adaptive_guidance_saves_whole_calls():
    name = "StableDiffusion3Pipeline"
    native = call(modular(name, lambda _: ClassifierFreeGuidance(guidance_scale=4.0)), name)
    pipe = modular(name, lambda pipe: da.guider(AdaptiveGuidance(4.0, threshold=1.1), pipe))
    assert torch.equal(call(pipe, name), native)
    pipe = modular(
        name,
        lambda pipe: da.guider(AdaptiveGuidance(4.0, threshold=-1.0, min_guided_steps=1), pipe),
    )
    call(pipe, name)
    assert pipe.guider.report().rows == 2 * (4 + 1)
    assert pipe.guider.report().calls == 5


@dataclasses.dataclass(frozen=True, slots=True)
class FirstRowOnly(Guidance):
    """Guides the first image only."""

    def passes(self, step, state):
        return (COND, dataclasses.replace(UNCOND, rows=(0,)))

    def combine(self, preds, step, state):
        out = preds[COND].clone()
        assert len(preds[UNCOND]) == 1
        out[0] = step.mix(preds[COND][:1], preds[UNCOND], 4.0)[0]
        return out, None


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.few(1)
def test_rows_are_picked(name):
    pipe = modular(name, lambda pipe: da.guider(FirstRowOnly(), pipe))
    got = call(pipe, name)
    assert pipe.guider.report().rows == 4 * 3
    on = call(modular(name, lambda _: ClassifierFreeGuidance(guidance_scale=4.0)), name)
    off = call(modular(name, lambda _: ClassifierFreeGuidance(guidance_scale=1.0)), name)
    bound = 1e-5 * on.abs().max()  # one row alone rounds differently
    assert (got[0] - on[0]).abs().max() <= bound
    assert (got[1] - off[1]).abs().max() <= bound
    assert (on[1] - off[1]).abs().max() > 100 * bound


@pytest.mark.parametrize(
    "name",
    ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "QwenImagePipeline", "WanPipeline"],
)
@pytest.mark.few(1)
def test_skipped_blocks_on_modular_pipelines(name):
    source = deep_pipeline(name)
    technique = S2Guidance(4.0, start=0.0, stop=1.0, omega=2.0)
    pipe = modular(name, lambda pipe: da.guider(technique, pipe), source=source)
    got = call(pipe, name)
    assert pipe.guider.report().rows == 2 * 12
    assert not torch.equal(
        got,
        call(
            modular(name, lambda _: ClassifierFreeGuidance(guidance_scale=4.0), source=source), name
        ),
    )
    off = modular(
        name, lambda pipe: da.guider(dataclasses.replace(technique, omega=0.0), pipe), source=source
    )
    assert torch.equal(
        call(off, name),
        call(
            modular(name, lambda _: ClassifierFreeGuidance(guidance_scale=4.0), source=source), name
        ),
    )


@pytest.mark.slow
def test_skip_layer_guidance_is_that_of_diffusers_where_theirs_works():
    """Their hook works on the U-Net; at step 0 it never acts, so the windows are 1 to 3 of 4."""
    name = "StableDiffusionXLPipeline"
    layer = LayerSkipConfig([0], fqn="mid_block.attentions.0.transformer_blocks")
    theirs = SkipLayerGuidance(
        4.0,
        2.8,
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
        skip_layer_config=layer,
    )
    native = call(modular(name, lambda _: theirs), name)
    ours = SLG(4.0, layers=("mid_block.attentions.0.transformer_blocks.0",), start=0.25, stop=1.0)
    pipe = modular(name, lambda pipe: da.guider(ours, pipe))
    got = call(pipe, name)
    assert (got - native).abs().max() <= 64 * torch.finfo(
        torch.float32
    ).eps * native.abs().max()  # the sums are ordered differently
    assert pipe.guider.report().rows == 2 * (2 + 3 * 3)
    assert (
        native - call(modular(name, lambda _: ClassifierFreeGuidance(guidance_scale=4.0)), name)
    ).abs().max() > 1e-3


def test_conditions_are_not_stale_in_the_second_run():
    """diffusers' own guider answers 1 after a run whose last steps were not guided, and the
    negative prompt is then not encoded."""
    name = "StableDiffusionXLPipeline"
    pipe = modular(name, text=True)
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=4.0, stop=0.5))
    inputs = {
        "prompt": "a red apple",
        "negative_prompt": "blurry",
        "num_inference_steps": 4,
        "height": 16,
        "width": 16,
    }

    def run():
        return pipe(**inputs, generator=torch.Generator().manual_seed(0), output="latents")

    native = run()
    assert pipe.guider.num_conditions == 1
    made = da.guider(IntervalCFG(4.0, stop=0.5), pipe)
    pipe.update_components(guider=made)
    assert made.num_conditions == 2
    for _ in range(2):
        assert torch.equal(run(), native)
        assert made.num_conditions == 2
    one = da.guider(CFG(1.0), pipe)
    assert one.num_conditions == 1


def test_no_negative_prompt_is_an_error_not_a_silent_nothing():
    name = "StableDiffusion3Pipeline"
    pipe = modular(name, lambda pipe: da.guider(CFG(4.0), pipe))
    with pytest.raises(UnsupportedModel, match="no negative prompt embeddings"):
        call(pipe, name, negative=False)
    call(pipe, name)
    pipe.update_components(guider=da.guider(CFG(1.0), pipe))
    assert call(pipe, name, negative=False).isfinite().all()


def test_scale_of_the_pipelines_guider_is_taken_over():
    name = "StableDiffusion3Pipeline"
    pipe = modular(name, lambda _: ClassifierFreeGuidance(guidance_scale=3.5))
    made = da.guider(CFG(), pipe)
    assert made.guidance_scale == 3.5
    pipe.update_components(guider=made)
    call(pipe, name)
    assert made.report().resolved["cfg"]["scale"] == (3.5, "default of the pipeline")
    assert "4 of 4 steps" in str(made.report())


def test_disable_and_enable():
    name = "StableDiffusion3Pipeline"
    pipe = modular(name, lambda pipe: da.guider(CFG(4.0), pipe))
    on = call(pipe, name)
    pipe.guider.disable()
    assert pipe.guider.num_conditions == 1
    off = call(pipe, name)
    assert torch.equal(
        off, call(modular(name, lambda _: ClassifierFreeGuidance(guidance_scale=1.0)), name)
    )
    pipe.guider.enable()
    assert torch.equal(call(pipe, name), on)


def test_saved_and_loaded(tmp_path):
    name = "WanPipeline"
    pipe = modular(name, lambda pipe: da.guider(IntervalCFG(4.0, start=0.25, stop=0.75), pipe))
    expected = call(pipe, name)
    pipe.guider.save_pretrained(tmp_path)
    again = TechniqueGuider.from_pretrained(tmp_path)
    assert again.technique == IntervalCFG(4.0, start=0.25, stop=0.75)
    pipe.update_components(guider=again)
    with pytest.raises(UnsupportedModel, match="bind"):
        call(pipe, name)
    again.bind(pipe)
    assert torch.equal(call(pipe, name), expected)
    assert again.new().technique == again.technique


def test_a_copy_serves_the_same_pipeline():
    name = "WanPipeline"
    technique = IntervalCFG(4.0, start=0.25, stop=0.75)
    pipe = modular(name, lambda pipe: da.guider(technique, pipe))
    expected = call(pipe, name)
    pipe.update_components(guider=pipe.guider.new())
    assert pipe.guider.technique == technique
    assert torch.equal(call(pipe, name), expected)
    by_position = TechniqueGuider(technique).bind(pipe).new()
    assert by_position.technique == technique
    other = pipe.guider.new(technique=CFG(4.0))
    assert other.technique == CFG(4.0)


def test_two_experts_with_a_guider_each():
    name = "WanPipeline"
    source = tiny_pipeline(name, variant="2.2")
    native = modular(name, source=source)
    native.update_components(
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
        guider_2=ClassifierFreeGuidance(guidance_scale=2.0),
    )
    expected = call(native, name, steps=6)
    pipe = modular(name, source=source)
    high, low = da.guider(CFG(4.0), pipe), da.guider(CFG(2.0), pipe, denoiser="transformer_2")
    pipe.update_components(guider=high, guider_2=low)
    for _ in range(2):
        assert torch.equal(call(pipe, name, steps=6), expected)
        assert high.report().calls + low.report().calls == 12
        assert min(high.report().calls, low.report().calls) > 0


def test_the_second_experts_window_counts_all_steps():
    name = "WanPipeline"
    source = tiny_pipeline(name, variant="2.2")
    pipe = modular(name, source=source)
    seen = []

    @dataclasses.dataclass(frozen=True, slots=True)
    class Look(CFG):
        def passes(self, step, state):
            seen.append((step.index, step.count, step.timestep))
            return (COND,)

    pipe.update_components(
        guider=da.guider(Look(1.0), pipe),
        guider_2=da.guider(Look(1.0), pipe, denoiser="transformer_2"),
    )
    call(pipe, name, steps=6)
    times = [float(t) for t in pipe.scheduler.timesteps]
    assert seen == [(i, 6, times[i]) for i in range(6)]


def test_an_exception_in_the_denoiser_restores_it():
    name = "StableDiffusionXLPipeline"
    pipe = modular(name, lambda pipe: da.guider(CFG(4.0), pipe))
    expected, kind = call(pipe, name), type(pipe.unet)

    def fail(*_):
        raise RuntimeError("stop")

    hook = pipe.unet.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        call(pipe, name)
    assert type(pipe.unet) is kind
    hook.remove()
    assert torch.equal(call(pipe, name), expected)


def test_refusals():
    pipe = modular("StableDiffusion3Pipeline")
    with pytest.raises(TypeError, match="takes a guidance"):
        da.guider(da.PLADIS(), pipe)
    with pytest.raises(UnsupportedModel, match="not a modular pipeline that diffalign knows"):
        da.guider(CFG(4.0), tiny_pipeline(SD))
    with pytest.raises(UnsupportedModel, match="no component 'transformer_2'"):
        da.guider(CFG(4.0), pipe, denoiser="transformer_2")


def test_a_pass_sees_its_own_conditions():
    """``is_conditional`` by name, not by a count: the third pass of S2 carries the prompt, the
    second of two without CFG as well."""
    pipe = modular("StableDiffusion3Pipeline")
    made = da.guider(CFG(4.0), pipe)
    pipe.scheduler.set_timesteps(4)
    made.set_state(0, 4, pipe.scheduler.timesteps[0])
    made._run.passes = (COND, UNCOND, Pass("cond-skipped", True, blocks=()))
    seen = []
    for _ in made._run.passes:
        made.prepare_models(pipe.transformer)
        seen.append(made.is_conditional)
        made.cleanup_models(pipe.transformer)
    assert seen == [True, False, True]
