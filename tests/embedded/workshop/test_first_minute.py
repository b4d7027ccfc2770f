"""The logs that ship are those of the scripts that ship: the first minute of every training, run
again with one thread a process.

On a machine of the kind that trained them the losses are the same digits. Another kind rounds
bfloat16 products (8 bits) in another order, and Adam's first steps, of equal size whatever the
gradient, carry such differences on: hence the tolerances.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from transformers import CLIPTokenizer

from diffalign.embedded.load import FOLDER
from diffalign.embedded.workshop import train_clip, train_denoiser, train_judge, train_vae
from diffalign.embedded.workshop.training import Team

pytestmark = pytest.mark.slow

BF16 = 2**-7


def logged(*path: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first header of a log and the records up to the next one."""
    records: list[dict[str, Any]] = []
    header, *lines = [json.loads(line) for line in FOLDER.joinpath(*path).read_text().splitlines()]
    for line in lines:
        if "header" in line:
            break
        records.append(line)
    return header["header"], records


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_autoencoder() -> None:
    """Two processes that average every eight updates, here one after the other."""
    header, records = logged("emoji", "training", "vae.jsonl")
    numbers = [int(header[key]) for key in ("seed", "updates", "decoder_updates")]
    team = [
        train_vae.VaeTrainer(
            Team(rank, int(header["processes"])),
            *numbers,
            float(header["heads"]),
            int(header["channels"]),
        )
        for rank in range(int(header["processes"]))
    ]
    steps = []
    for _ in range(records[0]["updates"]):
        first, _ = (trainer.step() for trainer in team)
        steps.append(first)
        if len(steps) % train_vae.SYNCHRONISE == 0:
            mean = torch.stack([trainer.flat.master.data for trainer in team]).mean(0)
            for trainer in team:
                trainer.flat.master.data.copy_(mean)
                trainer.flat.publish()
    for key in ("reconstruction", "mse", "heads"):
        assert np.mean([step[key] for step in steps]) == pytest.approx(
            records[0][key], rel=4 * BF16
        )


def first_losses(header: dict[str, Any], count: int) -> dict[str, float]:
    """Mean losses of the first ``count`` updates that ``header`` describes. Options that an older
    header lacks have their defaults."""
    options = train_denoiser.parser().parse_args([])
    for key in vars(options).keys() & header.keys():
        kind = type(getattr(options, key))
        if kind in (int, float, str):
            setattr(options, key, kind(header[key]))
    vocab = CLIPTokenizer.from_pretrained(FOLDER / "emoji" / "tokenizer").get_vocab()
    vae = AutoencoderTiny.from_pretrained(FOLDER / "emoji" / "vae")
    trainer = train_denoiser.DenoiserTrainer(Team(), options, vae, vocab)
    steps = [trainer.step() for _ in range(count)]
    return {key: float(np.mean([step[key] for step in steps])) for key in steps[0]}


def test_denoiser() -> None:
    """Its first stage; the weights that the second one starts from do not ship."""
    header, records = logged("emoji", "training", "first_stage.jsonl")
    losses = first_losses(header, records[0]["updates"])
    for key in ("loss", "clean", "noisy"):
        assert losses[key] == pytest.approx(records[0][key], rel=BF16)


JUDGES = ["emoji-judge", "emoji-judge-audit", "emoji-judge-2", "emoji-judge-audit-2"]


@pytest.mark.parametrize("model", JUDGES)
def test_judges(model: str) -> None:
    """Those of the second edition start from the shipped ones of the first."""
    header, records = logged(model, "log.jsonl")
    options = train_judge.parser().parse_args(["--out", "unused"])
    for key in ("model", "seed", "batch", "updates", "edition", "rate"):
        setattr(options, key, header.get(key, getattr(options, key)))
    if "from" in header:
        options.source = FOLDER / header["from"]
    trainer = train_judge.JudgeTrainer(options)
    for record in [r for r in records if r["updates"] <= 20]:
        while trainer.done < record["updates"]:
            step = trainer.step()
        assert step["loss"] == pytest.approx(record["loss"], rel=4 * BF16)


@pytest.mark.parametrize("model", ["emoji-clip", "emoji-clip-2"])
def test_rewards(model: str, tmp_path: Path) -> None:
    header, records = logged(model, "log.jsonl")
    options = train_clip.parser().parse_args(["--out", "unused", "--tokenizer", "unused"])
    for key in ("seed", "pairs", "spoilt", "edition", "focus", *train_clip.PHASES):
        setattr(options, key, header.get(key, getattr(options, key)))
    vocab = CLIPTokenizer.from_pretrained(FOLDER / "emoji" / "tokenizer").get_vocab()
    trainer = train_clip.ClipTrainer(options, vocab)
    if "from" in header:
        train_clip.begin(trainer, FOLDER / header["from"], tmp_path)
    for record in [r for r in records if r["updates"] <= 10]:
        while trainer.done < record["updates"]:
            step = trainer.step()
        assert step["loss"] == pytest.approx(record["loss"], rel=4 * BF16)
