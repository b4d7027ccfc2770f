"""Results as numbers: a JSON file for each question, with everything needed to read or repeat it.

An estimate is stored as ``{"value": ..., "low": ..., "high": ..., "n": ...}``. ``pages.py`` makes
sentences, tables and plots of the numbers.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.progress import Progress

from diffalign.eval.evidence import (
    Config,
    Measure,
    Measured,
    evidence_prompts,
    measure,
    tag_of,
    tuning_prompts,
)
from diffalign.eval.statistics import Interval

FOLDER = Path(__file__).parent / "results"
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95% interval."""

    value: float
    low: float
    high: float
    # prompts that the bootstrap resampled
    n: int

    @classmethod
    def of(cls, interval: Interval) -> Estimate:
        return cls(interval.mean, interval.low, interval.high, interval.prompts)

    def __format__(self, spec: str) -> str:
        """``spec`` formats each of the three numbers: ``f"{estimate:+.3f}"``."""
        value, low, high = (format(x, spec) for x in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def strata(ids: Sequence[int]) -> list[str]:
    """The tags of prompts, within which a bootstrap draws; one stratum of all where a tag has a
    single prompt, which would leave nothing to draw there."""
    tags = [tag_of(i) for i in ids]
    return tags if min(map(tags.count, tags)) > 1 else ["all"] * len(tags)


@dataclass(frozen=True, slots=True)
class Result:
    """What one benchmark measured."""

    rows: Sequence[Row]
    # unit or meaning of a column by name; "difference of ..." is printed with its sign
    units: dict[str, str]
    # numbers and names that belong to no row
    facts: dict[str, Any] = field(default_factory=dict)
    # the command line
    options: dict[str, Any] = field(default_factory=dict)
    # device, versions, commit and command
    environment: dict[str, Any] = field(default_factory=dict)

    def row(self, method: str, **others: Any) -> Row:
        """The row of a method."""
        return self.row_where(method=method, **others)

    def row_where(self, **wanted: Any) -> Row:
        """The first row with these values."""
        return next(row for row in self.rows if all(row[k] == v for k, v in wanted.items()))


def command_line(text: str, **defaults: str | int | float) -> ArgumentParser:
    """The options that benchmarks share: ``--output``, and one of each of ``defaults``, of its
    type."""
    parser = ArgumentParser(description=text)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--output", default="benchmarks/results")
    return parser


def model_options(text: str, **defaults: str | int | float) -> ArgumentParser:
    """``command_line`` for benchmarks that run on any of the embedded models, with its usual steps
    at its best scale if none are given."""
    from diffalign.embedded.load import pipelines

    parser = command_line(text, **defaults)
    parser.add_argument("--model", default="emoji", choices=pipelines(videos=False))
    parser.add_argument("--steps", type=int, help="the model's usual number if left out")
    parser.add_argument("--scale", type=float, help="the model's best if left out")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    return parser


def on_model(options: Namespace) -> tuple[Any, Any]:
    """The pipeline and the judge of ``--model``. Folders of another model than the first get its
    name: that of results a subfolder, those of images a suffix."""
    import torch

    from diffalign.embedded.load import MODELS, load

    name = options.model
    for key, usual in MODELS[name].defaults.items():
        if getattr(options, key) is None:
            setattr(options, key, usual)
    if name != "emoji":
        options.output = str(Path(options.output) / name)
        for key in ("runs_folder", "evidence_folder"):
            if hasattr(options, key):
                setattr(options, key, f"{getattr(options, key)}-{name}")
    pipe = load(name)
    if options.dtype != "float32":
        pipe.to(getattr(torch, options.dtype))
    return pipe, load(MODELS[name].judge)


def second_judge(model: str) -> Measure:
    """Verdicts, 1 for right, of the judge that checks the first one of an embedded model."""
    import torch

    from diffalign.embedded.load import judge_of, load
    from diffalign.tasks.geneval.verdict import parse_prompt, verdict

    audit = load(judge_of(model).replace("emoji-judge", "emoji-judge-audit"))

    def answers(images: Any, texts: Sequence[str]) -> Any:
        records = [parse_prompt(text) for text in texts]
        pairs = zip(records, audit.detect(images), strict=True)
        rights = [m is not None and verdict(m, seen, audit.thresholds).correct for m, seen in pairs]
        return torch.tensor(rights, dtype=torch.float32)

    return answers


def environment(device: str) -> dict[str, Any]:
    """Device, versions and commit of this run; ``device`` is where it ran, not what the machine
    has."""
    import torch

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    where = (
        torch.cuda.get_device_name(0)
        if device == "cuda"
        else f"CPU, {torch.get_num_threads()} thread(s), {platform.machine()}"
    )
    packages = {
        name: version(name)
        for name in ("torch", "diffusers", "transformers", "diffalign", "entmax", "triton")
        if find_spec(name)
    }
    packages |= {"cuda": str(torch.version.cuda)} if device == "cuda" else {}
    return {
        "device": where,
        "commit": commit,
        "python": platform.python_version(),
        "versions": packages,
        "command": shlex.join(sys.argv),
    }


def save(
    name: str,
    rows: Sequence[Row],
    options: Namespace,
    units: dict[str, str],
    facts: dict[str, Any] | None = None,
) -> None:
    """Write ``<output>/<name>.json`` with the environment of this run, then its page and plots."""
    import pages

    where = environment(getattr(options, "device", "cpu"))
    result = Result(rows, units, facts or {}, vars(options), where)
    folder = Path(options.output)
    write(folder / f"{name}.json", result)
    print(pages.publish(name, folder))


def write(path: Path, result: Result) -> None:
    """One JSON file, one row of it a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {f.name: getattr(result, f.name) for f in fields(result)}
    lines = [json.dumps(row, default=asdict) for row in parts.pop("rows")]
    order = ("environment", "options", "units", "facts")
    head = "".join(f' "{key}": {json.dumps(parts[key], default=asdict)},\n' for key in order)
    path.write_text("{\n" + head + ' "rows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n")


def _estimate(value: dict[str, Any]) -> Any:
    return Estimate(**value) if value.keys() == {f.name for f in fields(Estimate)} else value


def read(name: str, folder: Path = FOLDER) -> Result:
    """What ``save`` wrote.

    Raises: OSError where the benchmark was not run.
    """
    return Result(**json.loads((folder / f"{name}.json").read_text(), object_hook=_estimate))


def images(
    bar: Progress,
    pipe: Any,
    judge: Any,
    config: Config,
    folder: str,
    kind: str = "evidence",
    **scorers: Any,
) -> Measured:
    """``measure`` on the tuning or the evidence prompts with a line in ``bar``;
    ``<folder>/<kind>/<name>`` holds what is finished."""
    ids = {"tuning": tuning_prompts, "evidence": evidence_prompts}[kind]()
    task = bar.add_task(f"{kind}: {config.name}", total=2 * len(ids))
    place = Path(folder) / kind / re.sub(r"[^\w.-]+", "-", config.name)
    run = measure(
        pipe,
        judge,
        config,
        place,
        prompt_ids=ids,
        scorers=scorers,
        progress=lambda n: bar.advance(task, n),
    )
    bar.update(task, completed=2 * len(ids))
    return run


def quality(run: Measured) -> Row:
    """Name, cost and score of a run: the first columns of most tables."""
    return {
        "method": run.config.name,
        "NFE": run.mean("nfe"),
        "seconds": run.mean("seconds"),
        "score": Estimate.of(run.score()),
    }


# columns that several tables have
UNITS = {
    "NFE": "denoiser evaluations per image",
    "seconds": "processor seconds per image",
    "score": "share of correct images, mean over GenEval's six tags",
    "CLIP": "cosine of image and prompt by the edition's emoji-clip",
}
