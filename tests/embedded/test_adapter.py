"""A low-rank difference put into weights, and in plain diffusers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import nn

from diffalign.embedded.adapter import FILE, adapted, fuse
from diffalign.embedded.load import FOLDER, folder_of, load, pipelines
from diffalign.embedded.workshop.score import score
from diffalign.embedded.workshop.train_turbo import LowRank, export
from diffalign.embedded.workshop.training import save_state
from diffalign.generate.models import Blueprint
from diffalign.tasks.geneval.verdict import prompts

CALL = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}


def test_the_difference_by_hand(tmp_path: Path) -> None:
    network = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Conv2d(2, 3, 3)})
    before = copy.deepcopy(network.state_dict())
    down, up = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0], [-3.0]])
    kernel = torch.arange(18.0).view(1, 2, 3, 3)
    table = {
        "unet.a.lora_A.weight": down,
        "unet.a.lora_B.weight": up,
        "unet.b.lora_A.weight": kernel,
        "unet.b.lora_B.weight": up[:, :, None, None].clone(),
    }
    save_file(table, tmp_path / FILE)
    fuse(network, tmp_path / FILE)
    change = network["a"].weight - before["a.weight"]
    assert torch.allclose(change, torch.tensor([[1.0, 2.0], [0.0, 0.0], [-3.0, -6.0]]), atol=1e-6)
    change = network["b"].weight - before["b.weight"]
    assert torch.allclose(change[0], kernel[0], atol=1e-5)
    assert torch.allclose(change[2], -3 * kernel[0], atol=1e-5)
    assert torch.equal(network["a"].bias, before["a.bias"])


@pytest.mark.slow
def test_plain_diffusers_loads_the_same_model(tmp_path: Path) -> None:
    """An exported run, by peft as layers of their own: the sums are made in another order."""
    network = load("emoji").unet
    low = LowRank(copy.deepcopy(network), network, 2, seed=1)
    for up in low.up:
        up.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    save_state(tmp_path / "state.pt", {"trainer": {"low": low.state()}})
    export(tmp_path / "state.pt", FOLDER / "emoji", tmp_path / "out", 2, averaged=False)
    plain, ours, before = (load("emoji") for _ in range(3))
    plain.load_lora_weights(tmp_path / "out")
    plain.scheduler = LCMScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    adapted(ours, tmp_path / "out")
    images = [
        pipe("a photo of a cat", generator=torch.Generator().manual_seed(1), **CALL).images
        for pipe in (plain, ours, before)
    ]
    assert torch.allclose(images[0], images[1], atol=1e-4)
    assert (images[1] - images[2]).abs().max() > 0.05
    assert float(ours.scheduler.final_alpha_cumprod) == 1.0


@pytest.mark.slow
def test_emoji_turbo_draws_what_is_asked_in_one_step() -> None:
    pipe = load("emoji-turbo")
    assert isinstance(pipe, StableDiffusionPipeline)
    records = [dict(record) for record in prompts() if record["tag"] == "single_object"][:16]
    _, correct = score(pipe, records, scale=1.0, steps=1, seed=5)
    assert sum(correct) >= 12


def test_the_commands_know_an_adapter_as_a_pipeline() -> None:
    assert "emoji-turbo" in pipelines()
    blueprint = Blueprint.named("emoji-turbo")
    assert (blueprint.cls, blueprint.scheduler) == (StableDiffusionPipeline, "LCMScheduler")
    assert blueprint.defaults == {"steps": 4, "scale": 1.0}
    size = sum(path.stat().st_size for path in folder_of("emoji-turbo").rglob("*.safetensors"))
    assert size <= 12e6


def test_a_folder_without_state(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="state: expected a training state"):
        export(tmp_path / "state.pt", FOLDER / "emoji", tmp_path / "out", 2)
