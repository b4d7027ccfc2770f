"""The report: numbers against hand-worked ones, text, plot; what a technique may synchronise."""

import json

import pytest
import torch

import diffalign as da
from diffalign.seams.denoiser import branch_log
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

SD = "StableDiffusionPipeline"


def inputs(steps=4, batch=1, **more):
    return {**tiny_inputs(SD, steps=steps, batch=batch), "guidance_scale": 4.0, **more}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(SD)


def recorded(pipe, technique, **more):
    """Branch predictions of every step as the denoiser gave them, and the session's report."""
    seen = []
    forward = pipe.unet.forward

    def listen(*args, **kwargs):
        out = forward(*args, **kwargs)
        seen.append(out[0].double())
        return out

    pipe.unet.forward = listen
    try:
        with da.apply(pipe, technique) as session:
            final(pipe, inputs(**more))
    finally:
        del pipe.unet.forward
    return seen, session.report()


@pytest.mark.parametrize("pending", [0, 1 << 20])
def test_effective_scale_orthogonal_part_and_cosine_against_numbers_worked_out_here(
    pipe, monkeypatch, pending
):
    """Reduced at every step, as large latents are, and all at the end."""
    monkeypatch.setattr(branch_log, "PENDING", pending)
    seen, report = recorded(pipe, da.CFG(4.0), batch=2)
    for step, both in enumerate(seen):
        uncond, cond = both.chunk(2)
        each = [
            torch.dot(c.flatten(), u.flatten()) / (c.norm() * u.norm())
            for c, u in zip(cond, uncond)
        ]
        assert report.cosine[step] == pytest.approx(float(sum(each)) / 2, abs=1e-6)
    assert report.scale == pytest.approx([4.0] * 4, rel=1e-5)
    assert all(value < 5e-3 for value in report.orthogonal)
    assert (report.nfe, report.nfe_cfg, report.rows, report.calls, report.images) == (
        8,
        8,
        16,
        4,
        2,
    )


def test_orthogonal_part_of_a_rule_that_leaves_the_line(pipe):
    """APG keeps only what is orthogonal to the conditional prediction: off the guidance direction,
    by an angle."""
    _, report = recorded(pipe, da.APG(4.0, eta=0.0))
    assert all(value > 1e-2 for value in report.orthogonal)
    assert all(value < 4.0 for value in report.scale)


def test_a_schedule_shows_its_scales(pipe):
    _, report = recorded(pipe, da.ScheduledCFG(4.0, shape="linear"))
    assert report.scale[0] is None  # the excess ramp starts at scale 1: one pass
    assert report.scale[1:] == pytest.approx([1 + 3 * 2 * i / 3 for i in (1, 2, 3)], rel=1e-4)
    assert report.guided_steps == 3
    assert report.nfe == 7


def test_text_says_what_happened(pipe):
    _, report = recorded(pipe, da.AdaptiveGuidance(threshold=-1.0))
    text = str(report)
    assert text.startswith(
        "StableDiffusionPipeline: guided 2 of 4 steps, 6 NFE per image (CFG: 8), 1 image, "
    )
    options = "scale=4.0 (guidance scale of the call), space='eps' (the threshold is yours)"
    assert f"adaptive-guidance({options}, threshold=-1.0" in text
    assert text.count("\n") >= 6
    assert json.loads(json.dumps(report.to_dict()))["guided_steps"] == 2


@pytest.mark.slow
def test_plot_has_both_curves(pipe, tmp_path):
    _, report = recorded(pipe, da.ScheduledCFG(4.0, shape="cosine"), steps=8)
    picture = report.plot(tmp_path / "scale.png")
    colours = {colour for _, colour in picture.getcolors(1 << 20)}
    assert {(31, 104, 196), (206, 84, 26)} <= colours
    assert (tmp_path / "scale.png").stat().st_size > 2000
    _, nothing = recorded(pipe, da.CFG(1.0))
    with pytest.raises(ValueError, match="no step of this run evaluated both branches"):
        nothing.plot()


def test_an_empty_report_says_so(pipe):
    assert "no generation has finished yet" in str(da.apply(pipe, da.CFG()).report())


def test_adaptive_guidance_synchronises_once_per_decision(pipe, monkeypatch):
    """CFG never waits for the device inside the loop; AdaptiveGuidance reads its cosines once in
    each step that may latch."""

    def reads(technique, steps):
        count = []
        with monkeypatch.context() as patch, da.apply(pipe, technique):
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
                inner = getattr(torch.Tensor, name)
                patch.setattr(
                    torch.Tensor,
                    name,
                    lambda self, *a, _inner=inner, **k: (count.append(1), _inner(self, *a, **k))[1],
                )
            final(pipe, inputs(steps=steps))
        return len(count)

    never = da.AdaptiveGuidance(4.0, threshold=1.0)
    extra = {steps: reads(never, steps) - reads(da.CFG(4.0), steps) for steps in (3, 9)}
    assert extra == {3: 2, 9: 8}  # the first step may not latch: min_guided_steps is 2


def test_an_empty_prompt_is_legal_in_the_library():
    pipe = tiny_pipeline(SD, text=True)
    given = {**tiny_inputs(SD, text=True, steps=2), "prompt": "", "negative_prompt": ""}
    with da.apply(pipe, da.CFG(3.0)) as session:
        assert torch.isfinite(final(pipe, given)).all()
    assert session.report().nfe == 4


def test_supports_lists_every_technique_with_cost_or_reason(pipe):
    table = da.supports(pipe)
    assert {row.name for row in table} == set(da.techniques())
    assert all(row.cost if row.works else row.reason for row in table)
    assert "adaptive-guidance" in str(table)
    fill = da.supports(tiny_pipeline("FluxFillPipeline"))
    guidances = {row.name for row in fill if da.techniques()[row.name].seam == "denoiser"}
    # a distilled model has no unconditional branch; these three need none
    assert {row.name for row in fill if row.works} & guidances <= {"auto-guidance", "pag", "seg"}
    assert all(
        "no unconditional branch" in row.reason
        for row in fill
        if da.techniques()[row.name].seam == "denoiser" and not row.works
    )
    with pytest.raises(da.UnsupportedModel, match="three-way batch"):
        da.supports(type("StableDiffusionInstructPix2PixPipeline", (), {})())
