"""Techniques on a pipeline that makes a video chunk after chunk in one call: AnyFlow-FAR."""

import math
from dataclasses import dataclass

import pytest
import torch

import diffalign as da
from diffalign.core import CFG_PASSES, COND, Guidance, Pass
from diffalign.seams.denoiser.rows import take
from diffalign.seams.trajectory.sampler import PipelineSampler
from diffalign.search.video.choice import expander_of
from diffalign.search.video.expander import Branch
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline
from diffalign.testing.tiny.anyflow import PARTITION

NAME, STEPS, CHUNKS = "AnyFlowFARPipeline", 2, len(PARTITION)


@dataclass(frozen=True, slots=True)
class Counting(Guidance[int]):
    """CFG at the scale 3 that notes the steps it is told, and how many its state has seen."""

    notes: list

    def init(self, batch):
        return 0

    def passes(self, step, state):
        self.notes.append((step.index, step.count, round(step.sigma, 3), state))
        return CFG_PASSES

    def combine(self, preds, step, state):
        return step.mix(preds[COND], preds[CFG_PASSES[1]], 3.0), state + 1


@dataclass(frozen=True, slots=True)
class ConditionalOnly(Guidance[None]):
    """The conditional pass alone, although the pipeline runs with guidance on; without ``blocks``
    where they are given."""

    blocks: tuple = ()

    def passes(self, step, state):
        return (Pass("only", True, blocks=self.blocks) if self.blocks else COND,)

    def combine(self, preds, step, state):
        return next(iter(preds.values())), None


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(NAME)


def inputs(**options):
    return tiny_inputs(NAME, steps=STEPS, **options)


def test_each_chunk_is_a_trajectory_of_its_own(pipe):
    notes = []
    native = final(pipe, inputs())
    with da.apply(pipe, Counting(notes)) as session:
        assert torch.equal(final(pipe, inputs()), native)
    # with shift 3 the second of two levels is 3 * 0.5 / (1 + 2 * 0.5)
    assert notes == [(0, 2, 1.0, 0), (1, 2, 0.75, 1)] * CHUNKS
    report = session.report()
    assert report.steps == report.guided_steps == report.calls == STEPS * CHUNKS
    # two rows of each step, and of each call that reads a finished chunk
    assert report.rows == 2 * STEPS * CHUNKS + 2 * (CHUNKS - 1)
    assert report.nfe == report.nfe_cfg
    assert report.sigma == [1.0, 0.75] * CHUNKS
    assert len(report.scale) == STEPS * CHUNKS


@pytest.mark.slow
def test_the_conditional_rows_alone_read_their_own_memory(pipe):
    """Rows of the memory of keys and values lie on its second axis."""
    plain = final(pipe, inputs(guided=False))
    with da.apply(pipe, ConditionalOnly()) as session:
        output = final(pipe, inputs())
    assert (output - plain).abs().max() < 1e-5
    assert session.report().rows == STEPS * CHUNKS + 2 * (CHUNKS - 1)
    memory = {0: {"full_cache": torch.arange(8.0).reshape(2, 4, 1)}}
    rows = take(memory, [2, 3], 4, axis=1)[0]["full_cache"]
    assert torch.equal(rows, memory[0]["full_cache"][:, 2:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "off",
    [
        da.ScheduledCFG(3.0, shape="constant"),
        da.IntervalCFG(3.0, sigma=(0.0, math.inf)),
        da.AdaptiveGuidance(3.0, threshold=1.5),
        da.RescaledCFG(3.0, phi=0.0),
        da.MagnitudeAware(3.0, alpha=0.0),
        da.S2Guidance(3.0, omega=0.0, blocks=("*",)),
        da.SkipLayerGuidance(3.0, slg_scale=0.0, layers=("*",), stop=1.0),
    ],
    ids=lambda off: type(off).__name__,
)
def test_off_switches_are_exact(pipe, off):
    with da.apply(pipe, da.CFG(3.0)) as session:
        expected, rows = final(pipe, inputs()), session.report().rows
    with da.apply(pipe, off) as session:
        assert torch.equal(final(pipe, inputs()), expected)
        assert session.report().rows == rows


@pytest.mark.slow
def test_a_pass_without_a_block(pipe):
    """A block that adds nothing is a block left out: its gates and its text attention are zero."""
    twin = tiny_pipeline(NAME)
    block = twin.transformer.blocks[1]
    reading = []

    def silent(module, args, result):
        reading.append(args[6]["is_cache_step"])
        return result if reading[-1] else args[0]

    block.register_forward_hook(silent)
    expected = final(twin, inputs(guided=False))
    assert any(reading)
    with da.apply(pipe, ConditionalOnly(("blocks.1",))):
        output = final(pipe, inputs())
    assert (output - expected).abs().max() < 1e-5
    assert (output - final(pipe, inputs(guided=False))).abs().max() > 1e-3


@pytest.mark.slow
def test_techniques_act_in_every_chunk_of_an_expander(pipe):
    """One call under ``da.apply`` and chunk after chunk in an expander: the same video."""
    call = inputs()
    call = {k: v for k, v in call.items() if k not in ("generator", "output_type")}
    negative = {"negative_prompt_embeds": call.pop("negative_prompt_embeds") + 1.0}
    call |= {"guidance_scale": 1.0}
    nag = da.NAG(3.0, negative_embeds=negative, sigma=None)
    seeds = range(10, 10 + CHUNKS)
    with expander_of(pipe, [nag], **call) as expander:
        assert expander.price(1).rows == STEPS + 1
        prefix = None
        for seed in seeds:
            (prefix,) = expander.expand([Branch(prefix, seed)])
        assert expander.meter.rows == STEPS * CHUNKS + CHUNKS - 1
        # a technique may have something to remember, so a preview does not lead on
        ((branch, _),) = expander.preview([Branch(None, 10)], 1)
        assert branch.step == 0
    start = [
        torch.randn(4, n, 4, 4, generator=torch.Generator().manual_seed(seed))
        for seed, n in zip(seeds, PARTITION)
    ]
    options = {"latents": torch.cat(start, 1)[None], "output_type": "latent"}
    plain = pipe(**call, **options).frames[0]
    with da.apply(pipe, nag) as session:
        whole = pipe(**call, **options).frames[0]
    assert (torch.cat(prefix.pieces, 1) - whole).abs().max() < 1e-4
    assert (whole - plain).abs().max() > 1e-2
    assert session.report().layers["NAG"] == (2, 2)
    assert session.report().acted["NAG"] == STEPS * CHUNKS


@pytest.mark.slow
def test_adaptive_guidance_decides_anew_in_each_chunk(pipe):
    call = {k: v for k, v in inputs().items() if k not in ("generator", "output_type")}
    # any cosine is above the threshold, so one step is guided
    technique = da.AdaptiveGuidance(threshold=-1.0, min_guided_steps=1)
    with expander_of(pipe, [technique], **call) as expander:
        prefix = None
        for seed in (1, 2):
            (prefix,) = expander.expand([Branch(prefix, seed)])
        guided = 2 + (STEPS - 1)
        assert expander.meter.rows == 2 * guided + 2
        assert expander.price(1).rows == 2 * STEPS + 2


@pytest.mark.slow
def test_the_negative_text_of_an_unguided_call_is_left_out(pipe):
    """The pipeline would run it beside the prompt in a batch of one, and fail."""
    call = inputs() | {"guidance_scale": 1.0}
    plain = final(pipe, inputs(guided=False))
    with da.apply(pipe, da.CFG(1.0)):
        assert torch.equal(final(pipe, call), plain)


def test_trajectories_are_those_of_chunks(pipe):
    call = {k: v for k, v in inputs().items() if k not in ("generator", "output_type")}
    with pytest.raises(da.UnsupportedModel, match="Search with LinearSearch or TreeOfFrames"):
        PipelineSampler(pipe, **call)


def test_what_flex_attention_hides_is_refused(pipe):
    for technique in (da.PAG(), da.SEG()):
        with (
            da.apply(pipe, technique),
            pytest.raises(da.UnsupportedModel, match="flex attention"),
        ):
            final(pipe, inputs())
