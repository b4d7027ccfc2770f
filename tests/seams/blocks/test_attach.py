"""Block techniques: the identity, skipping, what they remember row by row, and what they leave."""

import threading
from dataclasses import dataclass, field, replace

import pytest
import torch

import diffalign as da
from diffalign.core import (
    COND,
    UNCOND,
    BlockTechnique,
    Guidance,
    StepInfo,
    TokenTechnique,
    UnsupportedModel,
    Windowed,
    option,
)
from diffalign.core.rows import Rows
from diffalign.families import FAMILIES
from diffalign.guidance import IntervalCFG
from diffalign.seams.blocks.sites import sites
from diffalign.seams.blocks.states import BlockStates, rows_of
from diffalign.seams.denoiser.call import DenoiserCall
from diffalign.seams.plan import context_of
from diffalign.seams.support import reason_against
from diffalign.testing.deep import PIPELINES, deep_pipeline, without_block
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

pytestmark = pytest.mark.slow

SD, FLUX = "StableDiffusionPipeline", "FluxPipeline"
BLOCK = {
    SD: "mid_block.attentions.0.transformer_blocks.0",
    FLUX: "transformer_blocks.1",
    "ZImagePipeline": "layers.1",
}


@dataclass(frozen=True, slots=True)
class Nothing(BlockTechnique[None]):
    """Runs every block as it is."""

    def selects(self, site):
        return True

    def around(self, block, streams, site, step, state):
        assert len(streams) == len(site.streams)
        return block(), state


@dataclass(frozen=True, slots=True)
class Without(Windowed, BlockTechnique[None]):
    """Leaves one block out."""

    block: str = option("", "its name")

    def selects(self, site):
        return site.name == self.block

    def around(self, block, streams, site, step, state):
        return streams, state


@dataclass(frozen=True, slots=True)
class Growth:
    """What a block added in the last step it ran in, [rows, ...] for each of its streams."""

    last: tuple[torch.Tensor, ...] = ()

    def select(self, rows):
        return Growth(tuple(tensor[list(rows)] for tensor in self.last))


SEEN = []


@dataclass(frozen=True, slots=True)
class EverySecond(BlockTechnique[Growth]):
    """Runs a block at every second step and repeats its growth between."""

    block: str = option("", "its name")

    def selects(self, site):
        return site.name == self.block

    def init(self, batch):
        SEEN.append(batch)
        return Growth()

    def around(self, block, streams, site, step, state):
        if step.index % 2 and state.last:
            return tuple(a + b for a, b in zip(streams, state.last)), state
        after = block()
        return after, Growth(tuple(b - a for a, b in zip(streams, after)))


@dataclass(frozen=True, slots=True)
class CountedRows(BlockTechnique[Growth]):
    """Adds to each row how often it has been here."""

    block: str = option("", "its name")

    def selects(self, site):
        return site.name == self.block

    def init(self, batch):
        return Growth((torch.zeros(batch),))

    def around(self, block, streams, site, step, state):
        count = state.last[0] + 1
        SEEN.append(count.tolist())
        shift = count.reshape(-1, *(1,) * (streams[0].ndim - 1)).to(streams[0])
        return tuple(stream + 0.01 * shift for stream in block()), Growth((count,))


def denoiser(pipe):
    return getattr(pipe, FAMILIES[type(pipe).__name__].denoisers[0])


def run(pipe, name, *techniques, variant="", **given):
    inputs = {**tiny_inputs(name, variant=variant, batch=2, steps=2), **given}
    if not techniques:
        return final(pipe, inputs), None
    SEEN.clear()
    with da.apply(pipe, *techniques) as session:
        return final(pipe, inputs), session


@pytest.mark.parametrize(("name", "variant"), PIPELINES.items())
@pytest.mark.few(5)
def test_running_every_block_is_bit_identical(name, variant):
    pipe = deep_pipeline(name, variant)
    classes = {path: type(module) for path, module in denoiser(pipe).named_modules()}
    given = tiny_inputs(name, variant=variant, steps=2)
    native = final(pipe, given)
    with da.apply(pipe, Nothing()) as session:
        got = final(pipe, tiny_inputs(name, variant=variant, steps=2))
    assert torch.equal(got, native)
    acting, selected = session.report().layers["Nothing"]
    assert acting == selected >= len(sites(denoiser(pipe)))
    assert {path: type(module) for path, module in denoiser(pipe).named_modules()} == classes


@pytest.mark.parametrize("name", [SD, FLUX, "StableDiffusion3Pipeline", "CogVideoXPipeline"])
@pytest.mark.few(1)
def test_a_block_that_is_not_called_is_left_out(name):
    pipe = deep_pipeline(name, PIPELINES[name])
    block = next(site.name for site in sites(denoiser(pipe)) if site.edge is None)
    given = {"variant": PIPELINES[name]}
    got, session = run(pipe, name, Without(block=block), **given)
    assert torch.equal(got, run(without_block(pipe, block), name, **given)[0])
    assert session.report().layers == {"Without": (1, 1)}
    assert "Without: at 1 of 1 layers in 2 of 2 steps" in str(session.report())


def test_a_window_and_an_end():
    pipe = deep_pipeline(SD)
    got, session = run(pipe, SD, Without(block=BLOCK[SD], stop=0.5), num_inference_steps=4)
    assert session.report().acted == {"Without": 2}
    assert not torch.equal(got, run(pipe, SD, num_inference_steps=4)[0])
    with pytest.warns(UserWarning, match="Without never acted"):
        got, session = run(pipe, SD, Without(block=BLOCK[SD], sigma=(98.0, 99.0)))
    assert torch.equal(got, run(pipe, SD)[0])
    assert session.report().layers == {"Without": (0, 1)}
    with pytest.raises(UnsupportedModel, match=r"Without selects no transformer block.*mid_block"):
        run(pipe, SD, Without(block="nowhere"))


class ByHand(torch.nn.Module):
    """A block of SD that runs at every second call of its model."""

    def __init__(self, block):
        super().__init__()
        self.block, self.calls, self.growth = block, 0, None

    def forward(self, hidden_states, *args, **kwargs):
        self.calls += 1
        if self.calls % 2 == 0:
            return hidden_states + self.growth
        after = self.block(hidden_states, *args, **kwargs)
        self.growth = after - hidden_states
        return after


@pytest.mark.parametrize("guidance", [(), (da.CFG(3.0),)], ids=["the pipeline's", "ours"])
@pytest.mark.few(1)
def test_memory_against_a_block_written_by_hand(guidance):
    pipe = deep_pipeline(SD)
    technique = EverySecond(block=BLOCK[SD])
    options = {"num_inference_steps": 5}
    got, session = run(pipe, SD, *guidance, technique, **options)
    assert SEEN == [4]  # one state for both branches of two images, made once
    again, _ = run(pipe, SD, *guidance, technique, **options)
    assert torch.equal(again, got)
    states = session.states["EverySecond"]
    assert isinstance(states, Rows)
    stack = pipe.unet.mid_block.attentions[0].transformer_blocks
    stack[0] = ByHand(stack[0])
    assert torch.equal(run(pipe, SD, *guidance, **options)[0], got)


def test_branches_in_calls_of_their_own_remember_apart():
    pipe = deep_pipeline(FLUX)
    run(pipe, FLUX, CountedRows(block=BLOCK[FLUX]), num_inference_steps=3)
    assert SEEN == [[1, 1], [1, 1], [2, 2], [2, 2], [3, 3], [3, 3]]


@dataclass(frozen=True, slots=True)
class SecondImageFirst(Guidance[None]):
    """Guides one of two images at the first two steps, none later."""

    def passes(self, step, state):
        return (COND, replace(UNCOND, rows=(1,))) if step.index < 2 else (COND,)

    def combine(self, preds, step, state):
        guided = preds[COND].clone()
        if UNCOND in preds or len(preds) > 1:
            guided[1] = step.mix(preds[COND][1:], preds[UNCOND], 3.0)[0]
        return guided, state


def test_rows_that_leave_take_their_state_along():
    pipe = deep_pipeline(SD)
    counted = CountedRows(block=BLOCK[SD])
    run(pipe, SD, SecondImageFirst(), counted, num_inference_steps=3)
    assert SEEN == [[1, 1, 1], [2, 2, 2], [3, 3]]
    run(pipe, SD, IntervalCFG(3.0, stop=0.5), counted, num_inference_steps=4)
    assert SEEN == [[1] * 4, [2] * 4, [3] * 2, [4] * 2]


@pytest.mark.parametrize("name", ["ZImagePipeline", FLUX])
def test_with_attention_techniques_and_rows_that_they_add(name):
    pipe = deep_pipeline(name, PIPELINES[name])
    nag = da.NAG(4.0, tau=1.6, alpha=0.7, sigma=(0.0, float("inf")))
    expected, _ = run(pipe, name, nag, da.PLADIS())
    got, session = run(pipe, name, Nothing(), nag, da.PLADIS())
    assert torch.equal(got, expected)
    assert all(acting == selected > 0 for acting, selected in session.report().layers.values())
    run(pipe, name, nag, CountedRows(block=BLOCK[name]), guidance_scale=3.0)
    # Z-Image: two branches and a second row for each image with the prompt
    rows = [[1] * 6, [2] * 6] if name != FLUX else [[1] * 2, [1] * 2, [2] * 2, [2] * 2]
    assert rows == SEEN


def test_with_passes_that_skip_blocks():
    """A skipped block is skipped whatever acts at it; at the others the technique acts."""
    pipe = deep_pipeline(FLUX)
    slg = da.SkipLayerGuidance(3.0, layers=(BLOCK[FLUX],), start=0.0, stop=1.0)
    expected, _ = run(pipe, FLUX, slg)
    got, _ = run(pipe, FLUX, slg, Nothing())
    assert torch.equal(got, expected)
    run(pipe, FLUX, slg, CountedRows(block=BLOCK[FLUX]))
    assert SEEN == [[1, 1], [1, 1], [2, 2], [2, 2]]
    other = "transformer_blocks.2"
    run(pipe, FLUX, slg, CountedRows(block=other))
    assert len(SEEN) == 6


def test_everything_is_restored_after_an_exception():
    pipe = deep_pipeline(SD)
    module = pipe.unet
    module.enable_gradient_checkpointing()
    native, _ = run(pipe, SD)
    before = {name: (type(m), dict(vars(m))) for name, m in module.named_modules()}

    def stop(*_):
        raise KeyboardInterrupt

    hook = module.up_blocks[-1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, SD, Nothing(), EverySecond(block=BLOCK[SD]))
    hook.remove()
    after = {name: (type(m), dict(vars(m))) for name, m in module.named_modules()}
    assert {name: cls for name, (cls, _) in after.items()} == {
        name: cls for name, (cls, _) in before.items()
    }
    assert all(
        after[name][1].keys() == attributes.keys() for name, (_, attributes) in before.items()
    )
    assert torch.equal(run(pipe, SD)[0], native)


def test_another_thread_never_notices():
    pipe, other = deep_pipeline(SD), tiny_pipeline(SD)
    other.unet = pipe.unet
    native, _ = run(other, SD)
    results, inside = [], threading.Event()

    def hook(*_):
        if threading.current_thread() is threading.main_thread() and not inside.is_set():
            inside.set()
            worker.start()
            worker.join()

    worker = threading.Thread(target=lambda: results.append(run(other, SD)[0]))
    handle = pipe.unet.conv_out.register_forward_hook(hook)
    run(pipe, SD, Without(block=BLOCK[SD]))
    handle.remove()
    assert torch.equal(results[0], native)


@pytest.mark.parametrize("name", [SD, FLUX])
@pytest.mark.parametrize("technique", [CountedRows, EverySecond])
@pytest.mark.few(1)
def test_recomputed_blocks_see_what_they_saw(name, technique):
    """By the model's own gradient checkpointing, in a backward pass after the session."""
    grads = []
    for recomputed in (False, True):
        pipe = deep_pipeline(name)
        denoiser(pipe).requires_grad_(False)
        if recomputed:
            denoiser(pipe).enable_gradient_checkpointing()
            denoiser(pipe).train()
        inputs = tiny_inputs(name, steps=3)
        text = inputs["prompt_embeds"].requires_grad_()
        base = type(pipe)
        call = {"__call__": base.__call__.__wrapped__}  # without its no_grad
        pipe.__class__ = type(base.__name__, (base,), call)
        with da.apply(pipe, technique(block=BLOCK[name])), torch.enable_grad():
            loss = pipe(**inputs)[0].square().mean()
        loss.backward()
        grads.append(text.grad)
    assert grads[0].abs().max() > 0
    assert torch.equal(*grads)


@pytest.mark.slow
@pytest.mark.parametrize("skip", [False, True], ids=["alone", "beside skipped passes"])
def test_compiled_as_a_whole(skip):
    """The same as eager; runs after the first compile nothing new."""
    from torch._dynamo.testing import CompileCounter

    pipe = deep_pipeline("PixArtSigmaPipeline")
    name, counter = "PixArtSigmaPipeline", CompileCounter()
    techniques = [EverySecond(block="transformer_blocks.1"), Without(block="transformer_blocks.2")]
    if skip:
        techniques.append(
            da.SkipLayerGuidance(3.0, layers=("transformer_blocks.2",), start=0.0, stop=1.0)
        )
    options = {"num_inference_steps": 4}
    expected, _ = run(pipe, name, *techniques, **options)
    torch._dynamo.reset()
    pipe.transformer.compile(backend=counter)
    counts = []
    for _ in range(3):
        got, session = run(pipe, name, *techniques, **options)
        assert torch.equal(got, expected)
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts[0] > 0
    assert counts[1:] == counts[:1] * 2
    assert session.report().layers["EverySecond"] == (1, 1)


def test_group_offloading_still_sees_every_call():
    from diffusers.hooks import apply_group_offloading

    name = "PixArtSigmaPipeline"
    expected, _ = run(deep_pipeline(name), name, Without(block="transformer_blocks.1"))
    pipe = deep_pipeline(name)
    apply_group_offloading(
        pipe.transformer,
        onload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=2,
    )
    calls = []
    layer = pipe.transformer.transformer_blocks[1].attn1.to_q
    layer.register_forward_hook(lambda *_: calls.append(1))
    got, _ = run(pipe, name, Without(block="transformer_blocks.1"))
    assert torch.equal(got, expected)
    assert len(calls) == 2


def test_rows_of_a_call():
    step = StepInfo(0, 1, 1.0)
    call = DenoiserCall("unet", step, (UNCOND, COND), (False,) * 2 + (True,) * 2)
    assert rows_of(call, 2) == (("uncond", 0), ("uncond", 1), ("cond", 0), ("cond", 1))
    call = replace(
        call, conditioned=(False, False, True, True, True, True), copies=((2, 4), (3, 5))
    )
    assert rows_of(call, 2)[4:] == (("cond copy", 0), ("cond copy", 1))
    part = (replace(UNCOND, rows=(1,)), COND)
    call = DenoiserCall("unet", step, part, (False, True, True))
    assert rows_of(call, 2) == (("uncond", 1), ("cond", 0), ("cond", 1))
    whole = replace(call, conditioned=(False, False, True, True))  # of a compiled model
    assert rows_of(whole, 2)[:2] == (("uncond", 0), ("uncond", 1))


@dataclass(frozen=True)
class Named:
    """A state that knows its rows by name."""

    names: tuple[str, ...] = field(default=())

    def select(self, rows):
        return Named(tuple(self.names[row] for row in rows))


def test_states_are_divided_and_selected():
    both = (("cond", 0), ("cond", 1), ("uncond", 0), ("uncond", 1))
    states = BlockStates().after("unet", both, Named(("c0", "c1", "u0", "u1")))
    new = lambda rows: Named(("new",) * rows)  # noqa: E731
    assert states.of("unet", both[:2], new).names == ("c0", "c1")
    assert states.of("unet", (both[1], both[0]), new).names == ("c1", "c0")
    assert states.of("unet", (("skip", 0),), new).names == ("new",)
    assert states.of("other", both[:1], new).names == ("new",)
    divided = states.after("unet", both[:2], Named(("C0", "C1")))
    assert divided.of("unet", both[2:], new).names == ("u0", "u1")
    assert divided.of("unet", both[:2], new).names == ("C0", "C1")
    assert divided.of("unet", both, new).names == ("new",) * 4
    chosen = states.select([1, 1, 0])
    rows = (("cond", 0), ("cond", 1), ("cond", 2), ("uncond", 0))
    assert chosen.of("unet", rows, new).names == ("c1", "c1", "c0", "u1")
    assert BlockStates().after("unet", both, None).select([1]).of("unet", both[:1], new) is None


@dataclass(frozen=True, slots=True)
class Fewer(TokenTechnique[None]):
    """Computes half of the tokens."""

    def choose(self, step, state):
        return None


def test_token_techniques_are_refused_where_tokens_cannot_be_left_out():
    pipe = tiny_pipeline(SD)
    words = "does not know where the image tokens of sd are embedded"
    with pytest.raises(UnsupportedModel, match=words), da.apply(pipe, Fewer()):
        pipe(**tiny_inputs(SD))
    context = context_of(pipe, FAMILIES[SD])
    assert words in reason_against(Fewer(), context)
