"""Do the newest, or the declared oldest, diffusers, transformers and torch pass the quick tests?

    python benchmarks/bounds.py newest|oldest [--folder .venv-newest] [--output outputs]
                                [-- arguments of pytest]

Makes an environment of its own, installs what pyproject.toml asks for with these three at that
end, runs the tests that are not slow, prints a summary and writes it to ``outputs/newest.md``. The
exit status is that of pytest. Needs the standard library and pip alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLLOWED = ("diffusers", "transformers", "torch")
EXTRAS = ("dev", "app", "eval", "ocr")
SHOWN = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "numpy")
REQUIREMENT = re.compile(r"([\w.-]+)(\[[^\]]*\])?\s*([^;]*)(;.*)?")


def declared(project: Path) -> list[str]:
    """What the project and the extras that its tests use ask for."""
    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    extras = table["optional-dependencies"]
    return [*table["dependencies"], *(line for name in EXTRAS for line in extras[name])]


def requirements(lines: Iterable[str], end: str) -> list[str]:
    """``lines`` with the followed packages at one end.

    ``newest``: without the ceiling, which is what the run is to find. ``oldest``: at the floor, any
    patch release of it.
    """
    return [_at_end(line, end) for line in lines]


def _at_end(line: str, end: str) -> str:
    match = REQUIREMENT.fullmatch(line)
    assert match is not None, line
    name, extras, bounds, marker = (part or "" for part in match.groups())
    if name not in FOLLOWED:
        return line
    floor = next(part.strip()[2:] for part in bounds.split(",") if part.strip().startswith(">="))
    minor = ".".join([*floor.split("."), "0"][:2])
    bound = f">={floor}" if end == "newest" else f">={floor},=={minor}.*"
    return f"{name}{extras}{bound}{marker}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What pytest counted."""

    tests: int
    seconds: float
    # "folder.module::test" -> first line of its error
    failures: dict[str, str]
    skipped: int

    @property
    def passed(self) -> int:
        return self.tests - len(self.failures) - self.skipped


def outcome(report: Path) -> Outcome:
    """A JUnit file of pytest."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    failures = {}
    for suite in suites:
        for case in suite.iter("testcase"):
            for child in case:
                if child.tag in ("failure", "error"):
                    name = f"{case.get('classname')}::{case.get('name')}"
                    lines = (child.get("message") or "").strip().splitlines()
                    failures[name] = lines[0] if lines else child.tag
    return Outcome(
        tests=sum(int(suite.get("tests", 0)) for suite in suites),
        seconds=sum(float(suite.get("time", 0)) for suite in suites),
        failures=failures,
        skipped=sum(int(suite.get("skipped", 0)) for suite in suites),
    )


def summary(end: str, versions: dict[str, str], result: Outcome) -> str:
    """The page that the run leaves: versions, counts, and each failure in a line."""
    lines = [f"# Quick tests with the {end} versions", "", "| package | version |", "| --- | --- |"]
    lines += [f"| {name} | {versions[name]} |" for name in SHOWN if name in versions]
    counts = f"{result.passed} passed, {len(result.failures)} failed, {result.skipped} skipped"
    lines += ["", f"Python {sys.version.split()[0]}: {counts} in {result.seconds:.0f} s.", ""]
    lines += [f"- `{name}`: {error}" for name, error in sorted(result.failures.items())]
    return "\n".join(lines).rstrip() + "\n"


def install(folder: Path, end: str) -> Path:
    """The environment's interpreter, everything installed."""
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    asked = requirements(declared(ROOT / "pyproject.toml"), end)
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-input"]
    subprocess.run([*pip, "--upgrade", *asked], check=True)
    subprocess.run([*pip, "--no-deps", "-e", str(ROOT)], check=True)
    return python


def versions_of(python: Path) -> dict[str, str]:
    """Installed packages: name -> version."""
    command = [str(python), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {item["name"].lower(): item["version"] for item in json.loads(listed)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("end", choices=("newest", "oldest"))
    parser.add_argument("--folder", type=Path, help="of the environment")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options, tests = parser.parse_args(words[:end]), words[end + 1 :]
    folder = (options.folder or ROOT / f".venv-{options.end}").resolve()
    python = install(folder, options.end)
    options.output.mkdir(parents=True, exist_ok=True)
    report = (options.output / f"{options.end}.xml").resolve()
    command = [str(python), "-m", "pytest", "-m", "not slow", f"--junitxml={report}"]
    command.append("--continue-on-collection-errors")
    status = subprocess.run([*command, *tests], cwd=ROOT).returncode
    page = summary(options.end, versions_of(python), outcome(report))
    (options.output / f"{options.end}.md").write_text(page, encoding="utf-8")
    print(page)
    return status


if __name__ == "__main__":
    sys.exit(main())
