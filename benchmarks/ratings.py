"""Which reward says what the audit judge will say? CARINOX's weights for the embedded world.

    python benchmarks/ratings.py [--model emoji] [--prompts 48] [--images 4] [--output ...]

Images of tuning prompts, the unit score of each part of ``emoji-aware``, and whether
``emoji-judge-audit`` calls the image right. A part's weight is its Pearson correlation with that,
by GenEval's tag, over the mean of the parts (Kasaei et al. 2025, arXiv:2509.17458, section 4).
"""

from __future__ import annotations

import torch
from results import Row, command_line, save

import diffalign as da
from diffalign.eval.evidence import stratified
from diffalign.generate.samples import samples
from diffalign.generate.seeds import jobs_of
from diffalign.generate.verdicts import verdicts
from diffalign.rewards.base import BaseReward
from diffalign.rewards.category_aware import pearson, weights_from_ratings
from diffalign.tasks.geneval.verdict import TAGS, prompts

PARTS = ("emoji-clip", "emoji-objects", "emoji-colours", "emoji-numbers", "emoji-judge")
COLUMNS = {
    "n": "images",
    "right": "share of images that the audit judge calls right",
    "...": "correlation of the part's score with that, and its weight",
}


def main() -> None:
    parser = command_line(__doc__, prompts=48, images=4, steps=20, scale=3.0, model="emoji")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe = da.load(options.model)
    records = [prompts()[number] for number in stratified(options.prompts, offset=34)]
    by_prompt = {str(record["prompt"]): record for record in records}
    rewards = {name: da.rewards.load(name) for name in PARTS}
    audit = da.load("emoji-judge-audit")
    jobs = jobs_of(by_prompt, count=options.images, base=5)
    call = {"num_inference_steps": options.steps, "guidance_scale": options.scale}
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in PARTS}
    right: list[bool] = []
    tags: list[str] = []
    for results in samples(pipe, (), jobs, batch=16, call=call):
        images = torch.stack([result.image for result in results])
        texts = [result.job.prompt for result in results]
        tags += [str(by_prompt[text]["tag"]) for text in texts]
        answers = verdicts(audit, images, [by_prompt[text] for text in texts])
        right += [answer is not None and answer.correct for answer in answers]
        for name, reward in rewards.items():
            assert isinstance(reward, BaseReward)
            with torch.no_grad():
                parts[name].append(reward.unit(reward(images, texts)))
    scores = {name: torch.cat(values) for name, values in parts.items()}
    ratings = torch.tensor(right, dtype=torch.float64)
    weights = weights_from_ratings(scores, ratings, tags)
    rows: list[Row] = []
    for tag in TAGS:
        places = [i for i, name in enumerate(tags) if name == tag]
        row: Row = {"method": tag, "n": len(places), "right": float(ratings[places].mean())}
        for name, weight in zip(PARTS, weights[tag], strict=True):
            rho = pearson(scores[name][places], ratings[places])
            row |= {name: round(rho, 3), f"{name}, weight": round(weight, 2)}
        rows.append(row)
    save("ratings", rows, options, COLUMNS)


if __name__ == "__main__":
    main()
