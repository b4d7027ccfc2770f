"""The distillation: factors against autograd, the teacher's way and the push of matching against
closed forms, a bank and a run that are taken up again, the export in plain diffusers."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn
from torch.func import functional_call

from diffalign.embedded.load import FOLDER, load
from diffalign.embedded.workshop import train_turbo
from diffalign.embedded.workshop.train_denoiser import scheduler
from diffalign.embedded.workshop.train_turbo import Bank, LowRank, Teacher, TurboTrainer, fill
from diffalign.embedded.workshop.training import step_generator

SHAPE = (16, 8, 8)


class Oracle(nn.Module):
    """A denoiser that sees the same picture in everything: v with ``signal x - noise v = picture``;
    a context of ones adds ``more`` to the picture."""

    def __init__(self, picture: torch.Tensor, more: float = 0.0) -> None:
        super().__init__()
        cumulative = scheduler().alphas_cumprod
        self.signal, self.spread = cumulative.sqrt(), (1 - cumulative).sqrt()
        self.picture, self.more = picture, more

    def forward(self, noisy, steps, context):
        signal, spread = (t[steps].view(-1, 1, 1, 1) for t in (self.signal, self.spread))
        picture = self.picture + self.more * context.float().mean((1, 2)).view(-1, 1, 1, 1)
        return SimpleNamespace(sample=(signal * noisy.float() - picture) / spread)


def teacher_of(unet: nn.Module, scale: float = 3.0) -> Teacher:
    """A teacher around a denoiser of our own, whose empty text is zeros."""
    teacher = object.__new__(Teacher)
    teacher.unet, teacher.scale, teacher.config = unet, scale, scheduler().config
    cumulative = scheduler().alphas_cumprod
    teacher.signal, teacher.noise = cumulative.sqrt(), (1 - cumulative).sqrt()
    teacher.empty = torch.zeros(1, 24, 4)
    return teacher


@pytest.fixture(scope="module")
def noise():
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3))


def test_a_teacher_that_knows_the_picture_goes_there(noise):
    """For one picture the exact way is ``signal picture + noise e`` with one ``e``, and every
    solver of its kind is on it. The start is taken as noise, so ``e`` follows from it."""
    picture = torch.linspace(-1, 1, 1024).view(1, *SHAPE)
    teacher = teacher_of(Oracle(picture))
    points, steps = teacher.ways(noise, torch.zeros(2, 24, 4), 8)
    assert steps.tolist() == [999, 874, 749, 624, 499, 374, 249, 124]
    assert torch.equal(points[:, 0], noise)
    signal, spread = teacher.levels(steps)
    e = (noise - signal[0] * picture) / spread[0]
    for place in range(1, 8):
        expected = signal[place] * picture + spread[place] * e
        # inputs of the denoiser are rounded to bf16, which is 2^-9 of values up to 4
        assert torch.allclose(points[:, place], expected, atol=0.1)
    assert torch.allclose(points[:, -1], picture.expand(2, -1, -1, -1), atol=0.1)


def test_guidance_of_the_teacher(noise):
    """The text adds 1 to the picture, so guidance of 3 adds 3."""
    teacher = teacher_of(Oracle(torch.zeros(1, *SHAPE), more=1.0))
    steps = torch.tensor([500, 700])
    velocity = teacher.velocity(noise, steps, torch.ones(2, 24, 4), 3.0)
    signal, spread = teacher.levels(steps)
    clean = signal * noise - spread * velocity
    assert torch.allclose(clean, torch.full_like(clean, 3.0), atol=0.1)


def trainer_of(teacher: Teacher, follower: nn.Module) -> TurboTrainer:
    trainer = object.__new__(TurboTrainer)
    trainer.teacher, trainer.follower = teacher, follower
    trainer.options = argparse.Namespace(match_scale=3.0)
    return trainer


def test_the_push_of_matching(noise):
    """A follower that sees 1 and a teacher that sees 3 (1 without guidance) everywhere, at pictures
    of 0: (1 - 3) / |0 - 3|. Its length does not depend on the noise."""
    teacher = teacher_of(Oracle(torch.zeros(1, *SHAPE), more=1.0))
    trainer = trainer_of(teacher, Oracle(torch.ones(1, *SHAPE)))
    clean = torch.zeros(2, *SHAPE)
    push = trainer.push(clean, torch.ones(2, 24, 4), torch.Generator().manual_seed(0))
    # at step 20, the cleanest, the rounding of the input counts most
    assert torch.allclose(push, torch.full_like(push, -2 / 3), atol=0.1)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)

    def forward(self, x):
        return self.norm(self.linear(self.conv(x).mean((2, 3))))


def small(rank: int = 2) -> tuple[Small, LowRank]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        network = Small()
    low = LowRank(network, copy.deepcopy(network), rank, seed=1)
    for up in low.up:
        up.data.copy_(torch.linspace(-1, 1, up.numel()).view_as(up))
    low.publish()
    return network, low


def test_gradients_of_the_factors_are_those_of_autograd():
    network, low = small()
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    leaves = [factor.detach().clone().requires_grad_() for factor in low.factors]
    downs, ups = leaves[:2], leaves[2:]
    weights = {
        f"{name}.weight": base + (up @ down).view_as(base)
        for name, base, down, up in zip(low.layers, low.base, downs, ups, strict=True)
    }
    pull = torch.linspace(-3, 3, 28).view(4, 7)
    (functional_call(network, weights, x) * pull).sum().backward()
    (network(x) * pull).sum().backward()
    low.step(rate=0.0, decay=0.9, clip=1e9)
    for factor, leaf in zip(low.factors, leaves, strict=True):
        assert leaf.grad.norm() > 0.01
        assert torch.allclose(factor.grad, leaf.grad, rtol=1e-4, atol=1e-7)
    assert network.norm.weight.grad is None


def test_the_sum_stands_in_the_network_and_ranks_stay_small():
    _, low = small(rank=4)
    assert [tuple(down.shape) for down in low.down] == [(4, 27), (4, 5)]
    for layer, base, down, up in zip(low.layers.values(), low.base, low.down, low.up, strict=True):
        assert torch.allclose(layer.weight, base + (up @ down).view_as(base))
    table = low.adapter([factor.detach() for factor in low.factors])
    assert table["conv.lora_A.weight"].shape == (4, 3, 3, 3)
    assert table["conv.lora_B.weight"].shape == (5, 4, 1, 1)


def options_of(out: Path, **others: object) -> argparse.Namespace:
    options = train_turbo.parser().parse_args(
        ["--pipeline", str(FOLDER / "emoji"), "--out", str(out)]
    )
    small = {"pairs": 3, "batch": 2, "rank": 2, "updates": 3, "save": 2, "matching": 1, "ahead": 1}
    vars(options).update(small | others)
    return options


@pytest.fixture(scope="module")
def pipe():
    return load("emoji")


@pytest.fixture(scope="module")
def bank(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    fill(Teacher(pipe, 3.0), folder, 3, seed=5, count=2)
    return folder


@pytest.mark.slow
def test_a_bank_is_filled_once_and_ends_at_what_the_pipeline_draws(pipe, bank):
    before = {path: path.stat().st_mtime_ns for path in bank.iterdir()}
    fill(Teacher(pipe, 3.0), bank, 3, seed=5, count=2)
    assert {path: path.stat().st_mtime_ns for path in bank.iterdir()} == before
    ways = Bank.load(bank)
    assert ways.points.shape == (3, 3, *SHAPE)
    assert len(set(map(tuple, ways.ids.tolist()))) == 3
    # two steps of DPM-Solver++ of order two, the last of order one, are two steps of DDIM
    other = copy.deepcopy(pipe)
    other.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    with torch.no_grad():
        context = pipe.text_encoder(ways.ids.long()).last_hidden_state
        empty = pipe.text_encoder(Teacher(pipe, 3.0).ids([""])).last_hidden_state
    latents = other(
        prompt_embeds=context,
        negative_prompt_embeds=empty.expand(3, -1, -1),
        latents=ways.points[:, 0].float(),
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    error = (latents - ways.points[:, -1].float()).square().mean().sqrt()
    assert error < 0.05 * latents.std()


@pytest.mark.slow
def test_a_run_that_is_taken_up_repeats_the_bits(pipe, bank, tmp_path):
    whole = TurboTrainer(options_of(tmp_path), pipe, Bank.load(bank))
    losses = [whole.step() for _ in range(3)]
    assert set(losses[0]) == {"loss", "first", "norm", "follower"}
    assert set(losses[2]) == {"loss", "first", "norm", "follower", "push", "doubt"}
    first = TurboTrainer(options_of(tmp_path), pipe, Bank.load(bank))
    for _ in range(2):
        first.step()
    torch.save(first.state(), tmp_path / "state.pt")
    again = TurboTrainer(options_of(tmp_path), pipe, Bank.load(bank))
    again.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.step() == losses[2]
    for ours, theirs in zip(again.low.average, whole.low.average, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_points_of_later_steps_are_those_of_the_students_own_way(pipe, bank, tmp_path):
    trainer = TurboTrainer(options_of(tmp_path, steps=5), pipe, Bank.load(bank))
    # the noise is the third draw
    generator = step_generator(0, 0, 0)
    rows = torch.randint(3, (5,), generator=generator)
    torch.randint(1, 2, (5,), generator=generator)
    noise = torch.randn(5, *SHAPE, generator=generator)
    points, steps, _ = trainer.later(step_generator(0, 0, 0))
    assert steps.tolist() == [499] * 5
    fresh = torch.randn(5, *SHAPE, generator=generator)
    context = trainer.teacher.context(trainer.bank.ids[rows]).float()
    other = copy.deepcopy(pipe)
    other.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    # one step to the end
    clean = other(
        prompt_embeds=context,
        latents=noise,
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="latent",
    ).images
    expected = other.scheduler.add_noise(clean, fresh, steps)
    assert (points - expected).square().mean().sqrt() < 0.05 * expected.std()


@pytest.mark.slow
def test_pictures_of_other_captions_raise_more_doubt(pipe, tmp_path):
    fill(Teacher(pipe, 3.0), tmp_path, 8, seed=6, count=4)
    bank = Bank.load(tmp_path)
    trainer = TurboTrainer(options_of(tmp_path), pipe, bank)
    ends = bank.points[:, -1].float().requires_grad_()
    own = trainer.doubt(ends, bank.ids, step_generator(0, 0, 0))
    others = trainer.doubt(ends, bank.ids.roll(1, 0), step_generator(0, 0, 0))
    assert own + 1 < others
    own.backward()
    assert ends.grad.abs().amax((1, 2, 3)).min() > 0
