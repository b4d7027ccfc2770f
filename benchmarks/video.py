"""What do a search over chunks, and techniques in each of them, buy? Whole videos and trees of
chunks on the same sentences.

    python benchmarks/video.py [--model emoji-video] [--prompts 60] [--seeds 2] [--ways NAME ...]

The reward is ``emoji-story``, how much of its sentence a clip shows by the boxes of
``emoji-judge``; whether the clip is right is also said by ``emoji-judge-audit``, which no method
sees. Compute is counted in rows of the denoiser, each a chunk or the context of one, and in
processor seconds, both up to the end of the search: the final call that repeats the winner is left
out. Finished runs are kept in ``--work`` and not repeated.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results import Estimate, Row, command_line, save
from rich.progress import Progress

import diffalign as da
from diffalign.embedded.load import MODELS, pipeline_in
from diffalign.embedded.workshop.score_video import CATEGORIES, sentences
from diffalign.embedded.workshop.video_parts import LENGTH
from diffalign.embedded.world.clips import FRAMES
from diffalign.embedded.world.scenes import SIZE
from diffalign.embedded.world.stories import reading
from diffalign.eval.statistics import interval
from diffalign.rewards.emoji_story import EmojiStory

BASE = "linear search, 20"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to make a video."""

    method: str = "linear-search:n=1"
    techniques: tuple[da.Technique, ...] = ()
    # guidance scale, None for that of the command line
    scale: float | None = None
    # the way that it stands beside
    beside: str = BASE


WAYS: dict[str, Way] = {
    "one sample": Way(),
    "linear search, 5": Way("linear-search:n=5"),
    "linear search, 10": Way("linear-search:n=10"),
    BASE: Way("linear-search:n=20"),
    "tree 3-1, keep 1": Way("tree-of-frames:branch=(3,1),keep=(1),splitter=whole"),
    "tree 6-2-1, keep 2": Way("tree-of-frames:branch=(6,2,1),keep=(2),splitter=whole"),
    "tree 6-3-3-3, keep 2": Way("tree-of-frames:branch=(6,3),keep=(2),splitter=whole"),
    "tree 12-2-1, keep 3": Way("tree-of-frames:branch=(12,2,1),keep=(3),splitter=whole"),
    "tree 12-1, keep 6-3": Way("tree-of-frames:branch=(12,1),keep=(6,3),splitter=whole"),
    "drafts of 10": Way('draft-commit:inner="linear-search:n=10",steps=3,commits=2'),
    "find, 20": Way("find:iterations=4,batch=4,draws=4,rate=0.05"),
    "no guidance": Way(scale=1.0, beside="one sample"),
    "NAG, no guidance": Way(
        techniques=(da.NAG(5.0, negative_prompt=""),), scale=1.0, beside="no guidance"
    ),
    "AdaptiveGuidance": Way(techniques=(da.AdaptiveGuidance(),), beside="one sample"),
    "S2": Way(techniques=(da.S2Guidance(),), beside="one sample"),
}
"""Every way by its name; a way stands behind the one that it is compared with."""

COLUMNS = {
    "rows": "denoiser rows of a search, mean",
    "seconds": "processor seconds of a search, median",
    "likeness": "how much of the sentence the clip shows, which is what is optimised",
    "judge": "share of right clips by the judge that the reward asks",
    "audit": "the same by the judge that shares nothing with it",
    "beside": "the way that it is compared with",
    "to beside": "difference of the likeness to that way",
    "audit to beside": "difference of the audit judge's share to that way",
    "share of rows": "rows against that way",
    "share of seconds": "seconds against that way",
    **dict.fromkeys(CATEGORIES, "right clips of this category, audit judge"),
}


def run(way: Way, pipe: Any, prompt: str, seed: int, options: Namespace) -> dict[str, Any]:
    """One search as data."""
    reward, audit = EmojiStory(), EmojiStory("emoji-judge-audit")
    start = time.process_time()
    spent: list[tuple[float, int]] = []
    result = da.align(
        pipe,
        prompt,
        method=way.method,
        reward=reward,
        techniques=way.techniques,
        seed=seed,
        batch=8,
        show=lambda status: spent.append((time.process_time() - start, status.nfe)),
        height=SIZE,
        width=SIZE,
        num_frames=FRAMES,
        num_inference_steps=options.steps,
        guidance_scale=options.scale if way.scale is None else way.scale,
        max_sequence_length=LENGTH,
    )
    seconds, rows = spent[-1]
    video, story = result.tensor[None].float(), reading(prompt)
    right = {
        name: judge.verdicts(video, [story])[0].right
        for name, judge in (("judge", reward.judge), ("audit", audit.judge))
    }
    return {"rows": rows, "seconds": seconds, "likeness": float(result.score)} | right


def runs(name: str, pipe: Any, options: Namespace, bar: Progress) -> list[list[dict[str, Any]]]:
    """The searches of one way, by prompt and seed; those that are finished are read."""
    prompts = sentences(options.prompts // len(CATEGORIES))
    task = bar.add_task(name, total=len(prompts) * options.seeds)
    folder = Path(options.work) / name.replace(", ", "-").replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    table = []
    for number, (prompt, _) in enumerate(prompts):
        table.append([])
        for seed in range(options.seeds):
            file = folder / f"{len(prompts)}-{number}-{seed}.json"
            if not file.exists():
                part = file.with_suffix(f".{os.getpid()}.part")
                part.write_text(json.dumps(run(WAYS[name], pipe, prompt, seed, options)))
                part.replace(file)
            table[-1].append(json.loads(file.read_text()))
            bar.advance(task)
    return table


def row_of(
    name: str,
    table: Sequence[Sequence[dict[str, Any]]],
    base: Sequence[Sequence[dict[str, Any]]],
    tags: Sequence[str],
) -> Row:
    """The row of one way beside another; ``tags``: the category of each prompt."""

    def means(key: str, source: Sequence[Sequence[dict[str, Any]]] = table) -> list[float]:
        return [statistics.fmean(float(record[key]) for record in group) for group in source]

    def middle(source: Sequence[Sequence[dict[str, Any]]]) -> float:
        return statistics.median(record["seconds"] for group in source for record in group)

    def estimate(values: Sequence[float], names: Sequence[str]) -> Estimate:
        return Estimate.of(interval(values, names))

    row: Row = {
        "method": name,
        "rows": statistics.fmean(means("rows")),
        "seconds": middle(table),
        **{key: estimate(means(key), tags) for key in ("likeness", "judge", "audit")},
    }
    row["beside"] = WAYS[name].beside
    for column, key in (("to beside", "likeness"), ("audit to beside", "audit")):
        pairs = zip(means(key), means(key, base), strict=True)
        row[column] = estimate([a - b for a, b in pairs], tags)
    row["share of rows"] = row["rows"] / statistics.fmean(means("rows", base))
    row["share of seconds"] = row["seconds"] / middle(base)
    audit = means("audit")
    for tag in dict.fromkeys(tags):
        row[tag] = statistics.fmean(a for a, t in zip(audit, tags, strict=True) if t == tag)
    return row


def main() -> None:
    parser = command_line(__doc__, prompts=60, seeds=2, steps=6, scale=3.0, work="build/video")
    parser.add_argument("--model", default="emoji-video", help="a name, or a folder of a pipeline")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    options = parser.parse_args()
    if options.prompts % len(CATEGORIES) or options.prompts < 1 or options.seeds < 1:
        parser.error(f"--prompts: expected a multiple of {len(CATEGORIES)}; --seeds: at least 1")
    torch.set_num_threads(1)
    name = options.model
    pipe = da.load(name) if name in MODELS else pipeline_in(Path(name))
    tags = [tag for _, tag in sentences(options.prompts // len(CATEGORIES))]
    wanted = {other for name in options.ways for other in (name, WAYS[name].beside)}
    with Progress() as bar:
        tables = {name: runs(name, pipe, options, bar) for name in WAYS if name in wanted}
    rows = [row_of(n, tables[n], tables[WAYS[n].beside], tags) for n in WAYS if n in options.ways]
    save("video", rows, options, COLUMNS, {"prompts": len(tags)})


if __name__ == "__main__":
    main()
