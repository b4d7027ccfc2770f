"""NAG's options, when it acts and what it costs; the formula is tested in test_lockstep.py and
kernels/test_nag.py, its text in test_text.py."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from diffusers import UNet2DConditionModel

import diffalign as da
from diffalign.core import AttentionTechnique, errors
from diffalign.core.registry import from_config, parse, to_config
from diffalign.families import FAMILIES, family_of
from diffalign.guidance import IntervalCFG
from diffalign.seams.plan import context_of
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

ALWAYS = (0.0, math.inf)
SD, FLUX = "StableDiffusionPipeline", "FluxPipeline"


def nag(scale=4.0, **options):
    return da.NAG(scale, **{"tau": 1.6, "alpha": 0.7, "sigma": ALWAYS, **options})


def count_encodings(pipe, monkeypatch):
    calls = []
    encode = type(pipe).encode_prompt

    def counted(self, *args, **kwargs):
        calls.append(kwargs)
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "encode_prompt", counted)
    return calls


@pytest.mark.parametrize(
    "name", [SD, FLUX, "Lumina2Pipeline", "PixArtAlphaPipeline", "ZImagePipeline"]
)
@pytest.mark.parametrize("options", [{"scale": 1.0}, {"alpha": 0.0}])
def test_off_is_the_plain_pipeline(name, options):
    pipe = tiny_pipeline(name)
    native = final(pipe, tiny_inputs(name, steps=2))
    with da.apply(pipe, nag(**options)) as session:
        assert torch.equal(final(pipe, tiny_inputs(name, steps=2)), native)
    report = session.report()
    assert report.layers["NAG"][0] == 0 < report.layers["NAG"][1]
    assert report.nfe == report.nfe_cfg
    assert report.notes == []


def test_off_encodes_no_negative(monkeypatch):
    pipe = tiny_pipeline(SD, text=True)
    calls = count_encodings(pipe, monkeypatch)
    with da.apply(pipe, nag(1.0, negative_prompt="blurry")):
        final(pipe, tiny_inputs(SD, text=True, guided=False))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "name",
    {family.name: name for name, family in reversed(FAMILIES.items()) if family.attention}.values(),
)
def test_negative_equal_to_the_prompt_changes_nothing_but_rounding(name):
    pipe = tiny_pipeline(name, dtype=torch.float64)

    def inputs():
        return tiny_inputs(name, steps=2, guided=False, dtype=torch.float64)

    same = {
        f"negative_{key}": value
        for key, value in inputs().items()
        if key in FAMILIES[name].encoder.arguments
    }
    native = final(pipe, inputs())
    with da.apply(pipe, nag(negative_embeds=same)):
        got = final(pipe, inputs())
    # the scheduler rounds to float32; each of two steps may flip one last bit
    assert (got - native).abs().max() <= 4 * torch.finfo(torch.float32).eps * native.abs().max()


def test_window_stops_the_negative_text():
    """Outside the window the calls are the plain pipeline's, bit for bit, on the same latents."""
    pipe = tiny_pipeline(FLUX)
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].shape[1]),
        with_kwargs=True,
    )
    with da.apply(pipe, nag(sigma=None, start=0.25, stop=0.75)) as session:
        final(pipe, tiny_inputs(FLUX, steps=4, guided=False))
    handle.remove()
    assert seen == [7, 14, 14, 7]
    assert session.report().layers["NAG"] == (2, 2)
    native = final(pipe, tiny_inputs(FLUX, steps=4, guided=False))
    with da.apply(
        pipe, nag(sigma=(0.999, 1.0))
    ) as session:  # sigma of the first step is 1, which the half-open window excludes
        assert torch.equal(final(pipe, tiny_inputs(FLUX, steps=4, guided=False)), native)
    assert session.report().layers["NAG"] == (0, 2)


def test_unconditional_rows_and_calls_are_untouched():
    """CFG's negative branch, in the batch or in a call of its own, is the plain model's."""
    for name, size in ((SD, 2), (FLUX, 2), ("ZImagePipeline", 2)):
        pipe = tiny_pipeline(name)
        seen = []

        def keep(module, given, output, seen=seen):
            value = output[0] if isinstance(output, tuple) else output.sample
            seen.append(torch.stack(value) if isinstance(value, list) else value.clone())

        handle = (getattr(pipe, "unet", None) or pipe.transformer).register_forward_hook(keep)
        final(pipe, tiny_inputs(name, batch=size, steps=1))
        with da.apply(pipe, nag()):
            final(pipe, tiny_inputs(name, batch=size, steps=1))
        handle.remove()
        if name == FLUX:  # cond, uncond; cond, uncond
            assert torch.equal(seen[1], seen[3])
            assert not torch.equal(seen[0], seen[2])
        else:
            cond, uncond = (
                (slice(0, size), slice(size, 2 * size))
                if name == "ZImagePipeline"
                else (slice(size, None), slice(0, size))
            )
            bound = 64 * torch.finfo(torch.float32).eps * seen[0].abs().max()
            assert (seen[0][uncond] - seen[1][uncond]).abs().max() <= bound
            assert (seen[0][cond] - seen[1][: 2 * size][cond]).abs().max() > 1e3 * bound


@pytest.mark.parametrize(
    "name",
    [SD, "PixArtAlphaPipeline", "StableDiffusion3Pipeline", "Lumina2Pipeline", "ZImagePipeline"],
)
def test_rows_do_not_mix(name):
    """Two images in one batch are each alone."""
    pipe = tiny_pipeline(name, dtype=torch.float64)

    def one(row):
        given = tiny_inputs(
            name, batch=2, steps=1 if name != "PixArtAlphaPipeline" else 2, dtype=torch.float64
        )
        for key, value in given.items():
            if isinstance(value, torch.Tensor) or (isinstance(value, list) and len(value) == 2):
                given[key] = value[row : row + 1]
        return given

    with da.apply(pipe, nag()):
        both = final(
            pipe,
            tiny_inputs(
                name, batch=2, steps=1 if name != "PixArtAlphaPipeline" else 2, dtype=torch.float64
            ),
        )
        alone = torch.cat([final(pipe, one(row)) for row in (0, 1)])
    # the scheduler rounds to float32
    assert (both - alone).abs().max() <= 4 * torch.finfo(torch.float32).eps * both.abs().max()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (SD, {"scale": 3.0, "tau": 2.5, "alpha": 0.375, "sigma": (4.0, math.inf)}),
        (
            "StableDiffusionXLPipeline",
            {"scale": 3.0, "tau": 2.5, "alpha": 0.5, "sigma": (4.0, math.inf)},
        ),
        (
            "StableDiffusion3Pipeline",
            {"scale": 5.0, "tau": 2.5, "alpha": 0.125, "sigma": (0.75, math.inf)},
        ),
        (FLUX, {"scale": 5.0, "tau": 2.5, "alpha": 0.25, "sigma": (0.75, math.inf)}),
        (
            "FluxKontextPipeline",
            {"scale": 3.0, "tau": 2.5, "alpha": 0.25, "sigma": (0.75, math.inf)},
        ),
        ("SanaPipeline", {"scale": 5.0, "tau": 2.5, "alpha": 0.375}),
        ("PixArtSigmaPipeline", {"scale": 5.0, "tau": 2.5, "alpha": 0.375}),
        ("WanPipeline", {"scale": 5.0, "tau": 2.5, "alpha": 0.25}),
        ("QwenImagePipeline", {"scale": 5.0, "tau": 2.5, "alpha": 0.25}),
    ],
)
def test_published_values_are_the_defaults(name, expected):
    """Table 5 of the paper gives phi; our scale is phi + 1."""
    pipe = tiny_pipeline(name)
    with da.apply(pipe, da.NAG()) as session:
        final(
            pipe, tiny_inputs(name, steps=10)
        )  # so many that the first noise level is above the window's
    resolved = session.report().resolved["nag"]
    assert {key: resolved[key][0] for key in expected} == expected
    assert all(resolved[key][1] for key in expected)
    assert ("sigma" in resolved) == ("sigma" in expected)


def test_what_the_user_gives_is_not_resolved():
    pipe = tiny_pipeline(FLUX)
    with da.apply(pipe, da.NAG(2.0, tau=1.5, start=0.5)) as session:
        final(pipe, tiny_inputs(FLUX, steps=2))
    resolved = session.report().resolved["nag"]
    assert resolved["scale"] == (2.0, "")
    assert resolved["tau"] == (1.5, "")
    assert resolved["start"] == (0.5, "")
    assert resolved["alpha"][1] != ""
    assert "sigma" not in resolved


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"tau": 0.9}, ValueError, "tau"),
        ({"alpha": 1.5}, ValueError, "alpha"),
        ({"scale": math.inf}, ValueError, "scale"),
        ({"norm": "l3"}, ValueError, "norm"),
        ({"layers": "attn*"}, TypeError, "layers"),
        ({"negative_prompt": 3}, TypeError, "negative_prompt"),
        ({"negative_prompt": ("a", 3)}, ValueError, "negative_prompt"),
        ({"negative_prompt": ()}, ValueError, "negative_prompt"),
        ({"negative_embeds": {"prompt_embeds": None}}, TypeError, "negative_embeds"),
        (
            {"negative_embeds": {"negative_prompt_embeds": None}, "negative_prompt": "a"},
            ValueError,
            "not both",
        ),
        ({"sigma": (2.0, 1.0)}, ValueError, "sigma"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        da.NAG(**options)


def test_settings_round_trip():
    (made,) = parse(
        'nag:scale=3,negative-prompt="blurry, low quality",norm=l2,layers=("up_blocks.*")'
    )
    assert made == da.NAG(
        3.0, negative_prompt="blurry, low quality", norm="l2", layers=("up_blocks.*",)
    )
    many = da.NAG(negative_prompt=["a", "b"], sigma=(0.5, 1.0))
    for technique in (made, many):
        assert from_config(json.loads(json.dumps(to_config(technique)))) == technique
    saved = to_config(da.NAG(negative_embeds={"negative_prompt_embeds": torch.zeros(1)}))
    json.dumps(saved)
    with pytest.raises(TypeError, match="negative_embeds"):
        from_config(saved)


def test_published_layout_is_flux_only():
    pipe = tiny_pipeline(SD)
    with (
        pytest.raises(da.UnsupportedModel, match="published layout of Flux"),
        da.apply(pipe, nag(share_image=False)),
    ):
        final(pipe, tiny_inputs(SD))
    pipe = tiny_pipeline("AuraFlowPipeline")
    with pytest.raises(da.UnsupportedModel, match="not known"), da.apply(pipe, nag()):
        final(pipe, tiny_inputs("AuraFlowPipeline"))
    context = context_of(pipe, family_of(type(pipe)))
    assert "not known" in nag().refuses(context)


def test_two_rows_need_equal_lengths_where_there_is_no_mask():
    pipe = tiny_pipeline(FLUX)
    short = {
        "negative_prompt_embeds": torch.zeros(1, 5, 32),
        "negative_pooled_prompt_embeds": torch.zeros(1, 16),
    }
    with (
        pytest.raises(da.UnsupportedModel, match="7 tokens; got 5"),
        da.apply(pipe, nag(share_image=False, negative_embeds=short)),
    ):
        final(pipe, tiny_inputs(FLUX))
    with (
        pytest.raises(ValueError, match="pooled"),
        da.apply(
            pipe,
            nag(
                share_image=False, negative_embeds={"negative_prompt_embeds": torch.zeros(1, 7, 32)}
            ),
        ),
    ):
        final(pipe, tiny_inputs(FLUX))


def test_no_warning_about_a_negative_prompt_that_nag_reads(recwarn):
    pipe = tiny_pipeline(SD, text=True)
    with da.apply(pipe, da.CFG(1.0), nag()):
        final(pipe, {**tiny_inputs(SD, text=True), "guidance_scale": 1.0})
    assert not [w for w in recwarn if "no effect" in str(w.message)]


def test_the_warning_comes_where_nag_does_not_read_it():
    pipe = tiny_pipeline(SD, text=True)
    for technique in (nag(1.0), nag(negative_prompt="blue")):
        errors._WARNED.clear()
        with da.apply(pipe, da.CFG(1.0), technique), pytest.warns(UserWarning, match="no effect"):
            final(pipe, {**tiny_inputs(SD, text=True), "guidance_scale": 1.0})


IMG2IMG = "StableDiffusionXLImg2ImgPipeline"


def late(pipe, *techniques):
    """An image-to-image call that begins at a third of the noise, and its report."""
    with da.apply(pipe, *techniques) as session:
        got = final(pipe, {**tiny_inputs(IMG2IMG, steps=10), "strength": 0.3})
    return got, session.report()


def test_a_default_window_before_the_run_begins_is_dropped():
    """Image-to-image starts below the noise level at which the family's default window ends."""
    pipe = tiny_pipeline(IMG2IMG)
    got, report = late(pipe, da.NAG())
    assert not torch.equal(got, late(pipe)[0])
    acting, selected = report.layers["NAG"]
    assert acting == selected > 0
    window, source = report.resolved["nag"]["sigma"]
    assert window == ALWAYS
    assert "begins at" in source
    assert not {"start", "stop"} & set(report.resolved["nag"])


def test_a_window_of_the_users_that_never_acts_is_said():
    pipe = tiny_pipeline(IMG2IMG)
    errors._WARNED.clear()
    with pytest.warns(UserWarning, match=r"NAG never acted.*sigma=\(0, inf\)"):
        got, report = late(pipe, da.NAG(sigma=(50.0, 60.0)))
    assert torch.equal(got, late(pipe)[0])
    assert any("never acted" in note for note in report.notes)
    assert not any("never acted" in note for note in late(pipe, da.NAG(1.0))[1].notes)


@pytest.mark.parametrize("technique", [nag(), da.PLADIS()])
def test_a_distilled_unet_has_one_branch_at_any_scale(technique):
    """Latent consistency models take the scale as an input; the pipeline then runs the prompt
    alone."""
    pipe = tiny_pipeline(SD)
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=16).eval()

    def run(*techniques):
        with da.apply(pipe, *techniques) as session:
            got = final(pipe, {**tiny_inputs(SD, batch=2, steps=3), "guidance_scale": 3.0})
        return got, session.report()

    got, report = run(technique)
    assert not torch.equal(got, run()[0])
    assert report.nfe == 3
    assert all(acting == selected > 0 for acting, selected in report.layers.values())
    with pytest.raises(da.UnsupportedModel, match="distilled"):
        run(da.CFG(3.0), technique)


def cut(pipe, index, timestep, values):
    """The CFG cut-off of diffusers' documentation."""
    if index == 1:
        pipe._guidance_scale = 0.0
        values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
    return values


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("technique", [nag(), da.PLADIS(branches="cond")])
def test_guidance_that_a_callback_ends(technique, batch):
    """From then on every row carries the prompt: the same as our own interval, which runs the
    conditional rows alone."""
    pipe = tiny_pipeline(SD)

    def run(*techniques, **more):
        with da.apply(pipe, *techniques) as session:
            got = final(
                pipe, {**tiny_inputs(SD, batch=batch, steps=4), "guidance_scale": 3.0, **more}
            )
        return got, session.report()

    got, report = run(
        technique, callback_on_step_end=cut, callback_on_step_end_tensor_inputs=["prompt_embeds"]
    )
    assert (report.nfe, report.guided_steps) == (2 * 2 + 2, 2)
    expected, _ = run(IntervalCFG(3.0, stop=0.5), technique)
    assert (got - expected).abs().max() <= 64 * torch.finfo(
        torch.float32
    ).eps * expected.abs().max()


def test_steps_guided_by_the_pipeline_itself_are_counted():
    for name, gate in ((SD, "guidance_scale"), (FLUX, "true_cfg_scale")):
        pipe = tiny_pipeline(name)
        with da.apply(pipe, nag()) as session:
            final(pipe, {**tiny_inputs(name, steps=3), gate: 3.0})
            assert (session.report().guided_steps, session.report().nfe) == (3, 6)
            final(pipe, {**tiny_inputs(name, steps=3), gate: 1.0})
            assert (session.report().guided_steps, session.report().nfe) == (0, 3)


SEEN = []


@dataclass(frozen=True, slots=True)
class Rows(AttentionTechnique):
    """Keeps which rows carry the prompt."""

    def __call__(self, attend, q, k, v, site):
        SEEN.append(site.conditioned)
        return attend(q, k, v)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_skip_layer_call_of_sd3_carries_the_prompt(batch):
    name = "StableDiffusion3Pipeline"
    pipe = tiny_pipeline(name)

    def run(*techniques):
        with da.apply(pipe, *techniques) as session:
            final(
                pipe,
                {
                    **tiny_inputs(name, batch=batch, steps=2),
                    "skip_guidance_layers": [0],
                    "skip_layer_guidance_stop": 1.0,
                },
            )
        return session.report()

    SEEN.clear()
    run(Rows())
    assert set(SEEN) == {(False,) * batch + (True,) * batch, (True,) * batch}
    assert run(nag(), da.PLADIS()).layers["NAG"] == (2, 2)


def test_a_window_as_a_list():
    pipe = tiny_pipeline(SD)
    with da.apply(pipe, nag(sigma=[0.0, 100.0])) as session:
        final(pipe, tiny_inputs(SD))
    with da.apply(pipe, da.NAG(stop=0.5)) as half:
        final(pipe, tiny_inputs(SD, steps=4))
    assert "NAG: at 4 of 4 layers in 2 of 4 steps" in str(half.report())
    assert session.techniques[0] == nag(sigma=(0.0, 100.0))
    with pytest.raises(TypeError, match="must be 2 values"):
        nag(sigma=3.0)
