"""Seam 1: what a session may never break. Each test fails without the bullet of the design that it
names."""

import copy
import inspect
import json
import threading
import warnings
from dataclasses import dataclass
from itertools import pairwise

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionPipeline,
)
from diffusers.callbacks import PipelineCallback

import diffalign as da
from diffalign.core import (
    COND,
    UNCOND,
    Guidance,
    GuidanceMismatch,
    SessionError,
    UnsupportedModel,
    errors,
)
from diffalign.guidance import CFG
from diffalign.seams import swap
from diffalign.seams.denoiser import closed_loop
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

SD = "StableDiffusionPipeline"


def sd_inputs(scale=4.0, **more):
    return {
        **tiny_inputs(SD, steps=more.pop("steps", 3), batch=more.pop("batch", 1)),
        "guidance_scale": scale,
        **more,
    }


@pytest.fixture
def pipe():
    return tiny_pipeline(SD)


@dataclass(frozen=True, slots=True)
class Failing(Guidance[int]):
    """CFG that raises at one step, as a bug or a Ctrl-C would."""

    error: type[BaseException] = RuntimeError
    at: int = 1

    def passes(self, step, state):
        if step.index == self.at:
            raise self.error("stop")
        return (COND, UNCOND)

    def combine(self, preds, step, state):
        return step.mix(preds[COND], preds[UNCOND], 4.0), state


def assert_untouched(pipe, native):
    assert type(pipe) is StableDiffusionPipeline
    assert type(pipe.unet) is diffusers.UNet2DConditionModel
    assert type(pipe.scheduler).__dict__.get("_diffalign_base") is None
    assert da.active(pipe) == ()
    assert torch.equal(final(pipe, sd_inputs()), native)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_restores_everything(pipe, error):
    native = final(pipe, sd_inputs())
    with pytest.raises(error, match="stop"), da.apply(pipe, Failing(error)):
        final(pipe, sd_inputs())
    assert_untouched(pipe, native)


def test_an_exception_inside_a_lasting_session_leaves_it_usable(pipe):
    native = final(pipe, sd_inputs())
    da.enable(pipe, Failing())
    with pytest.raises(RuntimeError, match="stop"):
        final(pipe, sd_inputs())
    assert type(pipe.unet) is diffusers.UNet2DConditionModel
    da.disable(pipe)
    da.disable(pipe)  # harmless
    da.enable(pipe, CFG())
    assert torch.equal(final(pipe, sd_inputs()), native)
    da.disable(pipe)
    assert_untouched(pipe, native)


def test_cancel_stops_at_the_next_step(pipe):
    native = final(pipe, sd_inputs())
    with da.apply(pipe, CFG()) as session:

        def stop(pipe, index, time, kwargs):
            session.cancel()
            return kwargs

        with pytest.raises(da.Cancelled):
            final(pipe, sd_inputs(callback_on_step_end=stop))
        assert torch.equal(final(pipe, sd_inputs()), native)
    assert_untouched(pipe, native)


def test_nested_sessions_add_and_close_in_reverse_order(pipe):
    native = final(pipe, sd_inputs())
    outer, inner = da.apply(pipe), da.apply(pipe, CFG(4.0))
    with outer:
        with inner:
            assert da.active(pipe) == (CFG(4.0),)
            final(pipe, sd_inputs(scale=2.0))
            assert outer.report().guided_steps == inner.report().guided_steps == 3
            with pytest.raises(SessionError, match="opened later"):
                outer.close()
            with pytest.raises(SessionError, match="leave the block"):
                da.disable(pipe)
            with pytest.raises(ValueError, match="given twice"):
                da.apply(pipe, CFG(2.0))
            with pytest.raises(ValueError, match="only one can form the prediction"):
                da.apply(pipe, Failing())
        inner.close()  # idempotent
        assert torch.equal(final(pipe, sd_inputs()), native)
    with pytest.raises(SessionError, match="already active"), outer, outer:
        pass
    assert_untouched(pipe, native)


def test_two_runs_in_a_row_count_the_same(pipe):
    with da.apply(pipe, CFG()) as session:
        first, one = final(pipe, sd_inputs()), session.report()
        second, two = final(pipe, sd_inputs()), session.report()
    assert torch.equal(first, second)
    assert (one.calls, one.rows) == (two.calls, two.rows) == (3, 6)


def test_offload_keeps_the_tap(pipe, monkeypatch):
    """accelerate replaces ``forward`` and rebuilds its hooks after every call; simulated on the CPU
    with its own hook class."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    calls = []

    class Count(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(1)
            return args, kwargs

    def offload():
        remove_hook_from_module(pipe.unet, recurse=True)
        add_hook_to_module(pipe.unet, Count())

    offload()
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", offload)
    counts = []
    with da.apply(pipe, CFG()) as session:
        for _ in range(3):
            calls.clear()
            final(pipe, sd_inputs())
            counts.append((session.report().calls, len(calls)))
    assert counts == [(3, 3)] * 3
    calls.clear()
    final(pipe, sd_inputs())
    assert len(calls) == 3


def test_a_shared_unet_in_another_thread_is_left_alone(pipe):
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    native, plain = final(pipe, sd_inputs()), final(other, sd_inputs(scale=1.0))
    halfway, done, seen = threading.Event(), threading.Event(), {}

    def generate():
        halfway.wait(20)
        seen["other"] = final(other, sd_inputs(scale=1.0))
        done.set()

    def pause(pipe, index, time, kwargs):
        halfway.set()
        done.wait(20)
        return kwargs

    thread = threading.Thread(target=generate)
    thread.start()
    with da.apply(pipe, CFG()):
        mine = final(pipe, sd_inputs(callback_on_step_end=pause))
    thread.join(20)
    assert torch.equal(mine, native)
    assert torch.equal(seen["other"], plain)
    assert type(pipe.unet) is diffusers.UNet2DConditionModel


def test_overlapping_holders_restore_once_at_the_end():
    class Thing:
        def step(self):
            return "plain"

    thing = Thing()
    swap.acquire(thing, "step", lambda obj: None)
    swap.acquire(thing, "step", lambda obj: None)
    swap.release(thing)
    assert type(thing) is not Thing
    assert thing.step() == "plain"
    swap.release(thing)
    assert type(thing) is Thing


def test_one_generation_at_a_time(pipe):
    def again(pipe, index, time, kwargs):
        final(pipe, sd_inputs())
        return kwargs

    with da.apply(pipe, CFG()), pytest.raises(SessionError, match="already generating"):
        final(pipe, sd_inputs(callback_on_step_end=again))


@pytest.mark.slow
def test_compiled_denoiser_sees_two_classes_at_most(pipe):
    """The tapped class is made once: a compiled model settles at two frames (plain and tapped)."""
    import torch._dynamo

    torch._dynamo.reset()
    frames = []

    def backend(module, inputs):
        frames.append(1)
        return module.forward

    pipe.unet.compile(backend=backend, dynamic=False)
    try:
        native = final(pipe, sd_inputs())
        per_class = len(frames)
        for _ in range(4):
            with da.apply(pipe, CFG()):
                assert torch.equal(final(pipe, sd_inputs()), native)
        assert len(frames) <= 2 * per_class
        assert swap.subclass(type(pipe.unet), "__call__", swap.handler_of) is swap.subclass(
            type(pipe.unet), "__call__", swap.handler_of
        )
    finally:
        torch._dynamo.reset()


@pytest.mark.slow
def test_copies_and_saved_pipelines_are_plain(pipe, tmp_path):
    native = final(pipe, sd_inputs())
    with da.apply(pipe, CFG(9.0)):
        twin = copy.deepcopy(pipe)
        assert type(twin) is StableDiffusionPipeline
        assert isinstance(pipe, StableDiffusionPipeline)
        assert torch.equal(final(twin, sd_inputs()), native)
        pipe.save_pretrained(tmp_path, safe_serialization=True)
        related = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        auto = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(related) is type(auto) is diffusers.StableDiffusionImg2ImgPipeline
    assert "StableDiffusionPipeline" in (tmp_path / "model_index.json").read_text()


def test_copies_made_during_a_call_are_plain(pipe):
    found = []

    def snapshot(pipe, index, time, kwargs):
        found.append((copy.deepcopy(pipe.scheduler), copy.deepcopy(pipe.unet)))
        return kwargs

    with da.apply(pipe, CFG()):
        final(pipe, sd_inputs(callback_on_step_end=snapshot))
    assert {(type(s), type(u)) for s, u in found} == {
        (type(pipe.scheduler), diffusers.UNet2DConditionModel)
    }


@pytest.mark.parametrize(
    "make", [EulerAncestralDiscreteScheduler, DDIMScheduler, HeunDiscreteScheduler]
)
def test_wrappers_keep_signatures(pipe, make):
    """Pipelines inspect ``scheduler.step`` before they pass ``eta`` and ``generator``."""
    pipe.scheduler = make.from_config(pipe.scheduler.config)
    plain = inspect.signature(pipe.scheduler.step)
    seen = []

    def look(pipe, index, time, kwargs):
        seen.append(inspect.signature(pipe.scheduler.step))
        return kwargs

    native = final(pipe, sd_inputs(eta=1.0))
    with da.apply(pipe, CFG()) as session:
        assert inspect.signature(pipe.__call__) == inspect.signature(
            StableDiffusionPipeline.__call__.__get__(pipe)
        )
        got = final(pipe, sd_inputs(eta=1.0, callback_on_step_end=look))
    assert set(seen) == {plain}
    assert torch.equal(got, native)
    report = session.report()
    assert report.steps == 3
    assert report.calls == (5 if make is HeunDiscreteScheduler else 3)


def test_pipeline_side_skip_layers_are_refused():
    pipe = tiny_pipeline("StableDiffusion3Pipeline")
    given = tiny_inputs("StableDiffusion3Pipeline")
    with da.apply(pipe, CFG()), pytest.raises(UnsupportedModel, match="skip_guidance_layers"):
        final(pipe, {**given, "skip_guidance_layers": [0]})


def test_a_pipeline_that_changes_the_prediction_is_caught(pipe):
    """The closed loop: a subclass whose scheduler input is not the guided prediction stops the run
    at step 0."""

    class Meddling(DDIMScheduler):
        def scale_model_input(self, sample, timestep=None):
            return sample

    class Doubling(type(pipe.unet)):
        pass

    class Changed(StableDiffusionPipeline):
        @property
        def guidance_rescale(self):
            return 0.7

    odd = Changed(**pipe.components, requires_safety_checker=False)
    with da.apply(odd, CFG()), pytest.raises(GuidanceMismatch, match="step 0"):
        final(odd, sd_inputs())


@pytest.mark.parametrize("pending", [0, 1 << 20])
def test_a_change_after_the_first_step_is_caught_and_its_step_named(pipe, monkeypatch, pending):
    """Whether steps are compared one by one, as large latents are, or together at the end."""
    monkeypatch.setattr(closed_loop, "PENDING", pending)

    class Late(StableDiffusionPipeline):
        @property
        def guidance_rescale(self):
            return 0.7 if pipe.scheduler.seen > 2 else 0.0

    class Counting(DDIMScheduler):
        seen = 0

        def scale_model_input(self, sample, timestep=None):
            Counting.seen += 1
            return sample

    kept = pipe.scheduler
    pipe.scheduler = Counting.from_config(kept.config)
    try:
        odd = Late(**pipe.components, requires_safety_checker=False)
        with da.apply(odd, CFG()), pytest.raises(GuidanceMismatch, match="step 2"):
            final(odd, {**sd_inputs(), "num_inference_steps": 5})
    finally:
        pipe.scheduler = kept


def test_a_subclass_inherits_its_row(pipe):
    class Mine(StableDiffusionPipeline):
        pass

    mine = Mine(**pipe.components, requires_safety_checker=False)
    native = final(mine, sd_inputs())
    with da.apply(mine, CFG()):
        assert torch.equal(final(mine, sd_inputs()), native)


def test_a_prediction_that_is_not_finite_names_the_step(pipe):
    @dataclass(frozen=True, slots=True)
    class Blows(Guidance[None]):
        def passes(self, step, state):
            return (COND,)

        def combine(self, preds, step, state):
            return preds[COND] * (float("inf") if step.index == 1 else 1.0), None

    with da.apply(pipe, Blows()), pytest.raises(GuidanceMismatch, match="not finite at step 1"):
        final(pipe, sd_inputs())


def test_technique_scale_wins_over_the_call_with_one_warning(pipe):
    errors._WARNED.clear()
    native = final(pipe, sd_inputs(scale=6.0))
    with da.apply(pipe, CFG(6.0)) as session, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = [final(pipe, sd_inputs(scale=2.0)) for _ in range(2)]
    assert all(torch.equal(g, native) for g in got)
    assert [str(w.message) for w in caught if "scale" in str(w.message)] == [
        "The call asks for guidance scale 2 and CFG for 6; the technique's value is used."
    ]
    assert session.report().resolved["cfg"]["scale"] == (6.0, "")


def test_a_negative_prompt_without_effect_warns_once(pipe):
    errors._WARNED.clear()
    with da.apply(pipe, CFG(1.0)), pytest.warns(UserWarning, match="negative prompt has no effect"):
        final(pipe, sd_inputs(scale=1.0))


def test_sigma_and_progress_match_the_scheduler(pipe):
    seen = []

    @dataclass(frozen=True, slots=True)
    class Look(Guidance[None]):
        def passes(self, step, state):
            seen.append(step)
            return (COND, UNCOND)

        def combine(self, preds, step, state):
            return step.mix(preds[COND], preds[UNCOND], 4.0), None

    with da.apply(pipe, Look()):
        final(pipe, sd_inputs(steps=5))
    bars = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps]
    assert [s.index for s in seen] == [0, 1, 2, 3, 4]
    assert {s.count for s in seen} == {5}
    assert [s.sigma for s in seen] == pytest.approx(((1 - bars) / bars).sqrt().tolist(), rel=1e-6)
    assert [s.timestep for s in seen] == pipe.scheduler.timesteps.tolist()
    assert all(a.sigma_next == b.sigma for a, b in pairwise(seen))


def test_no_synchronisation_per_step(pipe, monkeypatch):
    """Scalars stay on the device: the number of host reads does not grow with the steps."""
    counts = {}

    def count(steps):
        reads = []
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
                inner = getattr(torch.Tensor, name)
                patch.setattr(
                    torch.Tensor,
                    name,
                    lambda self, *a, _inner=inner, **k: (reads.append(1), _inner(self, *a, **k))[1],
                )
            final(pipe, sd_inputs(steps=steps))
        return len(reads)

    for steps in (2, 8):
        native = count(steps)
        with da.apply(pipe, CFG()):
            counts[steps] = count(steps) - native
    assert counts[2] == counts[8] > 0


def test_gradients_flow_and_agree_with_finite_differences():
    """With gradients on, a two-call pipeline gets the algebraic form; nothing is written into a
    tensor autograd needs."""
    pipe = tiny_pipeline("WanPipeline", dtype=torch.float64)
    given = {**tiny_inputs("WanPipeline", dtype=torch.float64, steps=2), "guidance_scale": 4.0}
    pipe.set_progress_bar_config(disable=True)
    plain = type(pipe).__call__.__wrapped__
    noise = final(
        pipe, {**tiny_inputs("WanPipeline", dtype=torch.float64, steps=2), "guidance_scale": 4.0}
    )
    noise = torch.randn(
        noise.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )

    def loss(latents):
        return plain(pipe, **{**given, "latents": latents}).frames.square().sum()

    with da.apply(pipe, CFG()):
        from diffalign.seams.session import _handler

        handler = _handler(pipe)

        def guided(latents):
            bound = plain.__get__(pipe)
            return handler(bound, (), {**given, "latents": latents}).frames.square().sum()

        leaf = noise.clone().requires_grad_()
        value = guided(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
    native_leaf = noise.clone().requires_grad_()
    (native,) = torch.autograd.grad(loss(native_leaf), native_leaf)
    assert torch.allclose(value, loss(noise), rtol=1e-10)
    assert (gradient - native).abs().max() <= 1e-8 * native.abs().max()


@pytest.mark.parametrize("techniques", [("cfg",), (CFG,), (object(),)])
def test_apply_refuses_what_is_not_a_technique(pipe, techniques):
    with pytest.raises(TypeError, match="apply takes techniques"):
        da.apply(pipe, *techniques)


def test_unknown_pipelines_are_refused_with_the_reason():
    class Nothing:
        pass

    with pytest.raises(UnsupportedModel, match="not a pipeline class that diffalign knows"):
        da.apply(Nothing(), CFG())


def test_session_config_round_trip(pipe):
    session = da.apply(pipe, CFG(3.5))
    assert da.techniques_of(session.config()) == (CFG(3.5),)


@pytest.mark.parametrize("kind", ["function", "object"])
@pytest.mark.slow
def test_callbacks_run_outside_the_session(pipe, kind):
    """Another pipeline that shares the U-Net generates in a callback as it would alone, and is not
    counted."""
    other = tiny_pipeline(SD)
    other.unet = pipe.unet
    native = final(other, sd_inputs())
    found = []

    class Look(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            assert pipeline is pipe
            assert list(callback_kwargs) == ["latents"]
            found.append(final(other, sd_inputs()))
            return callback_kwargs

    def look(pipeline, index, timestep, values):
        assert pipeline is pipe
        found.append(final(other, sd_inputs()))
        return values

    callback = Look() if kind == "object" else look
    cls = type(callback)
    with da.apply(pipe, CFG(3.0), da.NAG()) as session:
        expected = final(pipe, sd_inputs())
        got = final(pipe, sd_inputs(callback_on_step_end=callback))
    assert len(found) == 3
    assert all(torch.equal(image, native) for image in found)
    assert torch.equal(got, expected)
    assert session.report().nfe == 6
    assert type(callback) is cls
    assert session.report().resolved["nag"]["scale"]


def test_reports_and_settings_are_strict_json(pipe):
    with da.apply(pipe, da.NAG(sigma=(0.5, float("inf")))) as session:
        final(pipe, sd_inputs())
    text = json.dumps([session.config(), session.report().to_dict()], allow_nan=False)
    (technique,) = da.techniques_of(json.loads(text)[0])
    assert technique == session.techniques[0]


def test_settings_of_a_contact_sheet_are_not_taken_for_techniques():
    with pytest.raises(ValueError, match="take one of its columns"):
        da.techniques_of({"columns": [{"techniques": []}]})
    with pytest.raises(ValueError, match=r"pass Session\.config"):
        da.techniques_of({})


@pytest.mark.parametrize(
    "technique",
    [da.IntervalCFG(3.0, sigma=(100.0, 200.0)), da.S2Guidance(3.0, sigma=(100.0, 200.0))],
)
def test_a_window_that_holds_no_step_is_said(pipe, technique):
    errors._WARNED.clear()
    with da.apply(pipe, technique) as session, pytest.warns(UserWarning, match="never acted"):
        final(pipe, sd_inputs(scale=3.0))
    assert any(
        note.startswith(f"{type(technique).__name__} never acted")
        for note in session.report().notes
    )
    with da.apply(pipe, type(technique)(3.0, start=0.0, stop=1.0)) as session:
        final(pipe, sd_inputs(scale=3.0))
    assert not any("never acted" in note for note in session.report().notes)


@pytest.mark.parametrize("wrong", [None, "emoji", StableDiffusionPipeline])
def test_what_is_no_pipeline_is_refused_by_name(wrong):
    for door in (da.apply, da.enable, lambda pipe, _: da.supports(pipe)):
        with pytest.raises(
            da.UnsupportedModel, match="is not a pipeline class that diffalign knows"
        ):
            door(wrong, CFG())
    with pytest.raises(ValueError, match=r"preset\(name="):
        da.preset(tiny_pipeline(SD), "fast")  # the other way round
