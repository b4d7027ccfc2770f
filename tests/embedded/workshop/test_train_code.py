"""The autoencoder of a laid-down latent: it takes over what keeps its meaning, learns both parts,
and resumes to the bit."""

from pathlib import Path

import pytest
import torch

from diffalign.embedded.load import FOLDER
from diffalign.embedded.workshop.train_code import CodeTrainer, parser

SOURCE = FOLDER / "emoji" / "vae"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def trainer(tmp_path: Path, *arguments: str) -> CodeTrainer:
    return CodeTrainer(
        parser().parse_args(["--out", str(tmp_path), "--batch", "4", "--every", "2", *arguments])
    )


def test_all_weights_but_those_at_the_latent_are_taken_over(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    source = AutoencoderTiny.from_pretrained(SOURCE).state_dict()
    fresh = trainer(tmp_path).export().state_dict()
    taken = trainer(tmp_path, "--from", str(SOURCE)).export().state_dict()
    names = [name for name in source if torch.equal(taken[name], source[name])]
    others = [name for name in source if name not in names]
    assert {name for name in others if source[name].ndim == 4} == {
        "decoder.layers.0.weight",
        "encoder.layers.10.weight",
    }
    assert all(torch.equal(taken[name], fresh[name]) for name in others)


@pytest.mark.slow
def test_resume_repeats_the_bits(tmp_path: Path) -> None:
    straight, first = trainer(tmp_path), trainer(tmp_path)
    values = [straight.step() for _ in range(5)]
    assert ["reading" in value for value in values] == [True, False, True, False, True]
    for _ in range(2):
        first.step()
    second = trainer(tmp_path)
    second.load(first.state())
    assert [second.step() for _ in range(3)] == values[2:]


@pytest.mark.slow
def test_both_parts_learn(tmp_path: Path) -> None:
    run = trainer(tmp_path, "--from", str(SOURCE), "--every", "1")
    values = [run.step() for _ in range(48)]
    for key in ("mse", "reading"):
        first, last = (sum(v[key] for v in part) for part in (values[:8], values[-8:]))
        assert last < 0.8 * first
