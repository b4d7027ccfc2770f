"""What is asked of a model: prompts with their tags, and where their images are kept.

GenEval's and T2I-CompBench's images lie as the official programs expect them, so that these can be
run on ours and ours on theirs. Nothing here loads torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffalign.core.errors import nearest
from diffalign.core.types import Json
from diffalign.eval.files import digest
from diffalign.tasks.compbench import prompts as compbench
from diffalign.tasks.geneval.prompts import TAGS, parse_prompt
from diffalign.tasks.geneval.prompts import prompts as geneval_prompts

NAMES = ("geneval", "compbench")


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt of a benchmark."""

    # position in the whole list
    index: int
    prompt: str
    # category
    tag: str
    # what the seeds of its images are made from, see ``core/seeds``
    place: str
    # what the benchmark says of it; the images of GenEval lie beside this as metadata.jsonl
    facts: Json

    @property
    def name(self) -> str:
        """Five digits that name the unit: one prompt with all its images."""
        return f"{self.index:05d}"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A list of prompts."""

    # geneval, compbench, or the name of a file
    name: str
    items: tuple[Item, ...]
    # images of a prompt in the published protocol
    samples: int = 4
    # what part of the published list this is, "" for all of it
    part: str = ""

    @property
    def digest(self) -> str:
        """Hash of the prompts and of what is asked of their images."""
        return digest([[item.prompt, item.tag, item.place, item.facts] for item in self.items])

    @property
    def tags(self) -> tuple[str, ...]:
        """The categories in the order of their first prompts."""
        return tuple(dict.fromkeys(item.tag for item in self.items))

    def spread(self, limit: int | None) -> tuple[Item, ...]:
        """``limit`` prompts evenly spaced over the list, all of them for None."""
        count = len(self.items)
        if limit is None or limit >= count:
            return self.items
        return tuple(self.items[i * count // limit] for i in range(limit))

    def file(self, item: Item, sample: int) -> str:
        """Where image ``sample`` of a prompt lies below ``images``."""
        if self.name == "compbench":
            number = int(item.place.rpartition("/")[2]) * compbench.IMAGES + sample
            return f"{item.tag}/samples/{compbench.file_name(item.prompt, number)}"
        return f"{item.name}/samples/{sample:05d}.png"

    def where(self, test: Callable[[Item], bool], part: str) -> Benchmark:
        """The prompts that pass ``test``; ``part`` says what they are."""
        items = tuple(item for item in self.items if test(item))
        return self if len(items) == len(self.items) else replace(self, items=items, part=part)


def geneval() -> Benchmark:
    """The 553 prompts of GenEval."""
    items = (
        Item(n, str(facts["prompt"]), str(facts["tag"]), f"geneval/{n}", facts)
        for n, facts in enumerate(geneval_prompts())
    )
    return Benchmark("geneval", tuple(items))


def compbench_val() -> Benchmark:
    """The 2,400 validation prompts of T2I-CompBench++, category by category."""
    items = (
        Item(
            300 * number + n, prompt, tag, f"compbench/{tag}/{n}", dict(compbench.parse_of(tag, n))
        )
        for number, tag in enumerate(compbench.CATEGORIES)
        for n, prompt in enumerate(compbench.prompts(tag))
    )
    return Benchmark("compbench", tuple(items), compbench.IMAGES)


def named(name: str, tags: Sequence[str] = ()) -> Benchmark:
    """The benchmark of that name, or the prompts of a JSON lines file; ``tags``: only these.

    Raises: ValueError for what cannot be used.
    """
    if name == "geneval":
        benchmark = geneval()
    elif name == "compbench":
        benchmark = compbench_val()
    elif name.endswith((".jsonl", ".json")):
        benchmark = of_file(Path(name))
    else:
        raise ValueError(
            f"unknown benchmark {name!r}; give geneval, compbench or a file of prompts FILE.jsonl. "
            f"Nearest: {nearest(name, NAMES)}."
        )
    for tag in tags:
        if tag not in benchmark.tags:
            raise ValueError(
                f"{benchmark.name} has no category {tag!r}; it has {', '.join(benchmark.tags)}."
            )
    return benchmark.where(lambda item: not tags or item.tag in tags, ", ".join(tags))


def of_file(path: Path) -> Benchmark:
    """Prompts of a JSON lines file: ``prompt``, and perhaps ``category``, the clauses of GenEval
    (``tag``, ``include``, ``exclude``) or ``questions`` (pairs of question and answer). The file of
    GenEval 2 is read as it is.

    Raises: ValueError for a file that cannot be read, with the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a UTF-8 text: {error}.") from error
    items: list[Item] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            items.append(_item(len(items), line, f"{path}, line {number}"))
    if not items:
        raise ValueError(f"{path} holds no prompt; write one JSON object a line.")
    twice = [text for text, n in Counter(item.prompt for item in items).items() if n > 1]
    if twice:
        raise ValueError(
            f"{path}: the prompt {twice[0]!r} stands twice; its images would be equal."
        )
    return Benchmark(path.name, tuple(items))


def _item(index: int, line: str, where: str) -> Item:
    try:
        facts = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}).") from error
    prompt = facts.get("prompt") if isinstance(facts, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f'{where}: expected an object with "prompt": text; got {line[:80]!r}.')
    if "vqa_list" in facts:  # a line of GenEval 2
        kind = f"atomicity {facts.get('atom_count', '?')}"
        facts = {"category": kind, "questions": facts["vqa_list"], **facts}
    if "include" not in facts and "questions" not in facts:
        facts = {**(parse_prompt(prompt) or {}), **facts}
    tag = facts.get("category", facts.get("tag", "prompts"))
    if not isinstance(tag, str) or not tag:
        raise ValueError(f"{where}: category must be a text; got {tag!r}.")
    _check_questions(facts.get("questions", []), where)
    return Item(index, prompt, tag, prompt, {"tag": tag, **facts})


def _check_questions(questions: object, where: str) -> None:
    """Raise ValueError unless ``questions`` are pairs of texts."""
    pairs = questions if isinstance(questions, list) else [questions]
    for pair in pairs:
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(text, str) and text.strip() for text in pair)
        ):
            raise ValueError(
                f'{where}: questions must be pairs like ["Is there a cat?", "yes"]; got {pair!r}.'
            )


def is_complete(benchmark: Benchmark, items: Sequence[Item]) -> bool:
    """Whether a benchmark's published number may be formed from these prompts."""
    return not benchmark.part and len(items) == len(benchmark.items)


def order_of(tags: Sequence[str]) -> list[str]:
    """Tags in the order of the benchmarks, others behind them as they come."""
    known = (*TAGS, *compbench.CATEGORIES)
    return sorted(dict.fromkeys(tags), key=lambda t: known.index(t) if t in known else len(known))
