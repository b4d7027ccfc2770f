"""Are found prompts worth anything? PEZ says planted prompts again, SAGE looks for words that break
the model.

    python benchmarks/found_prompts.py [--prompts 12] [--seeds 4] [--methods NAME ...]
        [--finished] [--output ...]

``pez, text`` says the planted prompt in other tokens of the pipeline's own text encoder, ``pez,
image`` describes a picture of it with ``emoji-clip``; images are drawn from the found prompt and
judged by what was planted, beside images of the planted prompt from the same seeds. ``sage`` fills
two slots of the prompt; a failure is one that ``emoji-judge-audit`` confirms. The found words are
tried on fresh seeds, and random words with as many images as the search has made. Finished runs are
kept in ``--work``; ``--finished`` makes the table of what is there.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import Estimate, Row, command_line, save, strata
from rich.progress import Progress

import diffalign as da
from diffalign.eval.evidence import stratified, tag_of
from diffalign.eval.statistics import interval
from diffalign.generate.verdicts import verdicts
from diffalign.tasks.geneval.verdict import TAGS, prompts

CALL = {"num_inference_steps": 10, "guidance_scale": 3.0}
WAYS = ("pez, text", "pez, image", "sage")
COLUMNS = {
    "n": "prompts",
    "NFE": "mean denoiser rows of a run",
    "cosine": "of the found prompt with the planted one, or with its picture",
    "planted": "share of images of the planted prompt that are right, by the audit judge",
    "found": "share of images of the found prompt that show what was planted, by the audit judge",
    "failures": "share of images of the found words, on fresh seeds, that are confirmed failures",
    "chance": "share of images of random words that are, at the NFE of the search",
    "difference": "difference of found to planted, or of failures to chance",
    **dict.fromkeys(TAGS, "share found, or of failures, among the prompts of this category"),
}


def planted(pipe: Any, prompt: str, way: str, seeds: int) -> dict[str, Any]:
    """PEZ on one planted prompt."""
    texts = {"planted": prompt}
    seed = torch.Generator().manual_seed(10**6)
    picture = pipe(prompt, generator=seed, output_type="pt", **CALL).images[0]
    method = da.PEZ(tokens=6, iterations=400, restarts=2, draws=1, tower="pipeline")
    if way == "pez, image":
        method = da.PEZ(tokens=6, iterations=400, restarts=2, draws=1, images=(picture,))
    result = da.align(pipe, prompt, method=method, reward="emoji-clip", **CALL)
    texts["found"] = result.lineage.prompt or prompt
    return {"texts": texts, "cosine": result.log[-1]["cosine"], "nfe": result.ledger.nfe} | {
        key: right(pipe, text, prompt, seeds) for key, text in texts.items()
    }


def right(pipe: Any, text: str, prompt: str, seeds: int) -> float:
    """Share of images of ``text`` that show ``prompt``, by the audit judge."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    images = pipe([text] * seeds, generator=generators, output_type="pt", **CALL).images
    record = next(record for record in prompts() if record["prompt"] == prompt)
    answers = verdicts(da.load("emoji-judge-audit"), images, [record] * seeds)
    return sum(bool(answer and answer.correct) for answer in answers) / seeds


def hunted(pipe: Any, prompt: str, seeds: int) -> dict[str, Any]:
    """SAGE in the words around one prompt."""
    method = da.SAGE(
        search="prompt", rounds=2, seeds=2, candidates=6, beam=2, confirmations=2 * seeds
    )
    result = da.align(pipe, prompt, method=method, reward="emoji-failure", **CALL)
    last = result.log[-1]
    return {
        "texts": {"planted": prompt, "found": result.lineage.prompt or prompt},
        "nfe": result.ledger.nfe,
        "failures": last["fresh"],
        "chance": last["random"],
    }


def records_of(way: str, pipe: Any, ids: list[int], options: Namespace, bar: Progress) -> list[Any]:
    """The runs of one way on all prompts, those that are finished read from their files."""
    place = Path(options.work) / options.model / way.replace(", ", "-")
    place.mkdir(parents=True, exist_ok=True)
    task = bar.add_task(way, total=len(ids))
    records = []
    for prompt_id in ids:
        file, prompt = place / f"{prompt_id}.json", str(prompts()[prompt_id]["prompt"])
        if not file.exists() and not options.finished:
            if way == "sage":
                record = hunted(pipe, prompt, options.seeds)
            else:
                record = planted(pipe, prompt, way, options.seeds)
            file.write_text(json.dumps(record | {"prompt_id": prompt_id}))
        if file.exists():
            records.append(json.loads(file.read_text()))
        bar.advance(task)
    return records


def row_of(way: str, records: list[Any]) -> Row:
    """The table's row of one way."""
    tags = strata([record["prompt_id"] for record in records])
    ours, theirs = ("failures", "chance") if way == "sage" else ("found", "planted")
    row: Row = {"method": way, "n": len(records)}
    row["NFE"] = float(np.mean([record["nfe"] for record in records]))
    for key in ("cosine", "planted", "found", "failures", "chance"):
        values = [record[key] for record in records if key in record]
        if key == "cosine" or not values:
            row[key] = float(np.mean(values)) if values else None
        else:
            row[key] = Estimate.of(interval(values, tags))
    differences = [record[ours] - record[theirs] for record in records]
    row["difference"] = Estimate.of(interval(differences, tags))
    names = [tag_of(record["prompt_id"]) for record in records]
    return row | {
        name: float(
            np.mean([r[ours] for r, tag in zip(records, names, strict=True) if tag == name])
        )
        for name in dict.fromkeys(names)
    }


def main() -> None:
    parser = command_line(__doc__, prompts=12, seeds=4, model="emoji", work="build/found_prompts")
    parser.add_argument("--methods", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--finished", action="store_true", help="run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe, ids = da.load(options.model), stratified(options.prompts)
    examples: dict[str, list[str]] = {}
    rows: list[Row] = []
    with Progress() as bar:
        for way in options.methods:
            if records := records_of(way, pipe, ids, options, bar):
                rows.append(row_of(way, records))
                examples[way] = [
                    f"{r['texts']['planted']}: {r['texts']['found']}" for r in records[:3]
                ]
    save("found_prompts", rows, options, COLUMNS, {"examples": examples})


if __name__ == "__main__":
    main()
