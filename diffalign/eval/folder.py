"""The folder of a run: what it was made with, its images, and one record for each unit.

A unit is one prompt with all its images. It is finished when its record is there and its images
are those that the record names; the record is written last. Whatever changes from machine to
machine (seconds, dates, host, command) stands in ``timing``, and everything else is the same, byte
for byte, for any number of processes.

    run.json              what defines the run
    images/...            in the layout of the benchmark
    records/00000.json    files with their hashes, seeds and cost
    scores/SCORER/...     what a scorer measured in the images of each unit
    timing/00000.json     seconds, host, date, versions, command
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffalign.core.types import Json
from diffalign.eval.benchmarks import Benchmark, Item
from diffalign.eval.files import (
    RunError,
    clear_parts,
    digest,
    file_digest,
    read_json,
    storage,
    write,
    write_json,
)


@dataclass(frozen=True, slots=True)
class Share:
    """The part of one process: every ``count``-th of its units, from ``index`` on."""

    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, text: str | None, environment: Mapping[str, str] = os.environ) -> Share:
        """``"0/2"`` is the first of two machines that share nothing; on each, the processes of
        RANK and WORLD_SIZE share its part.

        Raises: ValueError for another text.
        """
        machine, machines = 0, 1
        if text is not None:
            first, slash, second = text.partition("/")
            if not (slash and first.isdecimal() and second.isdecimal()):
                raise ValueError(f"shard must be like 0/2, the first of two; got {text!r}.")
            machine, machines = int(first), int(second)
            if not machine < machines:
                raise ValueError(
                    f"shard counts from 0: one of {machines} is 0/{machines} to "
                    f"{machines - 1}/{machines}; got {text!r}."
                )
        size = int(environment.get("WORLD_SIZE", "1"))
        rank = int(environment.get("RANK", "0"))
        return cls(machine * size + rank, machines * size)

    def of_items(self, items: Sequence[Item]) -> list[Item]:
        """The units of this process; the parts of ``items`` differ by at most one unit."""
        return list(items[self.index :: self.count])


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A folder with a run in it."""

    path: Path
    # what defines the run
    settings: Json

    @classmethod
    def begin(cls, path: Path, settings: Json) -> RunFolder:
        """The folder for a run with these settings, new or to be continued.

        Raises: ``RunError`` where it holds another run, or cannot be written.
        """
        with storage(path):
            before = read_json(path / "run.json")
            if before is None:
                strangers = [p.name for p in path.iterdir()] if path.is_dir() else []
                if any(not name.startswith(".") for name in strangers):
                    raise RunError(
                        f"{path} holds {sorted(strangers)[0]} and no run; give an empty folder."
                    )
                write_json(path / "run.json", settings)
            elif before != settings:
                raise RunError(
                    f"{path} holds another run: {differences(before, settings)}. Give another "
                    "folder, or the settings of that run."
                )
        return cls(path, settings)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The folder of a run that was begun.

        Raises: ``RunError`` where there is none.
        """
        settings = read_json(path / "run.json")
        if settings is None:
            raise RunError(f"{path} holds no run (no run.json that can be read).")
        return cls(path, settings)

    @property
    def key(self) -> str:
        """Hash of what defines the run."""
        return digest(self.settings)

    @property
    def samples(self) -> int:
        """Images of a prompt."""
        return int(self.settings["samples"])

    def unit_key(self, item: Item) -> str:
        """Content key of a unit: model, prompt, seeds and settings."""
        seeds = [item.place, self.settings["seed"], self.samples]
        return digest([self.settings["model"], item.prompt, seeds, self.key])

    def image(self, benchmark: Benchmark, item: Item, sample: int) -> Path:
        """Where an image of a unit lies."""
        return self.path / "images" / benchmark.file(item, sample)

    def record_file(self, item: Item) -> Path:
        """The record that is written when a unit is finished."""
        return self.path / "records" / f"{item.name}.json"

    def record(self, item: Item) -> Json | None:
        """The record of a unit of this run, None where it is not finished."""
        record = read_json(self.record_file(item))
        return record if record is not None and record.get("key") == self.unit_key(item) else None

    def finished(self, item: Item) -> bool:
        """Whether the unit has its record, and its images are those of the record."""
        record = self.record(item)
        return record is not None and all(
            file_digest(self.path / "images" / sample["file"]) == sample["sha256"]
            for sample in record["samples"]
        )

    def clear(self, benchmark: Benchmark, item: Item) -> None:
        """Remove what an interrupted attempt left of a unit."""
        self.record_file(item).unlink(missing_ok=True)
        for sample in range(self.samples):
            image = self.image(benchmark, item, sample)
            image.unlink(missing_ok=True)
            clear_parts(image.parent, image.name)

    def finish(self, benchmark: Benchmark, item: Item, record: Json, timing: Json) -> None:
        """Write the record of a unit whose images are written."""
        if benchmark.name != "compbench":  # as the official program of GenEval reads it
            folder = self.image(benchmark, item, 0).parents[1]
            write(folder / "metadata.jsonl", json.dumps(item.facts))
        write_json(self.path / "timing" / f"{item.name}.json", timing)
        write_json(self.record_file(item), {"key": self.unit_key(item), **record})

    def timing(self, item: Item) -> Json:
        """Seconds and place of a unit, empty where they are not known."""
        return read_json(self.path / "timing" / f"{item.name}.json") or {}

    def entries(self) -> Iterator[tuple[Item, Json]]:
        """The finished units of this run with their records, in the order of the prompts."""
        for path in sorted((self.path / "records").glob("[0-9]*.json")):
            record = read_json(path)
            if record is None:
                continue
            fields = (record.get(name) for name in ("index", "prompt", "tag", "place", "facts"))
            item = Item(*fields)  # type: ignore[arg-type]
            if record.get("key") == self.unit_key(item):
                yield item, record


def differences(before: Mapping[str, object], after: Mapping[str, object], at: str = "") -> str:
    """The fields in which two settings differ, with their values."""
    parts = []
    for name in sorted({*before, *after}):
        one, two = before.get(name), after.get(name)
        if isinstance(one, dict) and isinstance(two, dict):
            if one != two:
                parts.append(differences(one, two, f"{at}{name}."))
        elif one != two:
            parts.append(f"{at}{name} is {one!r} there and {two!r} here")
    return ", ".join(parts)
