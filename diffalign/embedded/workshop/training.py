"""What the training scripts share: fp32 master weights over a model in ``precision()``, weight
averaging between processes, logs, resumable state.

Small networks on a CPU learn fastest by many small updates: each process owns one core and one
thread, takes its own steps, and every few steps the processes replace their weights by the mean
(local SGD: Stich, "Local SGD Converges Fast and Communicates Little", 2018, arXiv:1805.09767). All
random numbers of a step come from (seed, rank, step), so a resumed run repeats the bits of an
uninterrupted one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffalign.core.types import Json
from diffalign.embedded.workshop.precision import precision

State = dict[str, Any]
"""What ``torch.save`` keeps of a run: tensors, numbers, and such states of its parts."""


class FlatAdam:
    """AdamW over one flat fp32 vector; the modules' parameters become views of a flat working
    copy, in ``precision()`` unless ``dtype`` says another.

    ``channels_last`` stores 4-d weights in that memory format. ``groups`` is not needed: decay
    applies to all weights alike.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        *,
        betas: tuple[float, float] = (0.9, 0.98),
        decay: float = 0.01,
        channels_last: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        size = sum(p.numel() for p in self.parameters)
        self.master = nn.Parameter(torch.empty(size), requires_grad=True)
        dtype = precision() if dtype is None else dtype
        self.working = torch.empty(size, dtype=dtype)
        self.gradient = torch.zeros(size, dtype=dtype)
        self._channels_last = channels_last
        offset = 0
        with torch.no_grad():
            for p in self.parameters:
                section = slice(offset, offset + p.numel())
                self._view(self.master.data[section], p).copy_(p)
                view = self._view(self.working[section], p)
                p.data = view.copy_(p)
                p.grad = self._view(self.gradient[section], p)
                offset += p.numel()
        self.optimizer = torch.optim.AdamW(
            [self.master], lr=1e-3, betas=betas, weight_decay=decay, fused=True
        )

    def _view(self, flat: Tensor, like: Tensor) -> Tensor:
        if self._channels_last and like.ndim == 4:
            out, inner, height, width = like.shape
            return flat.view(out, height, width, inner).permute(0, 3, 1, 2)
        return flat.view(like.shape)

    def step(self, rate: float, clip: float = 1.0) -> float:
        """One update from the gradients of the working copy, clipped to norm ``clip``; returns the
        norm before clipping and zeroes them."""
        gradient = self.gradient.float()
        norm = float(gradient.norm())
        if not math.isfinite(norm):
            raise RuntimeError(
                f"The norm of the gradient must be finite; got {norm}. Lower the learning rate, "
                "or resume from the last state with another seed: one seed repeats its draws."
            )
        if norm > clip:
            gradient.mul_(clip / norm)
        self.master.grad = gradient
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.gradient.zero_()
        self.publish()
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the master weights into the working copy."""
        self.working.copy_(self.master)

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Put ``vector`` (flat fp32, for instance an average) into the parameters as fp32 tensors,
        for saving or sampling."""
        offset = 0
        for p in self.parameters:
            p.grad = None
            p.data = self._view(vector[offset : offset + p.numel()], p).clone(
                memory_format=torch.contiguous_format
            )
            offset += p.numel()

    def state(self) -> State:
        """Everything a resumed run needs."""
        return {"master": self.master.data, "optimizer": self.optimizer.state_dict()}

    def load(self, state: State) -> None:
        """Inverse of ``state``."""
        self.master.data.copy_(state["master"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.publish()


@dataclass(frozen=True)
class Team:
    """One of the processes of a run."""

    rank: int = 0
    # of them
    size: int = 1
    # fp32 [size, parameters] in shared memory; None for a team of one
    shared: Tensor | None = None
    barrier: Barrier | None = None

    @torch.no_grad()
    def average(self, weights: Tensor) -> None:
        """Replace ``weights`` (no longer than a row of ``shared``) by the mean over the
        processes, in place; waits at most 30 minutes."""
        if self.shared is None or self.barrier is None:
            return
        table = self.shared[:, : weights.numel()]
        table[self.rank].copy_(weights)
        self.barrier.wait(timeout=1800)
        torch.mean(table, dim=0, out=weights)
        self.barrier.wait(timeout=1800)


def _member(
    rank: int,
    work: Callable[..., None],
    size: int,
    shared: Tensor,
    barrier: Barrier,
    arguments: Sequence[object],
) -> None:
    work(Team(rank, size, shared, barrier), *arguments)


def launch(
    work: Callable[..., None], size: int, parameters: int, arguments: Sequence[object]
) -> None:
    """Run ``work(team, *arguments)`` in ``size`` processes (in this one if size is 1).

    ``parameters``: length of the averaged vector.
    """
    if size == 1:
        work(Team(), *arguments)
        return
    context = torch.multiprocessing.get_context("spawn")
    shared = torch.zeros(size, parameters).share_memory_()  # type: ignore[no-untyped-call]
    barrier = context.Barrier(size)
    start: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]
    start(_member, (work, size, shared, barrier, arguments), nprocs=size)


def step_seed(seed: int, rank: int, step: int) -> int:
    """A 48-bit seed for one step of one process; distinct streams for distinct arguments, never a
    held-out seed of the world."""
    digest = hashlib.blake2b(f"{seed}/{rank}/{step}".encode(), digest_size=6).digest()
    return int.from_bytes(digest) | 1 << 47


def step_generator(seed: int, rank: int, step: int) -> torch.Generator:
    """A CPU generator for the tensors of one step."""
    return torch.Generator().manual_seed(step_seed(seed, rank, step))


def cosine(
    step: int, total: int, peak: float, *, warm: int, hold: float = 0.0, floor: float = 0.02
) -> float:
    """Learning rate: linear warm-up, constant until ``hold`` of the run, then half a cosine down to
    ``floor`` times the peak."""
    if step < warm:
        return peak * (step + 1) / warm
    start = max(warm, int(hold * total))
    if step < start:
        return peak
    place = min(1.0, (step - start) / max(1, total - start))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * place)))


def code_hash() -> str:
    """SHA-256 (first 16 digits) over the Python files and data of the embedded world and its
    training, in path order."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.glob("world/data/*.png")]):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class Log:
    """A JSON-lines file: one header a start, one record a window of steps. ``seconds`` adds up over
    resumed runs."""

    def __init__(self, path: Path, header: Json, seconds: float = 0.0) -> None:
        self._path, self._start = path, time.monotonic() - seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write({"header": header | {"code": code_hash(), "torch": torch.__version__}})

    @property
    def seconds(self) -> float:
        """Training time so far, in seconds."""
        return time.monotonic() - self._start

    def write(self, record: Json) -> None:
        """Append one record with the time since the first start."""
        with self._path.open("a") as file:
            file.write(json.dumps(record | {"seconds": round(self.seconds, 1)}) + "\n")


def save_state(path: Path, state: State) -> None:
    """Write atomically, so that an interrupted save leaves the previous state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_state(path: Path) -> State | None:
    """The state at ``path``, or None where there is none."""
    return cast(State, torch.load(path, weights_only=True)) if path.exists() else None


def saved_state(path: Path) -> State:
    """The state at ``path``. Raises: ValueError where there is none."""
    state = load_state(path)
    if state is None:
        raise ValueError(f"state: expected a training state at {path}, found none; train first.")
    return state


STATE = "state.pt"
"""Where ``train`` keeps the state of a run, below its folder."""


class Trainer(Protocol):
    """A run of one process: ``done`` updates so far, one more update, and everything that a resumed
    run needs."""

    done: int

    def step(self) -> dict[str, float]: ...
    def state(self) -> State: ...
    def load(self, state: State) -> None: ...


class ModulesTrainer(ABC):
    """A run of modules under one optimiser: the loss is a sum of named parts."""

    # largest norm of the gradient
    clip: ClassVar[float] = 1.0
    # name of the modules in the state
    part: ClassVar[str] = "modules"
    # attention is computed in its plain form
    plain_attention: ClassVar[bool] = False

    def __init__(self, modules: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.modules, self.optimizer, self.done = modules, optimizer, 0

    @abstractmethod
    def losses(self) -> dict[str, Tensor]:
        """The weighted parts of the loss of the next step."""

    @abstractmethod
    def rate(self) -> float:
        """Learning rate of the next update."""

    def settle(self) -> None:  # noqa: B027
        """What follows an update; nothing by default."""

    def step(self) -> dict[str, float]:
        """One update; returns the loss and its parts."""
        with sdpa_kernel(SDPBackend.MATH) if self.plain_attention else nullcontext():
            parts = self.losses()
            total = torch.stack(list(parts.values())).sum()
            self.optimizer.zero_grad()
            total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.modules.parameters(), self.clip, error_if_nonfinite=True)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.step()
        self.settle()
        self.done += 1
        return {
            "loss": float(total.detach()),
            **{name: float(value.detach()) for name, value in parts.items()},
        }

    def state(self) -> State:
        """Everything a resumed run needs."""
        return {
            self.part: self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
        }

    def load(self, state: State) -> None:
        """Inverse of ``state``."""
        self.modules.load_state_dict(state[self.part])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = int(state["done"])


@dataclass(frozen=True, slots=True)
class Course:
    """How long a training runs, and what it leaves in its folder."""

    # updates at its end
    end: int
    # pictures an update, of all processes
    samples: int
    # updates from state to state
    save: int
    # updates that a log record averages; each of the first ``early`` has a record of its own
    window: int = 50
    early: int = 20
    # names of the files, with ``{rank}`` where each process has its own
    state: str = STATE
    log: str = "log.jsonl"


def latest(folder: Path, name: str, rank: int) -> State | None:
    """The saved state of a process, or None.

    A process that is new, or was stopped between two saves, starts from the first one's state.
    """
    first = load_state(folder / name.format(rank=0))
    mine = load_state(folder / name.format(rank=rank)) if rank else first
    if mine is None or first is None or mine["trainer"]["done"] != first["trainer"]["done"]:
        return first
    return mine


def train(
    trainer: Trainer,
    options: argparse.Namespace,
    header: Json,
    course: Course,
    rank: int = 0,
    facts: Callable[[], dict[str, float]] = dict,
) -> float:
    """Train to the end of ``course``; returns the seconds that it took, over all runs.

    ``header``: what the log says of the run; ``facts``: what each record says beside the losses.
    With ``options.resume`` the state in ``options.out`` is taken up.
    """
    seconds = 0.0
    if options.resume and (state := latest(options.out, course.state, rank)) is not None:
        trainer.load(state["trainer"])
        seconds = state["seconds"]
    path = options.out / course.log.format(rank=rank)
    log = Log(path, header | {"start": trainer.done}, seconds)
    window: list[dict[str, float]] = []
    while trainer.done < course.end:
        window.append(trainer.step())
        if trainer.done <= course.early or trainer.done % course.window == 0:
            values = {key: [entry[key] for entry in window if key in entry] for key in window[-1]}
            means = {key: round(sum(column) / len(column), 5) for key, column in values.items()}
            record = {"updates": trainer.done, "samples": trainer.done * course.samples}
            log.write(record | facts() | means)
            window = []
        if trainer.done % course.save == 0 or trainer.done == course.end:
            save_state(
                options.out / course.state.format(rank=rank),
                {"trainer": trainer.state(), "seconds": log.seconds},
            )
    return log.seconds


def parser(description: str | None, seed: int, save: int) -> argparse.ArgumentParser:
    """The options that every training shares: out, seed, save, resume, export."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--out", type=Path, required=True, help="folder of state and log")
    result.add_argument("--seed", type=int, default=seed)
    result.add_argument("--save", type=int, default=save, help="updates between states")
    result.add_argument("--resume", action="store_true")
    result.add_argument("--export", type=Path, help="write the saved state to this folder and stop")
    return result
