"""What benchmarks share: rows as JSON and Markdown with everything needed to read or repeat them,
and images of the evidence set."""

from __future__ import annotations

import json
import platform
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from diffalign.eval.evidence import Config, Measured, evidence_prompts, measure, tuning_prompts


def environment(device: str) -> dict[str, Any]:
    """Device, versions and commit of this run; ``device`` is where it ran, not what the machine
    has."""
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


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table; floats to four significant digits, absent values as a dash."""
    keys = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(cell(row.get(key)) for key in keys) + " |" for row in rows]
    return "\n".join(lines)


def write(name: str, rows: Sequence[dict[str, Any]], options: Namespace, title: str) -> None:
    """``<output>/<name>.json`` and ``.md``; the table also goes to standard output."""
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    env = environment(getattr(options, "device", "cpu"))
    (folder / f"{name}.json").write_text(
        json.dumps({"environment": env, "options": vars(options), "rows": list(rows)}, indent=1)
        + "\n"
    )
    text = (
        f"# {title}\n\n{table(rows)}\n\n{env['device']}; torch {env['versions']['torch']}, "
        f"diffusers {env['versions']['diffusers']}; "
    )
    text += f"commit {env['commit']}; `{env['command']}`\n"
    (folder / f"{name}.md").write_text(text)
    print(text)


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
    done = measure(
        pipe,
        judge,
        config,
        place,
        prompt_ids=ids,
        scorers=scorers,
        progress=lambda n: bar.advance(task, n),
    )
    bar.update(task, completed=2 * len(ids))
    return done
