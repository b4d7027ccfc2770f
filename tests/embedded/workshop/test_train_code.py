"""The autoencoder of a laid-down latent: it has its form, learns both parts, resumes to the bit."""

from pathlib import Path

import pytest
import torch

from diffalign.embedded.workshop.train_code import CodeTrainer, build, parser


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def trainer(tmp_path: Path, *arguments: str) -> CodeTrainer:
    return CodeTrainer(
        parser().parse_args(["--out", str(tmp_path), "--batch", "4", "--every", "2", *arguments])
    )


def test_four_pixels_are_one_cell() -> None:
    vae = build(1)
    with torch.no_grad():
        assert vae.encoder(torch.zeros(1, 3, 128, 128)).shape == (1, 25, 32, 32)
        assert vae.decoder(torch.zeros(1, 25, 32, 32)).shape == (1, 3, 128, 128)


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
    run = trainer(tmp_path, "--every", "1")
    values = [run.step() for _ in range(48)]
    for key in ("mse", "reading"):
        first, last = (sum(v[key] for v in part) for part in (values[:8], values[-8:]))
        assert last < 0.95 * first
