"""The fitted part of LinearAG: which steps estimate the unconditional prediction, and from what
(arXiv:2312.12487, section 5.2)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from safetensors.torch import load_file, save
from torch import Tensor

from diffalign.core import UnsupportedModel

Mode = Literal["guided", "estimated", "conditional"]


@dataclass(frozen=True, slots=True)
class Identity:
    """What a policy was fitted on; it means nothing anywhere else."""

    # hash of the denoiser
    model: str
    # class name
    scheduler: str
    steps: int
    scale: float
    # of one image's prediction
    shape: tuple[int, ...]
    negative_prompt: str

    def check(self, here: Identity, owner: str) -> None:
        """Raise ``UnsupportedModel`` naming both identities where they differ."""
        pairs = [(f.name, getattr(self, f.name), getattr(here, f.name)) for f in fields(self)]
        differences = [
            f"{name}: fitted {fitted!r}, here {value!r}"
            for name, fitted, value in pairs
            if fitted != value
        ]
        if differences:
            raise UnsupportedModel(
                f"{owner} was fitted for another setting ({', '.join(differences)}). Fit one for "
                "this one: diffalign fit linear-ag."
            )


def check_plan(plan: Sequence[str], steps: int) -> None:
    """Raise ValueError unless ``plan`` has a mode per step, starts guided, estimates something, and
    ends with its conditional steps."""
    first = plan.index("conditional") if "conditional" in plan else len(plan)
    wrong = (
        len(plan) != steps
        or plan[0] != "guided"
        or not {"estimated"} <= set(plan) <= {"guided", "estimated", "conditional"}
    )
    if wrong or set(plan[first:]) - {"conditional"}:
        raise ValueError(
            f"plan needs {steps} modes (guided, estimated, conditional): guided first, one "
            "estimated at least, and only conditional ones "
            "after a conditional one, whose unconditional prediction is unknown; got "
            f"{', '.join(plan)}."
        )


def default_plan(steps: int) -> tuple[Mode, ...]:
    """The paper's: in the first half even steps guided and odd ones estimated, then conditional. 20
    steps cost 25 evaluations."""
    half = steps // 2
    return tuple(
        "conditional" if i >= half else "estimated" if i % 2 else "guided" for i in range(steps)
    )


@dataclass(frozen=True, slots=True)
class LinearPolicy:
    """Which steps estimate the unconditional noise prediction e_n, and from what."""

    identity: Identity
    # one mode per step
    plan: tuple[Mode, ...]
    # estimated step i -> weights of e_c(0..i), then of e_n(0..i-1)
    coefficients: dict[int, Tensor]
    # estimated step -> share of the variance of e_n that the estimate explains
    r2: dict[int, float]
    # estimated step -> share of |e_n - e_c|^2, what plain conditional sampling would miss
    gain: dict[int, float]
    # on how many it was fitted
    trajectories: int

    def facts(self) -> dict[str, object]:
        """Everything but the coefficients, as JSON data."""
        return {
            "identity": asdict(self.identity),
            "plan": self.plan,
            "r2": self.r2,
            "gain": self.gain,
            "trajectories": self.trajectories,
        }

    def save(self, path: str | Path) -> None:
        """``<path>.json`` and ``<path>.safetensors``, complete or not at all."""
        facts, weights = files_of(path)
        facts.parent.mkdir(parents=True, exist_ok=True)
        drafts = facts.with_name(facts.name + ".part"), weights.with_name(weights.name + ".part")
        try:
            drafts[0].write_text(json.dumps(self.facts(), indent=1) + "\n", encoding="utf-8")
            drafts[1].write_bytes(
                save(
                    {str(i): value.double().contiguous() for i, value in self.coefficients.items()}
                )
            )
            for draft, target in zip(drafts, (facts, weights)):
                draft.replace(target)
        finally:
            for draft in drafts:
                draft.unlink(missing_ok=True)
        policy_at.cache_clear()

    @classmethod
    def load(cls, path: str | Path) -> LinearPolicy:
        """Read what ``save`` wrote. Raises ValueError when either file is missing."""
        facts, weights = files_of(path)
        if not facts.is_file() or not weights.is_file():
            raise ValueError(
                f"LinearAG(policy=...) needs {facts.name} and {weights.name} in {facts.parent}; "
                "diffalign fit linear-ag writes them."
            )
        text = json.loads(facts.read_text(encoding="utf-8"))
        identity = Identity(**{**text["identity"], "shape": tuple(text["identity"]["shape"])})
        values = {int(i): value for i, value in load_file(weights).items()}
        r2, gain = ({int(i): float(v) for i, v in text[key].items()} for key in ("r2", "gain"))
        return cls(identity, tuple(text["plan"]), values, r2, gain, int(text["trajectories"]))


SHIPPED = Path(str(files(__package__).joinpath("policies")))


def shipped() -> dict[str, LinearPolicy]:
    """The policies that ship, by name."""
    return {path.stem: policy_at(path.stem) for path in sorted(SHIPPED.glob("*.json"))}


@cache
def policy_at(path: str) -> LinearPolicy:
    """A policy by path, or by the name of one that ships."""
    return LinearPolicy.load(SHIPPED / path if files_of(SHIPPED / path)[0].exists() else path)


def files_of(path: str | Path) -> tuple[Path, Path]:
    """The two files of a policy, whose ``path`` may be given with either suffix or without."""
    base = Path(path)
    if base.suffix in (".json", ".safetensors"):
        base = base.with_suffix("")
    return base.with_name(base.name + ".json"), base.with_name(base.name + ".safetensors")
