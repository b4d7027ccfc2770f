"""Subclasses, wrappers, callbacks and settings that people bring: right, or refused by name."""

import functools
import json

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback
from peft import LoraConfig, get_peft_model

import diffalign as da
from diffalign.core.identity import model_hash
from diffalign.testing import tiny_inputs, tiny_pipeline
from diffalign.testing.beside.memory import dequantised, quantised
from diffalign.testing.final import final

SD, SDXL, SD3 = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
)
WAN = "WanPipeline"


class Mine(StableDiffusionPipeline):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class Mine3(StableDiffusion3Pipeline):
    def __call__(self, prompt=None, *args, note=None, **kwargs):
        return super().__call__(prompt, *args, **kwargs)


class LoggedDDIM(DDIMScheduler):
    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


class LoggedFlow(FlowMatchEulerDiscreteScheduler):
    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


class Parallel(torch.nn.Module):
    """What data-parallel wrappers look like from outside."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def same(pipe, name, *techniques, inputs=None, **options):
    """The pipeline's result without a session and with ``techniques``: their largest difference."""
    call = inputs or (lambda: tiny_inputs(name, **options))
    plain = final(pipe, call())
    with da.apply(pipe, *techniques) as session:
        ours = final(pipe, call())
    assert torch.equal(final(pipe, call()), plain), "something was left behind"
    return float((plain - ours).abs().max()), session.report()


# -- names and defaults of the described class -----------------------------------------------------


@pytest.mark.parametrize(("cls", "name"), [(Mine, SD), (Mine3, SD3)])
def test_a_subclass_with_any_arguments_keeps_its_guidance(cls, name):
    pipe = cls(**tiny_pipeline(name).components)

    def call():
        inputs = tiny_inputs(name, steps=3)
        inputs.pop("guidance_scale", None)
        return inputs

    difference, report = same(pipe, name, da.CFG(), inputs=call)
    assert difference == 0.0
    assert report.nfe == 6
    assert same(pipe, name, da.PLADIS(0.0), inputs=call)[1].images == 1


@pytest.mark.parametrize(("cls", "name"), [(LoggedDDIM, SD), (LoggedFlow, SD3)])
def test_a_scheduler_with_any_arguments(cls, name):
    pipe = tiny_pipeline(name)
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    assert same(pipe, name, da.CFG())[0] == 0.0


@pytest.mark.parametrize("name", [SD, SDXL, SD3, WAN])
def test_a_wrapped_denoiser(name):
    pipe = tiny_pipeline(name)
    attribute = "unet" if hasattr(pipe, "unet") else "transformer"
    setattr(pipe, attribute, Parallel(getattr(pipe, attribute)))
    assert same(pipe, name, da.CFG())[0] == 0.0


@pytest.mark.parametrize("name", [SD, SDXL, SD3])
def test_a_peft_model(name):
    pipe = tiny_pipeline(name)
    attribute = "unet" if hasattr(pipe, "unet") else "transformer"
    config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    setattr(pipe, attribute, get_peft_model(getattr(pipe, attribute), config))
    assert same(pipe, name, da.CFG())[0] == 0.0


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionControlNetPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetUnionPipeline",
    ],
)
@pytest.mark.slow
def test_a_compiled_controlnet(name):
    pipe = tiny_pipeline(name)
    pipe.controlnet = torch.compile(pipe.controlnet, backend="eager")
    assert same(pipe, name, da.CFG())[0] == 0.0


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
@pytest.mark.parametrize("technique", [da.CFG(), da.S2Guidance(blocks=("mid_block*",))])
def test_timesteps_of_any_kind(kind, technique):
    pipe, steps = tiny_pipeline(SDXL), [900, 600, 300, 100]
    with da.apply(pipe, technique) as session:
        final(pipe, {**tiny_inputs(SDXL), "timesteps": kind(steps)})
    assert session.report().steps == 4


# -- taps that may be shadowed ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [SD, SDXL, SD3])
def test_a_step_that_was_set_on_the_object(name):
    pipe = tiny_pipeline(name)
    technique = da.IntervalCFG(stop=0.5)
    with da.apply(pipe, technique):
        expected = final(pipe, tiny_inputs(name, steps=4))
    shadow = pipe.scheduler.step = functools.partial(type(pipe.scheduler).step, pipe.scheduler)
    with da.apply(pipe, technique) as session:
        assert torch.equal(final(pipe, tiny_inputs(name, steps=4)), expected)
    assert session.report().guided_steps == 2
    assert vars(pipe.scheduler)["step"] is shadow


def test_a_run_that_never_steps_is_an_error(monkeypatch):
    """A pipeline that swaps its scheduler for an object of its own, past every tap."""
    pipe, source = tiny_pipeline(SD), StableDiffusionPipeline.__call__

    def bypass(pipe, **kwargs):
        scheduler, pipe.scheduler = pipe.scheduler, Direct(pipe.scheduler)
        try:
            return source(pipe, **kwargs)
        finally:
            pipe.scheduler = scheduler

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", functools.wraps(source)(bypass))
    with da.apply(pipe, da.CFG(3.0)), pytest.raises(da.GuidanceMismatch, match="never scheduler"):
        pipe(**tiny_inputs(SD, steps=2))


class Direct:
    """A scheduler whose step calls the class's function past every tap."""

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def step(self, model_output, timestep, sample, return_dict=True):
        real = type(self.scheduler).__mro__[1].step
        return real(self.scheduler, model_output, timestep, sample, return_dict=return_dict)

    def __getattr__(self, name):
        return getattr(self.__dict__["scheduler"], name)

    def __len__(self):
        return len(self.scheduler)


@pytest.mark.parametrize(
    ("name", "technique"),
    [
        (SD, da.CFG(3.0)),
        (SD, da.APG(8.0)),
        (SD, da.PLADIS(1.7)),
        (SDXL, da.APG(8.0)),
        (SD3, da.APG(8.0)),
        (WAN, da.PLADIS(1.7)),
    ],
)
def test_the_undecorated_call_runs_in_the_session_with_gradients(name, technique):
    pipe = tiny_pipeline(name)

    def call():
        inputs = {**tiny_inputs(name, steps=2), "return_dict": False}
        return pipe.__call__.__wrapped__(pipe, **inputs)[0]

    plain = call()
    with da.apply(pipe, technique) as session:
        ours = call()
    assert plain.requires_grad
    assert ours.requires_grad
    assert session.report().steps == 2
    with da.apply(pipe, technique):
        assert torch.allclose(final(pipe, tiny_inputs(name, steps=2)), ours.detach(), atol=1e-5)


# -- attributes that callbacks read and write ------------------------------------------------------


def ramp(attribute="_guidance_scale", values=(5.0, 5.0)):
    """A callback that raises the scale, and what it has read before."""
    read = []

    def callback(pipe, index, timestep, tensors):
        read.append(getattr(pipe, attribute.removeprefix("_")))
        setattr(pipe, attribute, values[0])
        return tensors

    return callback, read


@pytest.mark.parametrize("name", [SD, SDXL, SD3, WAN, "ZImagePipeline"])
def test_a_callback_that_changes_the_scale(name):
    pipe = tiny_pipeline(name)
    results = []
    for techniques in ((), (da.CFG(),)):
        callback, read = ramp()
        with da.apply(pipe, *techniques):
            inputs = {**tiny_inputs(name, steps=4), "guidance_scale": 3.0}
            results.append((final(pipe, {**inputs, "callback_on_step_end": callback}), read))
    (plain, first), (ours, second) = results
    assert torch.equal(plain, ours)
    assert first == second == [3.0, 5.0, 5.0, 5.0]


@pytest.mark.parametrize("technique", [da.CFG(), da.CFG(3.0), da.APG(), da.AdaptiveGuidance()])
def test_a_callback_that_ends_the_guidance(technique):
    pipe = tiny_pipeline(SD)
    end = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)

    def call():
        inputs = tiny_inputs(SD, steps=4)
        return final(pipe, {**inputs, "guidance_scale": 3.0, "callback_on_step_end": end})

    plain = call()
    with da.apply(pipe, technique) as session:
        ours = call()
    assert session.report().guided_steps == 2
    if isinstance(technique, da.CFG):
        assert torch.equal(ours, plain)


def test_two_calls_ended_by_a_callback():
    pipe = tiny_pipeline(WAN)

    def end(pipe, index, timestep, tensors):
        pipe._guidance_scale = 0.0
        return tensors

    def call():
        return final(pipe, {**tiny_inputs(WAN, steps=3), "callback_on_step_end": end})

    plain = call()
    with da.apply(pipe, da.CFG()) as session:
        assert torch.equal(call(), plain)
    assert session.report().guided_steps == 1


@pytest.mark.parametrize("name", [SD, SDXL, SD3])
def test_public_values_are_the_users_after_the_call_and_after_an_error(name):
    pipe = tiny_pipeline(name)
    inputs = {**tiny_inputs(name, steps=2), "guidance_scale": 3.0}
    with da.apply(pipe, da.CFG()):
        final(pipe, dict(inputs))
    assert pipe.guidance_scale == 3.0

    def fails(*_):
        raise KeyError("mine")

    with da.apply(pipe, da.CFG()), pytest.raises(KeyError, match="mine"):
        final(pipe, {**inputs, "guidance_scale": 4.0, "callback_on_step_end": fails})
    assert pipe.guidance_scale == 4.0


def test_a_scale_of_its_own_wins_over_a_callback_with_a_warning():
    pipe = tiny_pipeline(SD)
    callback, _ = ramp()

    def call(**more):
        return final(pipe, {**tiny_inputs(SD, steps=3), "guidance_scale": 3.0, **more})

    with da.apply(pipe, da.CFG(3.0)):
        plain = call()
        with pytest.warns(UserWarning, match="scale of its own"):
            assert torch.equal(call(callback_on_step_end=callback), plain)


@pytest.mark.parametrize(
    "name",
    [
        WAN,
        pytest.param("WanImageToVideoPipeline", marks=pytest.mark.slow),
        pytest.param("WanVACEPipeline", marks=pytest.mark.slow),
    ],
)
def test_one_gate_over_two_scales(name):
    """Wan 2.2 guides neither expert when its first scale is 1."""
    pipe = tiny_pipeline(name, variant="2.2")
    for scale, second in ((1.0, 4.0), (4.0, 1.0), (4.0, 2.0)):
        scales = {"guidance_scale": scale, "guidance_scale_2": second}
        plain = final(pipe, {**tiny_inputs(name, variant="2.2", steps=6), **scales})
        with da.apply(pipe, da.CFG()):
            ours = final(pipe, {**tiny_inputs(name, variant="2.2", steps=6), **scales})
        torch.testing.assert_close(ours, plain, rtol=0, atol=0 if scale == 1.0 else 1e-5)


# -- identity --------------------------------------------------------------------------------------


def test_a_model_is_itself_in_another_dtype_fused_or_with_an_adapter_of_no_effect():
    plain = model_hash(tiny_pipeline(SD).unet)
    assert model_hash(tiny_pipeline(SD).unet.to(torch.bfloat16)) == plain
    fused = tiny_pipeline(SD)
    fused.unet.fuse_qkv_projections()
    assert model_hash(fused.unet) == plain
    for zero in (True, False):
        pipe = tiny_pipeline(SD)
        config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=zero)
        pipe.unet.add_adapter(config)
        assert (model_hash(pipe.unet) == plain) is zero
        pipe.unet.disable_adapters()
        assert model_hash(pipe.unet) == plain
    other = tiny_pipeline(SD)
    with torch.no_grad():
        other.unet.conv_out.weight.flatten()[0] += 1.0
    assert model_hash(other.unet) != plain


@pytest.mark.parametrize("name", [SD, SD3, WAN])
def test_a_quantised_model_is_another_model(name):
    """And the same as one with the values that its bits stand for."""
    pipe, other = tiny_pipeline(name), tiny_pipeline(name)
    attribute = "unet" if name == SD else "transformer"
    plain = model_hash(getattr(pipe, attribute))
    with quantised(pipe), dequantised(other):
        known = model_hash(getattr(pipe, attribute))
        assert known == model_hash(getattr(other, attribute)) != plain
        with da.apply(pipe, da.AdaptiveGuidance()):  # which asks what is known of this model
            assert final(pipe, tiny_inputs(name, steps=2)).isfinite().all()


def test_shipped_folders_run_as_they_are_loaded():
    from diffalign.embedded.load import FOLDER

    folders = sorted(path.parent for path in FOLDER.glob("*/model_index.json"))
    assert folders
    for folder in folders:
        check_folder(folder)


def check_folder(folder):
    index = json.loads((folder / "model_index.json").read_text())
    pipe = getattr(diffusers, index["_class_name"]).from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    # the class's own size and length are those of a large model
    clip = {"height": 64, "width": 64, "num_frames": 13}
    call = clip if index["_class_name"] == "AnyFlowFARPipeline" else {}
    (image,) = pipe(
        "a photo of a red apple", num_inference_steps=2, output_type="pt", return_dict=False, **call
    )[:1]
    assert image.dtype == torch.float32
    denoiser = "unet" if "unet" in index else "transformer"
    for part, library in ((denoiser, diffusers), ("text_encoder", transformers)):
        cls = getattr(library, index[part][1])
        model = cls.from_pretrained(folder, subfolder=part, local_files_only=True)
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}, part
    pipe = DiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.bfloat16, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    (latents,) = pipe(
        "a red apple", num_inference_steps=1, output_type="latent", return_dict=False, **call
    )[:1]
    assert latents.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name", ["StableDiffusionXL", "StableDiffusion3", "QwenImage", "Wan", "Wan22"]
)
def test_modular_pipelines_are_sent_to_guiders(name):
    import diffusers

    cls = getattr(diffusers, f"{name}ModularPipeline")
    with pytest.raises(da.UnsupportedModel, match=r"da\.guider\(technique, pipe\)"):
        da.apply(cls.__new__(cls), da.CFG(3.0))


# -- reports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("technique", [da.APG(3.0), da.CFG(3.0), da.RescaledCFG(3.0)])
def test_branches_that_agree_have_no_direction(technique):
    pipe = tiny_pipeline(SD)
    inputs = tiny_inputs(SD, steps=3)
    inputs["negative_prompt_embeds"] = inputs["prompt_embeds"]
    with da.apply(pipe, technique) as session:
        final(pipe, inputs)
    report = session.report()
    assert report.scale == report.orthogonal == [None] * 3
    assert report.cosine == pytest.approx([1.0] * 3)
    assert "nan" not in str(report)
