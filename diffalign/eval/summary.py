"""Numbers of a report: means with intervals, costs, and paired comparisons."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

from diffalign.core.types import Json
from diffalign.eval.benchmarks import order_of
from diffalign.eval.files import RunError
from diffalign.eval.results import Column
from diffalign.eval.statistics import Interval, holm, interval, mcnemar
from diffalign.tasks.geneval.summary import summary as official
from diffalign.tasks.published import published

MISSING = 0.005
"""Share of prompts that may lack a score before no overall is formed."""
FEW = 5
"""Below so many prompts an interval over prompts says nothing."""


def summarise(table: Sequence[Column]) -> Json:
    """Everything that a report says and that does not change from machine to machine.

    The layout is that of lm-evaluation-harness: results, configurations and numbers of samples by
    name. The first column is the base of all comparisons.
    """
    return {
        "benchmark": table[0].settings["benchmark"]["name"],
        "scorer": table[0].scorer,
        "results": {column.label: result_of(column) for column in table},
        "configs": {column.label: column.settings for column in table},
        "n-samples": {
            column.label: {
                "original": column.settings["benchmark"]["prompts"],
                "effective": len(column.units),
            }
            for column in table
        },
        "comparisons": comparisons(table),
    }


def per_prompt(column: Column) -> dict[int, float]:
    """Prompt -> mean score of its images."""
    return {n: sum(s.score for s in shots) / len(shots) for n, shots in column.units.items()}


def tags_of(column: Column) -> dict[int, str]:
    """Prompt -> its category."""
    return {shot.index: shot.tag for shot in column.shots}


def result_of(column: Column) -> Json:
    """The numbers of one run."""
    values, tags = per_prompt(column), tags_of(column)
    names = order_of(list(tags.values()))
    by_tag = {}
    for name in names:
        group = [n for n in values if tags[n] == name]
        shots = [shot for shot in column.shots if shot.tag == name]
        by_tag[name] = {
            **_numbers(interval([values[n] for n in group], [name] * len(group))),
            "images": len(shots),
        }
    whole = interval(list(values.values()), [tags[n] for n in values])
    incomplete = incomplete_of(column)
    best = {n: max(shot.score for shot in shots) for n, shots in column.units.items()}
    result: Json = {
        "tags": by_tag,
        "mean_of_tags": _numbers(whole),
        "overall": None if incomplete else whole.mean,
        "incomplete": incomplete,
        "images": len(column.shots),
        "best_of_images": sum(best.values()) / len(best),
        "sizes": sorted({f"{w}x{h}" for w, h in (s.size for s in column.shots if s.size)}),
        "unscored": column.unscored,
        "warnings": warnings_of(column, by_tag),
    }
    for name in ("nfe", "decodes", "rewards", "tied"):
        result[name] = column.mean(name)
    geometric = [shot.geometric for shot in column.shots if shot.geometric is not None]
    if len(geometric) == len(column.shots):
        result["geometric"] = sum(geometric) / len(geometric)
    if not incomplete:
        scores = {tag: entry["mean"] for tag, entry in by_tag.items()} | {"overall": whole.mean}
        settings = column.settings
        name, model = settings["benchmark"]["name"], str(settings["model"]["name"])
        result["published"] = published(name, model, scores)
    return result


def published_lines(results: Json) -> list[str]:
    """A sentence for each run whose model has published scores."""
    lines = []
    for label, result in results.items():
        other = result.get("published")
        if other:
            parts = (
                f"{name} {row['published']:.4g}, here {row['difference']:+.3f}"
                for name, row in other["scores"].items()
            )
            lines.append(
                f"{label}: published by another evaluator ({other['source']}): {'; '.join(parts)}."
            )
    return lines


def _numbers(value: Interval) -> Json:
    return {"mean": value.mean, "low": value.low, "high": value.high, "prompts": value.prompts}


def incomplete_of(column: Column) -> str:
    """Why no overall can be formed of a run, "" if it can."""
    benchmark = column.settings["benchmark"]
    if benchmark["part"]:
        return f"only {benchmark['part']}"
    count, total = len(column.units), int(benchmark["prompts"])
    if total - count > MISSING * total:
        return f"only {count} of {total} prompts have scores"
    if benchmark["name"] != "geneval":
        return "" if count == total else f"only {count} of {total} prompts have scores"
    lines = [
        {"tag": s.tag, "correct": s.score == 1.0, "metadata": json.dumps(s.facts)}
        for s in column.shots
    ]
    return official(lines, int(column.settings["samples"])).incomplete


def warnings_of(column: Column, tags: Json) -> list[str]:
    """What a reader should doubt."""
    warnings = []
    single = tags.get("single_object")
    if single and single["prompts"] >= 20 and single["mean"] < 0.5:
        warnings.append(
            f"single_object is {single['mean']:.2f}: either the model hardly draws single objects, "
            "or the scorer is broken."
        )
    reward = (column.settings.get("search") or {}).get("reward")
    if reward and reward == column.scorer.get("name"):
        warnings.append(
            f"{reward} was raised by the search and is the judge: its score is no test."
        )
    return warnings


def comparisons(table: Sequence[Column]) -> list[Json]:
    """Every pair of columns, paired by prompt: the later minus the earlier one.

    P values are corrected for their number. Raises: ``RunError`` unless prompts, images and seeds
    are the same.
    """
    entries = [_compare(a, b) for a, b in combinations(table, 2)]
    for entry, p in zip(entries, holm([entry["p"] for entry in entries]), strict=True):
        entry["p_holm"] = p
    return entries


def _compare(a: Column, b: Column) -> Json:
    """``b`` minus ``a``."""
    keys = [[(s.index, s.sample, s.seed) for s in column.shots] for column in (a, b)]
    if keys[0] != keys[1]:
        count = len(set(keys[0]) ^ set(keys[1]))
        raise RunError(
            f"{a.label} and {b.label} differ in {count} images: a paired comparison needs the same "
            "prompts, numbers of images and seeds. Finish both, or report them apart."
        )
    one, two, tags = per_prompt(a), per_prompt(b), tags_of(a)
    difference = interval([two[n] - one[n] for n in one], [tags[n] for n in one])
    signs = Counter((two[n] > one[n]) - (two[n] < one[n]) for n in one)
    entry = {
        "a": a.label,
        "b": b.label,
        **_numbers(difference),
        "p": difference.p,
        "won": signs[1],
        "tied": signs[0],
        "lost": signs[-1],
    }
    if a.binary and b.binary:
        pairs = Counter((x.score == 1.0, y.score == 1.0) for x, y in zip(a.shots, b.shots))
        only_a, only_b = pairs[True, False], pairs[False, True]
        entry["images"] = {
            "both": pairs[True, True],
            "only_a": only_a,
            "only_b": only_b,
            "neither": pairs[False, False],
        }
        entry["mcnemar"] = mcnemar(only_a, only_b)
    return entry


def timing_of(table: Sequence[Column]) -> Json:
    """Seconds per image and where the runs were made; the first unit of each host warms up and
    does not count."""
    result = {}
    for column in table:
        seconds, hosts = [], set()
        for timing in sorted(column.timings, key=lambda t: str(t.get("date"))):
            place = (timing.get("host"), timing.get("device"))
            if place in hosts or len(column.timings) == 1:
                seconds.append(timing["seconds"] / timing["images"])
            hosts.add(place)
        seconds.sort()
        result[column.label] = {
            "seconds_median": seconds[len(seconds) // 2] if seconds else None,
            "seconds_p90": seconds[int(0.9 * (len(seconds) - 1))] if seconds else None,
            "seconds_mean": sum(seconds) / len(seconds) if seconds else None,
            "places": _places(column),
        }
    return result


def _places(column: Column) -> list[Json]:
    """Each environment of a run once, with the number of prompts made there."""
    groups: dict[str, Json] = {}
    for timing in column.timings:
        facts = {k: v for k, v in timing.items() if k not in ("seconds", "date", "images")}
        text = json.dumps(facts, sort_keys=True)
        entry = groups.setdefault(text, {**facts, "prompts": 0, "first": timing["date"]})
        entry["prompts"] += 1
        entry["first"] = min(entry["first"], timing["date"])
        entry["last"] = max(entry.get("last", ""), timing["date"])
    return list(groups.values())
