"""PEZ on the random text encoder of a tiny pipeline: projection, gradient, planted prompts."""

import pytest
import torch
from torch.nn import functional as F

from diffalign.core import Meter
from diffalign.noise_opt import PEZ
from diffalign.noise_opt.pez import Prompt, Search, alone, pixels
from diffalign.seams.words import tower_of
from diffalign.testing import tiny_pipeline
from diffalign.testing.mixtures import Chain, Mixture
from diffalign.testing.search import PointProblem, solve

PLANTED = "q 7 x z"


@pytest.fixture(scope="module")
def words():
    return tower_of(tiny_pipeline("StableDiffusionPipeline", text=True))


class TwoTowers:
    """An image-text reward whose images all say the same."""

    differentiable, name = True, "two-towers"

    def __init__(self, words, says=PLANTED):
        self.words, self.says = words, says

    def image_features(self, images):
        return self.words.features(torch.tensor([self.words.tokens(self.says)])).expand(
            len(images), -1
        )

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


def problem_of(words, prompt=PLANTED, seed=0):
    model = Mixture.of([[0.0]], 1.0)
    chain = Chain.of_steps(2, 0.0)
    return PointProblem(lambda text: model, chain, TwoTowers(words), prompt, seed, Meter())


def cosine(words, tokens, other):
    rows = [words.features(torch.tensor([row])) for row in (tokens, words.tokens(other))]
    return float(F.cosine_similarity(*rows))


def test_projection_is_the_nearest_token_by_cosine(words):
    allowed = alone(words)
    soft = torch.randn(2, 3, words.table.shape[1], generator=torch.Generator().manual_seed(0))
    ours = Search(words, allowed).nearest(soft)
    for row in range(2):
        for place in range(3):
            cosines = F.cosine_similarity(words.table, soft[row, place][None])
            best = max((i for i in range(len(cosines)) if allowed[i]), key=lambda i: cosines[i])
            assert int(ours[row, place]) == best


def test_the_gradient_is_taken_at_the_projected_prompt():
    """Against central differences in float64."""
    pipe = tiny_pipeline("StableDiffusionPipeline", text=True)
    pipe.text_encoder.double()
    words = tower_of(pipe)
    tokens = torch.tensor([words.tokens("a b c")])
    target = F.normalize(words.features(torch.tensor([words.tokens(PLANTED)])), dim=-1)

    def value(embeddings):
        return (F.normalize(words.features(tokens, embeddings), dim=-1) @ target.T).sum()

    hard = words.table[tokens].requires_grad_()
    (gradient,) = torch.autograd.grad(value(hard), hard)
    for seed in range(8):
        rng = torch.Generator().manual_seed(seed)
        step = 1e-5 * torch.randn(hard.shape, generator=rng, dtype=torch.float64)
        slope = (value(hard.detach() + step) - value(hard.detach() - step)) / 2
        assert float((gradient * step).sum()) == pytest.approx(float(slope.detach()), rel=1e-4)


@pytest.mark.slow
def test_planted_prompts_are_found(words):
    """Cosine of at least .95 in most of 10 seeds, above the best of as many random prompts."""
    found, chance = [], []
    method = PEZ(tokens=4, iterations=300, restarts=4)
    for seed in range(10):
        state, _ = solve(problem_of(words, seed=seed), method)
        found.append(state.cosine)
        choices = method.allowed(words).nonzero()[:, 0]
        rng = torch.Generator().manual_seed(seed)
        picks = choices[torch.randint(len(choices), (1200, 4), generator=rng)]
        with torch.no_grad():
            rows = F.normalize(words.features(picks), dim=-1)
            target = F.normalize(words.features(torch.tensor([words.tokens(PLANTED)])), dim=-1)
        chance.append(float((rows @ target.T).max()))
    assert sum(value >= 0.95 for value in found) >= 6, found
    assert sum(found) > sum(chance)


def test_the_best_prompt_is_kept_and_is_what_its_text_says(words):
    problem = problem_of(words)
    method = PEZ(tokens=3, iterations=60, restarts=2, draws=2)
    state, infos = solve(problem, method)
    assert words.tokens(state.text) == list(state.tokens)
    assert state.cosine == pytest.approx(cosine(words, list(state.tokens), PLANTED), abs=1e-5)
    assert 0.0 <= infos[-1].values["altered"] <= 1.0
    best = method.best(problem, state)
    assert best is state.choice
    # two images of the found prompt and of the run's own
    assert problem.meter.rows == 2 * 2 * 2


def test_it_never_gets_worse(words):
    problem, method = problem_of(words), PEZ(tokens=3, iterations=40, restarts=1)
    search = Search(words, method.allowed(words))
    state = method._start(problem, Prompt(), words)
    seen = []
    for _ in range(40):
        state = search.update(state, state.targets, 0.1, 0.1)
        seen.append(state.cosine)
    assert seen == sorted(seen)
    assert seen[-1] > seen[0]


def test_banned_texts_never_appear(words):
    method = PEZ(tokens=6, iterations=40, restarts=2, banned=("q", "z"))
    state, _ = solve(problem_of(words), method)
    assert not {"q", "z"} & set(state.text)
    assert not method.allowed(words)[words.tokens("q")].any()
    assert not method.allowed(words)[list(words.marks)].any()


def test_the_same_seed_finds_the_same_prompt(words):
    method = PEZ(tokens=3, iterations=20)
    texts = [solve(problem_of(words, seed=seed), method)[0].text for seed in (1, 1)]
    assert texts[0] == texts[1]


def test_images_are_described(words):
    images = (torch.rand(3, 8, 8), torch.rand(3, 8, 8))
    method = PEZ(tokens=4, iterations=40, images=images, draws=1)
    state, _ = solve(problem_of(words, prompt="something else"), method)
    assert state.targets.shape[0] == 2
    assert state.cosine == pytest.approx(cosine(words, list(state.tokens), PLANTED), abs=1e-5)


def test_files_and_what_is_none(tmp_path):
    from PIL import Image

    picture = Image.new("RGB", (5, 4), (255, 0, 51))
    picture.save(tmp_path / "a.png")
    read = pixels(str(tmp_path / "a.png"))
    assert read.shape == (1, 3, 4, 5)
    assert read[0, :, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])
    with pytest.raises(ValueError, match="cannot be read as an image"):
        pixels(str(tmp_path / "none.png"))
    with pytest.raises(ValueError, match=r"must be \[3, H, W\]"):
        pixels(torch.zeros(4, 4))


def test_what_is_refused(words):
    problem = problem_of(words)
    assert "room for 75 tokens" in PEZ(tokens=76).refuses(problem)
    assert PEZ(tokens=75).refuses(problem) is None
    problem.reward = lambda images, prompts: images.mean((1, 2, 3))
    assert "no text encoder of its own" in PEZ().refuses(problem)
    with pytest.raises(ValueError, match="knows no images"):
        PEZ(images=("a.png",), tower="pipeline")
