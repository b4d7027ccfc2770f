"""Images that another tool made, in the official layouts, as a run that can be scored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from diffalign.core.types import Json
from diffalign.eval.benchmarks import Item, compbench_val, geneval
from diffalign.eval.files import RunError, file_digest, read_json, storage, write_json
from diffalign.eval.folder import RunFolder
from diffalign.eval.generation import json_data
from diffalign.tasks.compbench import prompts as compbench

LAYOUTS = {
    "geneval": "00000/metadata.jsonl and 00000/samples/00000.png",
    "compbench": "color/samples/PROMPT_000000.png",
}
Group = tuple[Item, list[Path]]


def adopt(images: Path, benchmark: str, output: Path) -> RunFolder:
    """A run in ``output`` whose images are those in ``images``, which is only read.

    Raises: ``RunError`` for a folder without images in the layout of ``benchmark``.
    """
    if benchmark not in LAYOUTS:
        raise RunError(f"benchmark must be one of {', '.join(LAYOUTS)}; got {benchmark!r}.")
    if not images.is_dir():
        raise RunError(f"{images} is no folder.")
    groups = (_geneval if benchmark == "geneval" else _compbench)(images)
    if not any(files for _, files in groups):
        raise RunError(
            f"{images} holds no images in the layout of {benchmark}: {LAYOUTS[benchmark]}."
        )
    whole = geneval() if benchmark == "geneval" else compbench_val()
    settings: Json = {
        "images": str(images.resolve()),
        "benchmark": {
            "name": benchmark,
            "part": "",
            "prompts": len(whole.items),
            "sha256": whole.digest,
        },
        "model": {"name": images.resolve().name, "revision": None},
        "techniques": [],
        "samples": max(len(files) for _, files in groups),
        "seed": None,
    }
    folder = RunFolder.begin(output, settings)
    with storage(output):
        for item, files in groups:
            record = _record(images, item, files)
            write_json(folder.record_file(item), {"key": folder.unit_key(item), **record})
    return folder


def _record(images: Path, item: Item, files: Sequence[Path]) -> Json:
    samples = [
        {"file": path.relative_to(images).as_posix(), "sha256": file_digest(path)} for path in files
    ]
    return json_data(
        {
            "index": item.index,
            "prompt": item.prompt,
            "tag": item.tag,
            "place": item.place,
            "facts": item.facts,
            "samples": samples,
        }
    )


def _geneval(images: Path) -> list[Group]:
    """NUMBER/metadata.jsonl and NUMBER/samples/NUMBER.png, as the official program reads them."""
    official = geneval().items
    groups = []
    for place in sorted(p for p in images.iterdir() if p.is_dir() and p.name.isdecimal()):
        facts = read_json(place / "metadata.jsonl")
        if facts is None or not isinstance(facts.get("prompt"), str):
            raise RunError(f"{place / 'metadata.jsonl'} is missing or holds no prompt.")
        index = int(place.name)
        known = index < len(official) and official[index].facts == facts
        seeds = f"geneval/{index}" if known else str(facts["prompt"])
        item = Item(index, str(facts["prompt"]), str(facts.get("tag", "prompts")), seeds, facts)
        files = (place / "samples").glob("*.png")
        groups.append((item, sorted(p for p in files if re.match(r"\d+\.png", p.name))))
    return groups


def _compbench(images: Path) -> list[Group]:
    """CATEGORY/samples/PROMPT_NUMBER.png, as the official programs write them."""
    items = {(item.tag, item.prompt): item for item in compbench_val().items}
    groups: dict[int, tuple[Item, list[tuple[int, Path]]]] = {}
    for category in compbench.CATEGORIES:
        place = images / category / "samples"
        for path in sorted(place.glob("*.png")) if place.is_dir() else []:
            try:
                prompt, number = compbench.read_name(path.name)
            except ValueError as error:
                raise RunError(f"{place}: {error}") from error
            item = items.get((category, prompt))
            if item is None:
                raise RunError(f"{place}: {prompt!r} is not a validation prompt of {category}.")
            groups.setdefault(item.index, (item, []))[1].append((number, path))
    ordered = (groups[index] for index in sorted(groups))
    return [(item, [path for _, path in sorted(files)]) for item, files in ordered]
