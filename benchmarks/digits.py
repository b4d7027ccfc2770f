"""Sampling one digit, or even or odd ones, from a model that knows no classes: the law that a
classifier asks for, by seven methods at equal NFE.

    python benchmarks/digits.py [--nfe 10000] [--seeds 5] [--quick] [--work runs/digits]

Data: scikit-learn's 8 x 8 digits, two thirds for training, one third held out. A small UNet of
diffusers is trained without classes (v-prediction, DDIM with eta 1, 20 steps), and a classifier
whose log probability of the class, or of the set of classes, is the reward. With tilt 1 the tilted
law is the class-conditional one, so real held-out digits say how close a method comes: Fréchet
distance in the classifier's features, of all images with their weights. Finished runs are kept in
``--work`` and not repeated.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image
from results import Row, command_line, save
from rich.progress import Progress
from torch import Tensor, nn

from diffalign.core import Budget, Meter
from diffalign.drawing.sheet import contact_sheet
from diffalign.search import DTS, SMC
from diffalign.testing.mixtures import Chain
from diffalign.testing.search import PointProblem, solve, toy

STEPS, SIDE = 20, 8
TARGETS: dict[str, tuple[int, ...]] = {str(digit): (digit,) for digit in range(10)} | {
    "even": (0, 2, 4, 6, 8),
    "odd": (1, 3, 5, 7, 9),
}
# images of a group of which best-of-N keeps one
GROUP = 10
COLUMNS = {
    "NFE": "denoiser rows of one run; a gradient needs two for each step",
    "distance": "Fréchet distance to held-out digits of the class, mean over classes and seeds",
    "distance error": "standard error over seeds",
    "reward": "mean log probability of the class",
    "effective": "number of equal weights that the weighted images are worth",
    "entropy": "entropy of the classes among even or odd digits; log 5 = 1.609 is all of them",
    "seconds": "processor seconds of a run, median",
}


@dataclass(frozen=True, slots=True)
class Data:
    """Digits in [-1, 1], [N, 64], float32, and their classes."""

    train: Tensor
    train_classes: Tensor
    held_out: Tensor
    held_out_classes: Tensor


def digits() -> Data:
    """Every third digit is held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.data).float() / 8 - 1
    classes = torch.from_numpy(bunch.target).long()
    held = torch.arange(len(images)) % 3 == 2
    return Data(images[~held], classes[~held], images[held], classes[held])


class Classifier(nn.Module):
    """64 pixels -> 16 features -> 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 48), nn.SiLU(), nn.Linear(48, 16)
        )
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(16, 10))

    def features(self, x: Tensor) -> Tensor:
        """[N, 16]"""
        features: Tensor = self.body(x.float())
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Log probabilities [N, 10]."""
        return self.head(self.features(x)).log_softmax(-1)


class Model:
    """The trained UNet as a denoiser of points [B, 64]."""

    size = SIDE * SIDE

    def __init__(self, net: UNet2DModel, bars: Tensor) -> None:
        self.net, self.bars = net, bars

    def clean(self, x: Tensor, alpha: float, s: float) -> Tensor:
        """x0 = alpha x - s v, in double precision outside the net."""
        time = int((self.bars - alpha * alpha).abs().argmin())
        v = self.net(x.float().view(-1, 1, SIDE, SIDE), time).sample.flatten(1).double()
        return alpha * x - s * v


def scheduler() -> DDIMScheduler:
    """Cosine noise levels, of which 20 are used, from pure noise on."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def chain() -> Chain:
    """The chain that DDIM with eta 1 runs."""
    levels = scheduler()
    levels.set_timesteps(STEPS)
    return Chain.vp([float(levels.alphas_cumprod[int(t)]) for t in levels.timesteps])


def trained(data: Data, work: Path, steps: int) -> tuple[Model, Classifier, dict[str, float]]:
    """Model, classifier and facts of their training; read from ``work`` when they are there."""
    levels, file = scheduler(), work / f"models-{steps}.pt"
    net = UNet2DModel(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 48),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
    )
    classifier = Classifier()
    if not file.exists():
        began, threads = time.process_time(), torch.get_num_threads()
        # 143 seconds on two cores, 210 on one
        torch.set_num_threads(os.cpu_count() or 1)
        train_classifier(classifier, data)
        train_net(net, data, levels.alphas_cumprod, steps)
        torch.set_num_threads(threads)
        facts = {"training seconds": time.process_time() - began}
        work.mkdir(parents=True, exist_ok=True)
        torch.save({"net": net.state_dict(), "c": classifier.state_dict(), "facts": facts}, file)
    saved = torch.load(file, weights_only=True)
    net.load_state_dict(saved["net"])
    classifier.load_state_dict(saved["c"])
    for module in (net, classifier):
        module.eval().requires_grad_(False)
    guess = classifier(data.held_out).argmax(1)
    accuracy = float((guess == data.held_out_classes).float().mean())
    return Model(net, levels.alphas_cumprod), classifier, saved["facts"] | {"accuracy": accuracy}


def train_classifier(classifier: Classifier, data: Data, epochs: int = 60) -> None:
    """On clean and slightly noisy digits, so that its log probability is smooth."""
    rng = torch.Generator().manual_seed(1)
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for part in torch.randperm(len(data.train), generator=rng).split(128):
            x = data.train[part]
            noise = torch.randn(x.shape, generator=rng) * 0.4 * torch.rand(len(x), 1, generator=rng)
            loss = nn.functional.nll_loss(classifier(x + noise), data.train_classes[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


def train_net(net: UNet2DModel, data: Data, bars: Tensor, steps: int) -> None:
    """v-prediction with a falling rate; the weights are those of a running mean."""
    rng = torch.Generator().manual_seed(2)
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    mean = {name: value.clone() for name, value in net.state_dict().items()}
    for step in range(steps):
        part = torch.randint(len(data.train), (128,), generator=rng)
        t = torch.randint(1000, (128,), generator=rng)
        x0, noise = data.train[part], torch.randn(128, SIDE * SIDE, generator=rng)
        alpha, s = bars[t].sqrt()[:, None], (1 - bars[t]).sqrt()[:, None]
        x, v = alpha * x0 + s * noise, alpha * noise - s * x0
        out = net(x.view(-1, 1, SIDE, SIDE), t).sample.flatten(1)
        loss = (out - v).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        keep = min(0.995, step / (step + 10))
        for name, value in net.state_dict().items():
            mean[name].lerp_(value, 1 - keep)
    net.load_state_dict(mean)


# -- methods --------------------------------------------------------------------------------------

# images [N, 64] and their weights [N], which sum to 1
Weighed = tuple[Tensor, Tensor]


def plain(problem: PointProblem, nfe: int) -> Tensor:
    """As many samples of the model as the budget holds."""
    return problem.run(problem.start(problem.seeds(nfe // STEPS))).latents


def importance(problem: PointProblem, nfe: int) -> Weighed:
    """Plain samples weighted by exp(reward)."""
    x = plain(problem, nfe)
    return x, problem.reward(problem.decode(ended(problem, x)), []).softmax(0)


def ended(problem: PointProblem, x: Tensor) -> Any:
    """Points as finished states."""
    state = problem.start([0] * len(x), x)
    return type(state)(x, problem.sampler.count, problem.sampler.count, state.rng)


def best_of_ten(problem: PointProblem, nfe: int) -> Weighed:
    """The best of each ten samples, with equal weights."""
    x = plain(problem, nfe)
    scores = problem.reward(problem.decode(ended(problem, x)), []).view(-1, GROUP)
    best = x.view(-1, GROUP, x.shape[1])[torch.arange(len(scores)), scores.argmax(1)]
    return best, torch.full((len(best),), 1 / len(best), dtype=torch.float64)


def unweighted(problem: PointProblem, nfe: int) -> Weighed:
    """The model as it is, without a reward."""
    x = plain(problem, nfe)
    return x, torch.full((len(x),), 1 / len(x), dtype=torch.float64)


def particles(**options: Any) -> Callable[[PointProblem, int], Weighed]:
    """One population as large as the budget allows."""

    def run(problem: PointProblem, nfe: int) -> Weighed:
        method = SMC(particles=10**6, **options)
        state, _ = solve(problem, method, rounds=STEPS + 1)
        return torch.cat([end.latents for end in state.endings]), method.weighted(state).shares

    return run


def tree(preset: str) -> Callable[[PointProblem, int], Weighed]:
    """Tree sampling, 25 rollouts a round."""

    def run(problem: PointProblem, nfe: int) -> Weighed:
        method = DTS(preset=preset, batch=25)
        state, _ = solve(problem, method)
        ends = torch.cat([state.state(leaf).latents for leaf in state.leaves])
        return ends, method.weighted(state).shares

    return run


METHODS: dict[str, Callable[[PointProblem, int], Weighed]] = {
    "no reward": unweighted,
    f"best of {GROUP}": best_of_ten,
    "importance sampling": importance,
    "FK-SMC": particles(),
    "TDS": particles(preset="tds"),
    "DAS": particles(preset="das"),
    "DTS (2, 0.8), published": tree("paper"),
    "DTS (2, 0.3), 20% uniform": tree("spread"),
}


# -- measures -------------------------------------------------------------------------------------


def moments(features: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean [16] and covariance [16, 16]."""
    f, w = features.double(), shares.double()[:, None]
    mean = (w * f).sum(0)
    centred = f - mean
    return mean, (w * centred).T @ centred


def root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric matrix whose eigenvalues are not negative."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


def frechet(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)``."""
    (mean_1, cov_1), (mean_2, cov_2) = one, other
    half = root(cov_1)
    cross = root(half @ cov_2 @ half)
    return float((mean_1 - mean_2).square().sum() + (cov_1 + cov_2 - 2 * cross).trace())


def reference(classifier: Classifier, data: Data, target: str, train: bool = False) -> Any:
    """Moments of the real digits of a target."""
    images, classes = (
        (data.train, data.train_classes) if train else (data.held_out, data.held_out_classes)
    )
    chosen = images[torch.isin(classes, torch.tensor(TARGETS[target]))]
    share = torch.full((len(chosen),), 1 / len(chosen), dtype=torch.float64)
    return moments(classifier.features(chosen), share)


def reward_of(classifier: Classifier, target: str) -> Callable[[Tensor], Tensor]:
    """Log probability of the class, or of the set of classes."""
    classes = list(TARGETS[target])
    return lambda x: torch.logsumexp(classifier(x)[:, classes], -1).double()


@dataclass(frozen=True, slots=True)
class Lab:
    """What every run needs."""

    model: Model
    classifier: Classifier
    data: Data
    options: Namespace

    def run(self, target: str, method: str, nfe: int, seed: int) -> dict[str, Any]:
        """The measures of one run, read from ``--work`` when it is there."""
        name = "".join(c for c in method if c.isalnum())
        file = Path(self.options.work) / str(nfe) / f"{target}-{name}-{seed}.json"
        if file.exists():
            measures: dict[str, Any] = json.loads(file.read_text())
            return measures
        reward = reward_of(self.classifier, target)
        meter = Meter(Budget(nfe=nfe))
        problem = toy(self.model, reward, chain=chain(), budget=meter, seed=seed)
        began = time.process_time()
        x, shares = METHODS[method](problem, nfe)
        seconds = time.process_time() - began
        mix = (self.classifier(x).double().exp() * shares[:, None]).sum(0)[list(TARGETS[target])]
        mix = mix / mix.sum()
        picks = torch.multinomial(shares, 12, True, generator=problem.rng)
        measures = {
            "distance": frechet(
                moments(self.classifier.features(x), shares),
                reference(self.classifier, self.data, target),
            ),
            "reward": float((shares * reward(x)).sum()),
            "effective": float(1 / shares.square().sum()),
            "entropy": float(-(mix * mix.clamp(min=1e-12).log()).sum()),
            "NFE": meter.rows,
            "seconds": seconds,
            "images": [[round(v, 3) for v in row] for row in x[picks].tolist()],
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(measures))
        part.replace(file)
        return measures


def row_of(lab: Lab, method: str, group: str, nfe: int) -> Row:
    """Means over the targets of a group; the error is that of the seeds' means."""
    targets = [t for t in lab.options.targets if (t in ("even", "odd")) == (group == "even, odd")]
    seeds = [
        [lab.run(target, method, nfe, seed) for target in targets]
        for seed in range(lab.options.seeds)
    ]
    runs = [run for seed in seeds for run in seed]
    means = [statistics.fmean(run["distance"] for run in seed) for seed in seeds]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    several = group == "even, odd"
    return {
        "method": method,
        "targets": group,
        "NFE": round(statistics.fmean(run["NFE"] for run in runs)),
        "budget": nfe,
        "distance": statistics.fmean(means),
        "distance error": error,
        "reward": statistics.fmean(run["reward"] for run in runs),
        "effective": statistics.fmean(run["effective"] for run in runs),
        "entropy": statistics.fmean(run["entropy"] for run in runs) if several else None,
        "seconds": statistics.median(run["seconds"] for run in runs),
    }


def picture(pixels: list[float]) -> Image.Image:
    """64 numbers in [-1, 1] as dark ink on white."""
    values = (torch.tensor(pixels).view(SIDE, SIDE).clamp(-1, 1) - 1) * -127.5
    return Image.fromarray(values.round().byte().numpy()).resize((128, 128), Image.NEAREST)


def sheet(lab: Lab, nfe: int) -> Image.Image:
    """Draws of every method for one digit and for a set."""
    usual = [target for target in ("7", "even") if target in lab.options.targets]
    targets = usual or lab.options.targets[:1]
    rows, labels = [], []
    for target in targets:
        for method in METHODS:
            rows.append([picture(p) for p in lab.run(target, method, nfe, 0)["images"]])
            labels.append(f"{target}: {method}")
    return contact_sheet(rows, labels, size=128, title=f"Draws by weight, {nfe} NFE")


def main() -> None:
    parser = command_line(__doc__ or "", nfe=10000, seeds=5, training=1500, work="runs/digits")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument(
        "--quick", action="store_true", help="two targets, one seed, 600 NFE, little training"
    )
    options = parser.parse_args()
    if options.quick:
        options.targets, options.seeds, options.nfe = ["7", "even"], 1, 600
        options.training = min(options.training, 60)
    torch.set_num_threads(1)
    data = digits()
    model, classifier, facts = trained(data, Path(options.work), options.training)
    lab = Lab(model, classifier, data, options)
    budgets = [options.nfe] if options.quick else [options.nfe // 10, options.nfe]
    jobs = [
        (target, method, nfe, seed)
        for seed in range(options.seeds)
        for nfe in reversed(budgets)
        for target in options.targets
        for method in METHODS
    ]
    with Progress() as bar:
        for job in bar.track(jobs, description="runs"):
            lab.run(*job)
    groups = ["one digit"] if set(options.targets) - {"even", "odd"} else []
    groups += ["even, odd"] if {"even", "odd"} & set(options.targets) else []
    rows = [row_of(lab, m, g, nfe) for g in groups for nfe in budgets for m in METHODS]
    facts["distance of training digits"] = statistics.fmean(
        frechet(reference(classifier, data, t, train=True), reference(classifier, data, t))
        for t in options.targets
    )
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    sheet(lab, options.nfe).save(folder / "digits-images.png", optimize=True)
    save("digits", rows, options, COLUMNS, facts)


if __name__ == "__main__":
    main()
