"""Makes the pictures of the technique pages and the facts beside them.

    python docs/showcase.py [NAME ...]

For each technique 12 prompts of GenEval are drawn on an embedded model, without the technique and
with it, from the same noise, and judged. One pair becomes ``docs/pairs/NAME.jpg``;
``docs/pairs/facts.json`` says which pair it is and how many images were right on each side. A pair
is picked to show what the technique is for: the first that it makes right; of a technique that
saves, the first that both ways have right; else of those that both have right the one that changes
most.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import diffalign as da
from diffalign.embedded.load import MODELS
from diffalign.eval.evidence import stratified
from diffalign.generate.samples import Job, Sample, picture, samples
from diffalign.tasks.geneval.verdict import keep, prompts, verdict

FOLDER = Path(__file__).parent / "pairs"
FACTS = FOLDER / "facts.json"
STEPS, COUNT, BATCH, SEED = 20, 12, 12, 0
SIDE, GAP = 256, 12


@dataclass(frozen=True, slots=True)
class Show:
    """How a technique is shown."""

    # Python, as it stands on the page
    code: str
    # of both images
    scale: float = 3.0
    model: str = "emoji"
    # the technique of the plain side, "" for the pipeline's own guidance
    plain: str = ""
    plain_name: str = "plain guidance"
    # whether the technique is for cost, so that an equally good image is what it should give
    saves: bool = False
    # a sentence below the code
    note: str = ""
    # the one prompt, drawn from several seeds, whose second object our side negates
    negates: int | None = None


SHOWS = {
    "cfg": Show("da.CFG(3.0)", plain="da.CFG(1.0)", plain_name="no guidance"),
    "adaptive-guidance": Show("da.AdaptiveGuidance()", saves=True),
    "linear-ag": Show("da.LinearAG()", saves=True),
    "interval-cfg": Show("da.IntervalCFG(stop=0.5)", saves=True),
    "scheduled-cfg": Show('da.ScheduledCFG(shape="inverse-linear")', 5.0),
    "apg": Show("da.APG()", 5.0),
    "rescaled-cfg": Show("da.RescaledCFG()", 5.0),
    "magnitude-aware": Show("da.MagnitudeAware()", 5.0),
    "tcfg": Show("da.TCFG()"),
    "beta-cfg": Show("da.BetaCFG(gamma=0.0)"),
    "cfg-plus-plus": Show("da.CFGPlusPlus(0.6)"),
    "fdg": Show("da.FDG(3.0, high=5.0)"),
    "dynamic-cfg": Show('da.DynamicCFG(evaluators=("emoji-alignment",))'),
    "s2-guidance": Show("da.S2Guidance()"),
    "skip-layer-guidance": Show("da.SkipLayerGuidance(layers=(1,))"),
    "pag": Show("da.PAG()"),
    "seg": Show("da.SEG()"),
    "auto-guidance": Show(
        'da.AutoGuidance(weak=da.load("emoji").unet)',
        1.0,
        "emoji-turbo",
        note="No weaker version of a model ships; the call shows the form only.",
    ),
    "nag": Show(
        'da.NAG(5.0, negative_prompt="a photo of a cake", sigma=(0.0, float("inf")))',
        1.0,
        plain_name="no guidance",
        negates=86,
    ),
    "pladis": Show("da.PLADIS()"),
    "cat": Show("da.CAT(0.5)", 2.5, "emoji-dit", saves=True),
    "cfg-zero-star": Show("da.CFGZeroStar()", 2.5, "emoji-dit"),
}


@cache
def opened(name: str) -> Any:
    """An embedded model or judge."""
    return da.load(name)


def words(prompt_id: int) -> list[str]:
    """The objects of a prompt."""
    return [clause["class"] for clause in prompts()[prompt_id]["include"]]


def jobs_of(show: Show) -> list[tuple[int, Job]]:
    """The images: one of each prompt, of all six categories, or several of the one prompt."""
    ids = stratified(COUNT) if show.negates is None else [show.negates] * COUNT
    seeds = [SEED] * COUNT if show.negates is None else range(COUNT)
    return [
        (n, Job(str(prompts()[n]["prompt"]), seed, f"{n}-{seed}"))
        for n, seed in zip(ids, seeds, strict=True)
    ]


@cache
def drawn(show: Show, code: str) -> list[tuple[Sample, bool]]:
    """An image of every job, and whether it is right."""
    pipe, judge = opened(show.model), opened(MODELS[show.model].judge)
    call = {"num_inference_steps": STEPS, "guidance_scale": show.scale}
    techniques = [eval(code, {"da": da})] if code else []
    ids, jobs = zip(*jobs_of(show), strict=True)
    images = [
        sample
        for part in samples(pipe, techniques, jobs, batch=BATCH, call=call)
        for sample in part
    ]
    objects = judge.detect(torch.stack([sample.image for sample in images]))
    right = [
        verdict(prompts()[n], detections, judge.thresholds).correct
        if show.negates is None
        else removed(n, detections, judge)
        for n, detections in zip(ids, objects, strict=True)
    ]
    return list(zip(images, right, strict=True))


def removed(prompt_id: int, detections: Sequence[Any], judge: Any) -> bool:
    """Whether the second object of a prompt is gone and the first is there."""
    first, second = words(prompt_id)
    there = keep(detections, "two_object", judge.thresholds)
    return bool(there.get(first)) and not there.get(second)


def change(pair: tuple[Sample, Sample]) -> float:
    """Mean absolute difference of two images."""
    return float((pair[0].image - pair[1].image).abs().mean())


def pick(plain: list[tuple[Sample, bool]], ours: list[tuple[Sample, bool]], saves: bool) -> int:
    """Which pair is shown."""
    pairs = list(zip(plain, ours, strict=True))
    gains = [i for i, ((_, a), (_, b)) in enumerate(pairs) if b and not a]
    both = [i for i, ((_, a), (_, b)) in enumerate(pairs) if a and b]
    if gains and not saves:
        return gains[0]
    if saves and both:
        return both[0]
    return max(both or range(len(pairs)), key=lambda i: change((plain[i][0], ours[i][0])))


def side_by_side(pair: Iterable[Sample]) -> Image.Image:
    """Two images beside each other, enlarged."""
    sheet = Image.new("RGB", (2 * SIDE + GAP, SIDE), "white")
    for number, sample in enumerate(pair):
        image = picture(sample.image).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        sheet.paste(image, (number * (SIDE + GAP), 0))
    return sheet


def show_one(name: str) -> dict[str, Any]:
    """Draw the pair of a technique; its facts."""
    show = SHOWS[name]
    plain, ours = drawn(show, show.plain), drawn(show, show.code)
    index = pick(plain, ours, show.saves)
    pair = (plain[index][0], ours[index][0])
    side_by_side(pair).save(FOLDER / f"{name}.jpg", quality=88, optimize=True)
    return {
        "prompt": pair[0].job.prompt,
        "seed": pair[0].job.seed,
        "of": len(plain),
        "right": [sum(right for _, right in side) for side in (plain, ours)],
        "nfe": [round(sample.report.nfe, 1) for sample in pair],
        "gained": ours[index][1] and not plain[index][1],
    }


def main() -> None:
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    facts = json.loads(FACTS.read_text()) if FACTS.exists() else {}
    for name in sys.argv[1:] or [name for name, show in SHOWS.items() if not show.note]:
        facts[name] = show_one(name)
        print(name, facts[name], flush=True)
        lines = (f"  {json.dumps(key)}: {json.dumps(facts[key])}" for key in sorted(facts))
        FACTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
