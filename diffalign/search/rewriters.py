"""What writes new wordings of a prompt: rules, a local language model, or a function of yours."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from diffalign.search.wording import edits

if TYPE_CHECKING:
    import torch

Scored = tuple[str, float]
"""A prompt and its mean score."""

INSTRUCTION = """You improve prompts of an image generator.
The image must show exactly this: {original}
Prompts that worked well, with scores (higher is better):
{best}
Prompts that worked badly:
{worst}
Write {count} new prompts that say the same in other words and could score higher. Keep every
object, number, colour and position. Answer with a numbered list and nothing else.
1."""
"""What a language model is told."""


@runtime_checkable
class Rewriter(Protocol):
    """Anything that writes wordings of ``original``, told what worked and what did not.

    The same arguments must give the same wordings, so that a search can be repeated. More or
    fewer than ``count`` are allowed.
    """

    def __call__(
        self, original: str, best: Sequence[Scored], worst: Sequence[Scored], count: int
    ) -> list[str]:
        """Wordings, best guesses first."""
        ...


def _seed(*texts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(texts).encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Rules:
    """Writes wordings that differ by one edit from the best prompts: the shipped rewriter.

    Edits are the opening words, number words and digits, synonyms, the order of two clauses, the
    relation's words and its opposite, two sentences for one, a colour repeated behind its noun,
    and additions such as "sharp focus".
    """

    def __call__(
        self, original: str, best: Sequence[Scored], worst: Sequence[Scored], count: int
    ) -> list[str]:
        known = {prompt for prompt, _ in (*best, *worst)}
        parents = [prompt for prompt, _ in best] or [original]
        lines = []
        for parent in parents:
            line = [text for text in dict.fromkeys(edits(parent)) if text not in known]
            random.Random(_seed(original, parent, sorted(known))).shuffle(line)
            lines.append(line)
        # one from each parent in turn
        turns = (line[i] for i in range(max(map(len, lines))) for line in lines if i < len(line))
        return list(dict.fromkeys(turns))[:count]


@dataclass
class LanguageModel:
    """Asks a local text-generation model of transformers; nothing is downloaded.

    ``model``: a folder, or a name that is in the local cache. The model samples with a seed that
    follows from the question. Only lines of a numbered or dashed list count as answers.
    """

    model: str
    instruction: str = INSTRUCTION
    temperature: float = 0.8
    # new tokens for each wording
    tokens: int = 48
    # option that names the model, for errors
    option: str = "rewriter"
    # what it may be beside a model, for errors
    others: str = "'rules'"
    loaded: Any = field(default=None, init=False, repr=False)

    def __call__(
        self, original: str, best: Sequence[Scored], worst: Sequence[Scored], count: int
    ) -> list[str]:
        lists = ["\n".join(f"{score:.3f}: {text}" for text, score in s) for s in (best, worst)]
        question = self.instruction.format(
            original=original, best=lists[0] or "none", worst=lists[1] or "none", count=count
        )
        return answers("1." + self.generate(question, count * self.tokens))[:count]

    def generate(self, question: str, tokens: int) -> str:
        """The model's answer; the global random generators are as before."""
        import torch

        tokenizer, model = self._load()
        if getattr(tokenizer, "chat_template", None):
            chat = [{"role": "user", "content": question.removesuffix("\n1.")}]
            question = tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            )
            question += "1."
        inputs = tokenizer(question, return_tensors="pt").to(model.device)
        inputs.pop("token_type_ids", None)
        devices: list[torch.device] = [] if model.device.type == "cpu" else [model.device]
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(_seed(question))
            output = model.generate(
                **inputs,
                do_sample=True,
                temperature=self.temperature,
                max_new_tokens=tokens,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
        length = inputs["input_ids"].shape[1]
        text: str = tokenizer.decode(output[0, length:], skip_special_tokens=True)
        return text

    def _load(self) -> tuple[Any, Any]:
        if self.loaded is None:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            try:
                self.loaded = (
                    AutoTokenizer.from_pretrained(self.model, local_files_only=True),
                    AutoModelForCausalLM.from_pretrained(self.model, local_files_only=True).eval(),
                )
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{self.option}={self.model!r} must be {self.others}, or a local "
                    f"text-generation model: a folder, or a name in the local cache ({error})."
                ) from error
        loaded: tuple[Any, Any] = self.loaded
        return loaded


def answers(text: str) -> list[str]:
    """The entries of a numbered or dashed list; every other line is dropped."""
    lines = (re.fullmatch(r"\s*(?:\d+[.)]|[-*])\s*(\S.*?)\s*", line) for line in text.splitlines())
    entries = (match[1].strip("\"'“”").strip() for match in lines if match is not None)
    return [entry for entry in dict.fromkeys(entries) if 0 < len(entry) <= 300]
