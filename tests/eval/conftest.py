"""A tiny model and a stand-in for a scorer, whose runs take a moment."""

import json

import pytest

PROMPTS = ["a photo of a bench", "a <b>red</b> & blue thing", "a photo of two dogs", "x", "y"]


class Brightness:
    """Calls an image right when it is not dark; it has seen no prompt."""

    name = "brightness"

    def __init__(self, border=0.4, broken=None, failing=None):
        self.border, self.broken, self.failing = border, broken, failing
        self.images = 0

    def facts(self):
        return {"name": self.name, "border": self.border}

    def knows(self, item):
        return item.tag != "unknown"

    def canary(self):
        return self.broken

    def score(self, images, item):
        from diffalign.eval.scorers.base import Outcome

        self.images += len(images)
        values = [float(image.mean()) for image in images]
        if item.index == self.failing:
            return [Outcome(float("nan"), "", {}) for _ in values]
        return [
            Outcome(float(v > self.border), "" if v > self.border else "dark <i>", {"mean": v})
            for v in values
        ]


@pytest.fixture(scope="session")
def tiny():
    """A tiny Stable Diffusion as a loaded model of two steps."""
    from diffalign.generate.models import Model
    from diffalign.testing.tiny import tiny_pipeline

    pipe = tiny_pipeline("StableDiffusionPipeline", text=True)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "guidance_scale": 3.0}
    return Model("tiny", "folder", pipe, 2, 3.0, call, {"model": "tiny"})


@pytest.fixture
def benchmark_file(tmp_path):
    """Five prompts of two categories in a file."""
    from diffalign.eval.benchmarks import of_file

    path = tmp_path / "prompts.jsonl"
    tags = ("first", "first", "second", "second", "second")
    lines = [json.dumps({"prompt": p, "category": t}) for p, t in zip(PROMPTS, tags)]
    path.write_text("\n".join(lines) + "\n")
    return of_file(path)


@pytest.fixture
def plan(tiny, benchmark_file):
    from diffalign.eval.generation import Plan

    return Plan(benchmark_file, tiny, samples=2)


@pytest.fixture
def evaluated(plan, tmp_path):
    """``evaluated("name", ...)``: a run that is made and scored, in a folder of that name."""
    from diffalign.eval.folder import RunFolder
    from diffalign.eval.generation import generate
    from diffalign.eval.scoring import pictures_of, score

    def make(name, plan=plan, scorer=None, items=None):
        folder = RunFolder.begin(tmp_path / name, plan.settings())
        generate(plan, folder, items)
        score(scorer or Brightness(), folder, pictures_of(folder))
        return folder

    return make
