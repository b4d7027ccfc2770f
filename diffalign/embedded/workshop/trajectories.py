"""Trajectories of ``emoji`` with verdicts, for the training of ``emoji-evaluator``: `python -m
diffalign.embedded.workshop.trajectories --out FILE [--pipeline FOLDER] [--prompts 240] [--seed 51]
[--exclude FILE]`.

Each prompt is sampled from two noises at guidance scales from 1 to 8, so that its pictures differ
in what the evaluator will have to choose: the weight. Prompts come from the world's own stream,
never from GenEval's official list; verdicts are those of the second judge.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffalign.core.seeds import seed_of
from diffalign.core.types import Json, Pipeline
from diffalign.embedded.workshop.samples import training_prompts
from diffalign.generate.samples import samples
from diffalign.generate.seeds import Job
from diffalign.generate.verdicts import Detector, verdicts

SCALES = (1.0, 1.0, 1.5, 2.0, 4.0, 8.0)
"""Guidance scale of each picture of a prompt; even places share one noise, odd places another."""


@dataclass(frozen=True)
class Trajectories:
    """Sampled latents with the verdicts on their pictures."""

    # after each of S sampler steps, fp16 [P, n, S, C, 8, 8]
    latents: Tensor
    # P of them
    captions: tuple[str, ...]
    # whether each picture is, bool [P, n]
    right: Tensor
    # noise levels of the steps [S], as ``StepInfo`` counts them
    sigmas: Tensor
    # guidance scales of the n pictures
    scales: tuple[float, ...]

    def mixed(self) -> Tensor:
        """Places of the prompts that have both right and wrong pictures.

        ValueError if there are none.
        """
        mixed = (self.right.any(1) & ~self.right.all(1)).nonzero().flatten()
        if not len(mixed):
            raise ValueError(
                "Trajectories must hold a prompt with right and wrong pictures; there is none. "
                "Generate more prompts."
            )
        return mixed

    def save(self, path: Path) -> None:
        """Write to one file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        table = {
            "latents": self.latents,
            "captions": json.dumps(self.captions),
            "right": self.right,
            "sigmas": self.sigmas,
        }
        torch.save(table | {"scales": json.dumps(self.scales)}, path)

    @classmethod
    def load(cls, path: Path) -> Trajectories:
        """Inverse of ``save``."""
        table = torch.load(path, weights_only=True)
        scales = tuple(json.loads(table["scales"]))
        return cls(
            table["latents"],
            tuple(json.loads(table["captions"])),
            table["right"],
            table["sigmas"],
            scales,
        )


def generate(
    pipe: Pipeline,
    judge: Detector,
    records: dict[str, Json],
    seed: int,
    *,
    steps: int = 20,
    batch: int = 32,
) -> Trajectories:
    """One picture of each caption of ``records`` at each of ``SCALES``.

    Cost: about 1.8 * ``steps`` denoiser rows a picture, and its decoding.
    """
    columns, answers = [], []
    for column, scale in enumerate(SCALES):
        jobs = [Job(caption, seed_of(caption, column % 2, seed), caption) for caption in records]
        latents, right = _column(pipe, judge, records, jobs, scale, steps, batch)
        columns.append(latents)
        answers.append(right)
    cumulative = pipe.scheduler.alphas_cumprod
    times = [
        *pipe.scheduler.timesteps[1:].tolist(),
        0,
    ]  # after the last step the sampler is at the level of the first timestep
    sigmas = ((1 - cumulative[times]) / cumulative[times]).sqrt()
    return Trajectories(
        torch.stack(columns, dim=1), tuple(records), torch.stack(answers, dim=1), sigmas, SCALES
    )


def _column(
    pipe: Pipeline,
    judge: Detector,
    records: dict[str, Json],
    jobs: list[Job],
    scale: float,
    steps: int,
    batch: int,
) -> tuple[Tensor, Tensor]:
    """Latents [P, S, C, 8, 8] of all jobs at one scale, and verdicts [P]."""
    states: list[Tensor] = []

    def keep(
        _: Pipeline, index: int, timestep: int, values: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        states.append(values["latents"].half())
        return {}

    call = {
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "callback_on_step_end": keep,
    }
    latents: list[Tensor] = []
    right: list[bool] = []
    for results in samples(pipe, (), jobs, batch=batch, call=call):
        images = torch.stack([result.image for result in results])
        answers = verdicts(judge, images, [records[result.job.prompt] for result in results])
        right += [answer is not None and answer.correct for answer in answers]
        latents.append(torch.stack(states, dim=1))
        states.clear()
    return torch.cat(latents), torch.tensor(right)


def prompts(seed: int, count: int, exclude: Collection[str] = ()) -> dict[str, Json]:
    """``count`` captions of the world's stream without the official ones and without ``exclude`` ->
    metadata."""
    captions = training_prompts(seed, count + len(exclude))
    return dict([item for item in captions.items() if item[0] not in exclude][:count])


def main() -> None:
    """Command line."""
    from diffusers import StableDiffusionPipeline

    from diffalign.embedded.load import FOLDER, load

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipeline", type=Path, default=FOLDER / "emoji")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--seed", type=int, default=51)
    parser.add_argument(
        "--exclude",
        type=Path,
        help="a file of trajectories whose prompts are left out, for the test",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    exclude = (
        set(Trajectories.load(options.exclude).captions) if options.exclude is not None else set()
    )
    pipe = StableDiffusionPipeline.from_pretrained(
        options.pipeline, dtype=torch.float32, safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    records = prompts(options.seed, options.prompts, exclude)
    generate(pipe, load("emoji-judge-audit"), records, options.seed).save(options.out)


if __name__ == "__main__":
    main()
