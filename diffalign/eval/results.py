"""Runs read back from their folders, as columns of one table; shards of a run become one column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffalign.core.registry import METHODS, TECHNIQUES, Registry, written
from diffalign.core.types import Json
from diffalign.eval.files import RunError, read_json
from diffalign.eval.folder import RunFolder
from diffalign.eval.scoring import Scores, image_root


@dataclass(frozen=True, slots=True)
class Shot:
    """One image with its score."""

    # of the prompt in its benchmark, and of the image among those of the prompt
    index: int
    sample: int
    prompt: str
    tag: str
    facts: Json
    path: Path
    # of the file below ``images``
    file: str
    # None for images of another tool
    seed: int | None
    # in [0, 1]
    score: float
    reason: str
    # nfe, decodes, rewards: what making it cost, empty where unknown
    cost: Json
    # width and height in pixels, None where the record does not say
    size: tuple[int, int] | None = None
    # of answers to questions: their geometric mean
    geometric: float | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """One run, whole or joined from shards."""

    label: str
    key: str
    settings: Json
    # what defines the scorer
    scorer: Json
    # in the order of prompts and images
    shots: tuple[Shot, ...]
    # of each prompt: seconds, images, host, date, versions; empty for images of another tool
    timings: tuple[Json, ...]
    # prompts that have images and no score
    unscored: int = 0

    @property
    def units(self) -> dict[int, list[Shot]]:
        """Prompt -> its images."""
        groups: dict[int, list[Shot]] = {}
        for shot in self.shots:
            groups.setdefault(shot.index, []).append(shot)
        return groups

    @property
    def binary(self) -> bool:
        """Whether every image is either right or wrong."""
        return {shot.score for shot in self.shots} <= {0.0, 1.0}

    def mean(self, name: str) -> float | None:
        """Mean of a cost over the images, None where it is not known."""
        values = [shot.cost[name] for shot in self.shots if name in shot.cost]
        return sum(values) / len(values) if len(values) == len(self.shots) and values else None


def columns(folders: Sequence[Path], scorer: str = "") -> list[Column]:
    """The runs in these folders; folders of one run are joined. ``scorer``: name of the scorer
    whose scores are read, "" for the only one.

    Raises: ``RunError`` for folders without scores, for parts that contradict each other, and for
    runs that cannot stand in one table.
    """
    groups: dict[str, list[RunFolder]] = {}
    for path in folders:
        folder = RunFolder.open(path)
        groups.setdefault(folder.key, []).append(folder)
    labels = distinct([label_of(group[0].settings) for group in groups.values()])
    table = [_column(label, group, scorer) for label, group in zip(labels, groups.values())]
    for other in table[1:]:
        if other.scorer != table[0].scorer:
            raise RunError(
                f"{table[0].label} and {other.label} were scored by different scorers: "
                f"{table[0].scorer} and {other.scorer}. Score both with one of them."
            )
        if other.settings["benchmark"]["name"] != table[0].settings["benchmark"]["name"]:
            raise RunError(
                f"{table[0].label} and {other.label} are runs of different benchmarks; report them "
                "apart."
            )
    return table


def _column(label: str, group: Sequence[RunFolder], scorer: str) -> Column:
    """One run from its shards."""
    units: dict[int, tuple[Json, list[Shot], Json]] = {}
    facts: Json = {}
    unscored = 0
    for folder in group:
        place = _scores(folder, scorer)
        if facts and facts != place.facts:
            raise RunError(f"{folder.path}: its scores are of another scorer than its other parts.")
        facts = place.facts
        for _, record in folder.entries():
            shots = _shots(folder, place, record)
            if shots is None:
                unscored += 1
                continue
            timing = read_json(folder.path / "timing" / f"{record['index']:05d}.json") or {}
            before = units.get(record["index"])
            if before is not None and before[0] != record:
                raise RunError(
                    f"two parts of {label} hold different images of {record['prompt']!r}; one of "
                    f"them is {folder.path}."
                )
            units[record["index"]] = (record, shots, timing)
    if not units:
        raise RunError(f"{group[0].path} holds no scores; run `diffalign eval score` on it.")
    ordered = [units[index] for index in sorted(units)]
    return Column(
        label,
        group[0].key,
        group[0].settings,
        facts,
        tuple(shot for _, shots, _ in ordered for shot in shots),
        tuple(timing for _, _, timing in ordered if timing),
        unscored,
    )


def _scores(folder: RunFolder, name: str) -> Scores:
    """The scores of the named scorer, or of the only one."""
    places = sorted((folder.path / "scores").glob("*/scorer.json"))
    names = [path.parent.name for path in places]
    if not names:
        raise RunError(f"{folder.path} holds no scores; run `diffalign eval score` on it.")
    if not name and len(names) > 1:
        raise RunError(f"{folder.path} holds scores of {', '.join(names)}; name one by --scorer.")
    if name and name not in names:
        raise RunError(f"{folder.path} holds no scores of {name}, only of {', '.join(names)}.")
    place = places[names.index(name)] if name else places[0]
    return Scores(place.parent, read_json(place) or {})


def _shots(folder: RunFolder, place: Scores, record: Json) -> list[Shot] | None:
    """The images of a unit with their scores, None where they have none."""
    hashes = [sample["sha256"] for sample in record["samples"]]
    entry = read_json(place.folder / f"{record['index']:05d}.json")
    if entry is None or entry.get("key") != place.key(hashes):
        return None
    images = image_root(folder)
    return [
        Shot(
            index=record["index"],
            sample=number,
            prompt=record["prompt"],
            tag=record["tag"],
            facts=record["facts"],
            path=images / sample["file"],
            file=sample["file"],
            seed=sample.get("seed"),
            score=float(outcome["score"]),
            reason=outcome["reason"],
            cost={k: sample[k] for k in ("nfe", "decodes", "rewards", "tied") if k in sample},
            size=tuple(sample["size"]) if "size" in sample else None,
            geometric=outcome["measured"].get("geometric"),
        )
        for number, (sample, outcome) in enumerate(
            zip(record["samples"], entry["samples"], strict=True)
        )
    ]


def label_of(settings: Json) -> str:
    """A run in a few words: model, search, techniques."""
    parts = [_texts(TECHNIQUES, settings.get("techniques") or [])]
    search = settings.get("search")
    if search:
        parts.insert(0, f"{_texts(METHODS, search['method'])} by {search['reward']}")
    what = " with ".join(part for part in parts if part) or "plain"
    name = str(settings["model"]["name"])
    return name if settings.get("images") else f"{name}: {what}"


def _texts(registry: Registry[object] | object, configs: Sequence[Mapping[str, object]]) -> str:
    """Configurations as the command line writes them; the bare names where that is not possible."""
    texts = []
    for config in configs:
        try:
            assert isinstance(registry, Registry)
            texts.append(written(registry, registry.from_config(config)))
        except (ValueError, TypeError):
            texts.append(str(config["name"]))
    return "+".join(texts)


def distinct(labels: Sequence[str]) -> list[str]:
    """Labels with a number behind those that stand twice."""
    counts: dict[str, int] = {}
    result = []
    for label in labels:
        counts[label] = counts.get(label, 0) + 1
        result.append(label if counts[label] == 1 else f"{label} ({counts[label]})")
    return result
