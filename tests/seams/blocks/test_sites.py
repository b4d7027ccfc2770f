"""Skipping a block is deleting it: checked against the model without the block, for every family
and stream order."""

import contextvars
import copy
import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import diffalign as da
from diffalign.core import COND, BlockSite, Guidance, Pass, UnsupportedModel
from diffalign.families import FAMILIES, block_streams
from diffalign.seams.blocks.sites import select, sites
from diffalign.seams.blocks.skip import skipped
from diffalign.testing.deep import PIPELINES, deep_pipeline, without_block
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

torch.set_num_threads(1)


def denoiser(pipe):
    return getattr(pipe, FAMILIES[type(pipe).__name__].denoisers[0])


@dataclass(frozen=True, slots=True)
class Only(Guidance[None]):
    """The conditional model without ``blocks``, and nothing else."""

    blocks: tuple[str, ...]

    @property
    def needs_uncond(self):
        return False

    def passes(self, step, state):
        return (Pass("only", True, blocks=self.blocks),)

    def combine(self, preds, step, state):
        return preds[Pass("only", True)], None


def inputs(name, variant=""):
    family = FAMILIES[name]
    return {**tiny_inputs(name, variant=variant, steps=2), family.gates[0]: family.off}


def run(pipe, name, variant, blocks):
    with da.apply(pipe, Only(tuple(blocks))) as session:
        result = final(pipe, inputs(name, variant))
    assert session.report().calls == session.report().steps
    return result


@pytest.mark.parametrize(("name", "variant"), PIPELINES.items())
@pytest.mark.few(4)
def test_skipping_is_deleting(name, variant):
    pipe = deep_pipeline(name, variant)
    module = denoiser(pipe)
    plain = final(pipe, inputs(name, variant))
    inner = [site.name for site in sites(module) if site.edge is None]
    assert len(inner) >= 2
    classes = {type(module.get_submodule(block)).__name__: block for block in inner}
    assert torch.equal(run(pipe, name, variant, ()), plain)
    for block in classes.values():  # both stacks where there are two
        got = run(pipe, name, variant, [block])
        assert torch.equal(got, final(without_block(pipe, block), inputs(name, variant)))
        assert not torch.equal(got, plain)
    assert torch.equal(final(pipe, inputs(name, variant)), plain)


@pytest.mark.slow
def test_every_family_of_the_registry_has_blocks():
    tested = {FAMILIES[name].name for name in PIPELINES}
    assert tested >= {"sd", "sdxl", "sd3", "pixart", "sana", "flux", "qwen", "chroma", "wan", "ltx"}
    seen = set()
    for name, variant in PIPELINES.items():
        module = denoiser(deep_pipeline(name, variant, extra=0))
        seen |= {type(module.get_submodule(site.name)).__name__ for site in sites(module)}
    # its memory of earlier chunks is filled by every block, see tests/seams/test_chunks.py
    assert seen == set(block_streams()) - {"AnyFlowTransformerBlock"}


@pytest.mark.slow
def test_text_and_image_lengths_differ_where_there_are_two_streams():
    """Otherwise swapped streams would pass the deletion test by shape; lengths are read off the
    real calls."""
    for name in (
        "StableDiffusion3Pipeline",
        "FluxPipeline",
        "QwenImagePipeline",
        "ChromaPipeline",
        "CogVideoXPipeline",
    ):
        pipe = deep_pipeline(name)
        module = denoiser(pipe)
        site = next(site for site in sites(module) if len(site.streams) == 2)
        lengths = []

        def look(block, args, kwargs, lengths=lengths):
            lengths.append(
                (kwargs["encoder_hidden_states"].shape[1], kwargs["hidden_states"].shape[1])
            )

        module.get_submodule(site.name).register_forward_pre_hook(look, with_kwargs=True)
        final(pipe, inputs(name))
        assert lengths
        assert all(text != image for text, image in lengths)


def test_order_and_edges():
    flux = denoiser(deep_pipeline("FluxPipeline"))
    listed = sites(flux)
    assert [site.name for site in listed] == [
        *(f"transformer_blocks.{i}" for i in range(3)),
        *(f"single_transformer_blocks.{i}" for i in range(3)),
    ]
    assert [site.edge for site in listed] == ["first", None, None, None, None, "last"]
    assert listed[3] == BlockSite(
        "single_transformer_blocks.0", ("encoder_hidden_states", "hidden_states")
    )
    sd3 = denoiser(deep_pipeline("StableDiffusion3Pipeline"))
    assert [site.edge for site in sites(sd3)] == ["first", None, None, "context_pre_only"]
    unet = denoiser(deep_pipeline("StableDiffusionXLPipeline"))
    stages = [site.name.split(".")[0] for site in sites(unet)]
    assert stages == ["down_blocks"] * 2 + ["mid_block"] * 2 + ["up_blocks"] * 4
    assert all("attentions" in site.name for site in sites(unet))
    lumina = denoiser(deep_pipeline("Lumina2Pipeline"))
    assert all(site.name.startswith("layers.") for site in sites(lumina))


class Wrapper(nn.Module):
    """A module with one block inside."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return self.block(*args, **kwargs)


def test_blocks_inside_wrappers():
    toy = Toy()
    toy.video = nn.ModuleList([Wrapper(block) for block in toy.video])
    assert [site.name for site in sites(toy)][:3] == [f"video.{i}.block" for i in range(3)]
    with skipped(toy, ("video.1.block",)):
        assert toy(torch.ones(1, 5, 2), torch.ones(1, 3, 2))[0][0, 0, 0] == 32


def test_select():
    flux = denoiser(deep_pipeline("FluxPipeline"))
    assert select("X", "blocks", flux, None) == tuple(site.name for site in sites(flux)[1:-1])
    assert select("X", "blocks", flux, (0, "single*")) == (
        "transformer_blocks.0",
        *(f"single_transformer_blocks.{i}" for i in range(3)),
    )
    assert select("X", "blocks", flux, ("transformer_blocks.1", 1)) == ("transformer_blocks.1",)
    with pytest.raises(
        UnsupportedModel, match=r"X\(blocks=...\): FluxTransformer2DModel has blocks 0 to 5; got 6"
    ):
        select("X", "blocks", flux, (6,))
    with pytest.raises(
        UnsupportedModel, match=r"no block 'transformer_block\.1'\. Nearest: transformer_blocks\.1"
    ):
        select("X", "blocks", flux, ("transformer_block.1",))
    with pytest.raises(UnsupportedModel, match="only 2 blocks"):
        select("X", "blocks", tiny_pipeline("PixArtSigmaPipeline").transformer, None)
    with pytest.raises(UnsupportedModel, match="knows none in Linear"):
        select("X", "blocks", nn.Linear(1, 1), None)


# Toys whose blocks multiply each stream by its own prime: every wrong branch gives its own number.


class CogVideoXBlock(nn.Module):
    def forward(self, hidden_states, encoder_hidden_states):
        return 2.0 * hidden_states, 3.0 * encoder_hidden_states


class JointTransformerBlock(nn.Module):
    def __init__(self, context_pre_only=False):
        super().__init__()
        self.context_pre_only = context_pre_only

    def forward(self, hidden_states, encoder_hidden_states):
        return None if self.context_pre_only else 3.0 * encoder_hidden_states, 2.0 * hidden_states


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
        self.video = nn.ModuleList([CogVideoXBlock() for _ in range(3)])
        self.joint = nn.ModuleList([JointTransformerBlock(i == 2) for i in range(3)])

    def forward(self, x, y):
        for block in self.video:
            x, y = block(x, encoder_hidden_states=y)
        for block in self.joint:
            z, x = block(hidden_states=x, encoder_hidden_states=y)
            y = y if z is None else z
        return x + self.bias, y


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("names", "image", "text"),
    [
        ((), 64, 243),
        (("video.1",), 32, 81),
        (("joint.1",), 32, 81),
        (("video.0", "joint.0"), 16, 27),
        (("joint.2",), 32, 243),
    ],
)
@pytest.mark.few(3)
def test_blocks_that_multiply(names, image, text, compiled):
    toy = Toy()
    if compiled:
        toy.compile(backend="eager")
    with torch.no_grad(), skipped(toy, names):
        x, y = toy(torch.ones(1, 5, 2), torch.ones(1, 3, 2))
    assert torch.equal(x, torch.full((1, 5, 2), float(image)))
    assert torch.equal(y, torch.full((1, 3, 2), float(text)))
    x, y = toy(torch.ones(1, 5, 2), torch.ones(1, 3, 2))
    assert (x[0, 0, 0], y[0, 0, 0]) == (64, 243)


def test_everything_is_restored_after_an_exception():
    toy = Toy()
    before = {name: type(module) for name, module in toy.named_modules()}

    def stop(*_):
        assert type(toy.video[1]) is not CogVideoXBlock
        raise KeyboardInterrupt

    hook = toy.joint[2].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt), skipped(toy, ("video.1", "joint.1")):
        toy(torch.ones(1, 5, 2), torch.ones(1, 3, 2))
    hook.remove()
    assert {name: type(module) for name, module in toy.named_modules()} == before
    assert all(
        not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in vars(module)
        for module in toy.modules()
    )


def test_another_thread_never_notices():
    toy, seen = Toy(), []

    def call():
        seen.append(toy(torch.ones(1, 1, 1), torch.ones(1, 1, 1))[0].item())

    with skipped(toy, ("video.1",)):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        call()
        copied = copy.deepcopy(toy)
    assert seen == [64.0, 32.0]
    assert type(copied.video[1]) is CogVideoXBlock


@pytest.mark.slow
def test_compiled_as_a_whole_needs_two_graphs():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    toy, counter = Toy(), CompileCounter()
    eager, x, y = copy.deepcopy(toy), torch.ones(1, 5, 2), torch.ones(1, 3, 2)
    toy.compile(backend=counter)
    names = [site.name for site in sites(toy)]
    with torch.no_grad():
        for _ in range(2):
            for chosen in [(), *((name,) for name in names)]:
                with skipped(eager, chosen):
                    truth = eager(x, y)
                if not chosen:
                    assert torch.equal(toy(x, y)[0], truth[0])
                    continue
                with skipped(toy, chosen):
                    got = toy(x, y)
                    other = contextvars.Context().run(lambda: toy(x, y)[0])
                assert torch.equal(got[0], truth[0])
                assert torch.equal(got[1], truth[1])
                assert torch.equal(other, eager(x, y)[0])
    # plain, gated, and gated classes seen from a context without a choice
    assert counter.frame_count == 3
    whole = torch.compile(eager, backend="eager")
    with torch.no_grad(), skipped(whole, ("joint.1",)):
        assert whole(x, y)[0][0, 0, 0] == 32


def test_blocks_compiled_one_by_one_are_skipped_outright():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    toy, counter = Toy(), CompileCounter()
    for block in [*toy.video, *toy.joint]:
        block.compile(backend=counter)
    with torch.no_grad():
        toy(torch.ones(1, 5, 2), torch.ones(1, 3, 2))
        count = counter.frame_count
        for name in ("video.1", "video.2", "joint.1"):
            with skipped(toy, (name,)):
                assert toy(torch.ones(1, 5, 2), torch.ones(1, 3, 2))[0][0, 0, 0] == 32
    assert counter.frame_count == count


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading_still_sees_every_call(kind):
    """Its hooks load the next weights; a block that is never called would leave them behind."""
    from diffusers.hooks import apply_group_offloading

    module = denoiser(deep_pipeline("PixArtSigmaPipeline"))
    calls = []
    given = {
        "hidden_states": torch.ones(1, module.config.in_channels, 4, 4),
        "encoder_hidden_states": torch.ones(1, 3, module.config.caption_channels),
        "timestep": torch.tensor([5]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    with torch.no_grad(), skipped(module, ("transformer_blocks.1",)):
        truth = module(**given).sample
    options = {"num_blocks_per_group": 2} if kind == "block_level" else {}
    apply_group_offloading(module, onload_device=torch.device("cpu"), offload_type=kind, **options)
    module.transformer_blocks[1].attn1.to_q.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), skipped(module, ("transformer_blocks.1",)):
        assert torch.equal(module(**given).sample, truth)
    assert len(calls) == 1


def test_gradients_with_gradient_checkpointing():
    """The model's own checkpointing calls blocks again during the backward pass, after the skip has
    ended."""
    pipe = deep_pipeline("StableDiffusion3Pipeline")
    module, shorter = pipe.transformer, without_block(pipe, "transformer_blocks.1").transformer
    given = {
        "encoder_hidden_states": torch.randn(
            1, 3, module.config.joint_attention_dim, generator=torch.Generator().manual_seed(0)
        ),
        "pooled_projections": torch.ones(1, module.config.pooled_projection_dim),
        "timestep": torch.tensor([5]),
    }
    grads = []
    for model, names in ((module, ("transformer_blocks.1",)), (shorter, ())):
        model.enable_gradient_checkpointing()
        model.train()
        x = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with skipped(model, names):
            out = model(x, **given).sample
        out.square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_a_pass_that_skips_costs_one_row_per_image():
    pipe = tiny_pipeline("StableDiffusionPipeline")

    @dataclass(frozen=True, slots=True)
    class Both(Only):
        def passes(self, step, state):
            return (COND, Pass("only", True, blocks=self.blocks))

    with da.apply(pipe, Both(("mid_block.attentions.0.transformer_blocks.0",))) as session:
        final(
            pipe,
            {**tiny_inputs("StableDiffusionPipeline", batch=3, steps=2), "guidance_scale": 1.0},
        )
    assert (session.report().rows, session.report().calls) == (12, 4)
