"""Tree-of-Frames and linear search on an autoregressive Gaussian, whose frames are numbers."""

import signal
import subprocess
import sys

import pytest
import torch

import diffalign as da
from diffalign.core import BudgetExceeded
from diffalign.core.seeds import seed_of
from diffalign.rewards import Weighted
from diffalign.testing.chain_videos import Law, numbers_of, search_chain

GOAL = 3.0


def near(videos, prompts):
    """Minus the squared distance of the sum of all numbers to a goal."""
    return -((numbers_of(videos).sum(1) - GOAL) ** 2)


near.differentiable = False


def run(method, reward=near, law=None, **options):
    law = law or Law()
    return search_chain(method, reward, law, **options), law


def chunks(law):
    """How many frames were made of each chunk, the final call among them."""
    return [law.made.count(chunk) for chunk in range(law.chunks)]


def sums(result):
    return sorted(float(numbers_of(c.image[None]).sum()) for c in result.top)


def test_linear_search_makes_every_frame_of_every_video():
    result, law = run(da.LinearSearch(5))
    assert chunks(law) == [6, 6, 6, 6]
    assert result.scored == 5
    assert result.ledger.nfe == 6 * 4 * law.evaluations
    assert result.score == pytest.approx(max(c.score for c in result.top))


@pytest.mark.parametrize(
    ("branch", "keep", "made"),
    [
        ((6, 2, 1), (2,), [6, 4, 2, 2]),
        ((3,), (1,), [3, 3, 3, 3]),
        ((5, 1), (0,), [5, 5, 5, 5]),
        ((4, 3, 2, 1), (2, 3, 1), [4, 6, 6, 1]),
        ((12, 2), (3, 2), [12, 6, 4, 4]),
    ],
)
def test_frames_are_those_of_the_formula(branch, keep, made):
    """By hand: b_0 first chunks, then b_k for each of the keep_(k-1) that stayed; one more of each
    for the final call."""
    result, law = run(da.TreeOfFrames(branch=branch, keep=keep))
    assert chunks(law) == [count + 1 for count in made]
    assert result.ledger.nfe == (sum(made) + 4) * law.evaluations


def test_a_tree_without_choices_is_linear_search():
    linear, first = run(da.LinearSearch(7))
    tree, second = run(da.TreeOfFrames(branch=(7, 1), keep=(0,)))
    assert first.made.count(0) == second.made.count(0) == 8
    assert tree.lineage == linear.lineage
    assert torch.equal(tree.tensor, linear.tensor)
    assert tree.score == linear.score
    assert sums(tree) == sums(linear)


def test_a_tree_keeps_what_a_slow_search_by_hand_keeps():
    """Every frame again by the law: the seed of a chunk is the next number of its video's
    generator, a further child has a generator of its own, the best two stay at each level."""
    law = Law()
    result, _ = run(da.TreeOfFrames(branch=(4, 2), keep=(2,)), law=law)
    drawn, values = iter(range(100)), {}

    def fresh():
        return torch.Generator().manual_seed(seed_of("a chain", next(drawn)))

    def grown(name, numbers, rng):
        seed = int(torch.randint(2**62, (), generator=rng))
        noise = torch.Generator().manual_seed(seed)
        z = float(torch.randn((), generator=noise, dtype=torch.float64))
        numbers = [*numbers, law.carry * (numbers[-1] if numbers else 0.0) + law.spread * z]
        values[name] = -((sum(numbers) - GOAL) ** 2)
        return name, numbers, rng

    front = [grown(str(i), [], fresh()) for i in range(4)]
    for _ in range(3):
        front = sorted(front, key=lambda video: -values[video[0]])[:2]
        others = [(f"{name}.1", numbers, fresh()) for name, numbers, _ in front]
        heads = [(f"{name}.0", numbers, rng) for name, numbers, rng in front]
        front = [grown(*video) for video in (*heads, *others)]
    made = {node.name: node.value for node in result.tree.nodes[1:]}
    assert made == pytest.approx(values, abs=1e-4)
    assert result.score == pytest.approx(max(values[name] for name, *_ in front), abs=1e-4)


def test_names_are_unique_beyond_ten_branches():
    result, _ = run(da.TreeOfFrames(branch=(12, 12, 2), keep=(12,)))
    names = [node.name for node in result.tree.nodes[1:]]
    assert len(names) == len(set(names)) == 12 + 144 + 24 + 24
    assert {"1.11", "11.1", "11.11"} <= set(names)


def test_two_trees_have_roots_of_their_own():
    result, law = run(da.TreeOfFrames(branch=(3, 1), keep=(1,), trees=2))
    assert chunks(law) == [7, 3, 3, 3]
    roots = [node.name for node in result.tree.nodes[1:] if "." not in node.name]
    assert roots == ["0", "1", "2", "3", "4", "5"]


def test_the_picture_leads_to_the_result():
    result, _ = run(da.TreeOfFrames(branch=(3, 2), keep=(2,)))
    tree = result.tree
    assert tree.unit == "chunks"
    leaf = tree.nodes[tree.best[-1]]
    assert (leaf.step, leaf.value) == (4, pytest.approx(result.score, abs=1e-4))
    assert [tree.nodes[i].step for i in tree.best] == [0, 1, 2, 3, 4]
    assert all(tree.nodes[b].parent == a for a, b in zip(tree.best, tree.best[1:]))


def test_every_stage_is_scored_against_its_own_text():
    seen = []

    def spy(videos, prompts):
        seen.append((videos.shape[1], prompts[0]))
        return near(videos, prompts)

    method = da.TreeOfFrames(
        branch=(3, 2), keep=(2,), splitter=lambda prompt: ("one", "two", "three")
    )
    run(method, spy, batch=16)
    # grey videos before anything runs, each level, whole videos, the final call
    assert seen == [
        (1, "one"),
        (2, "two"),
        (3, "two"),
        (4, "three"),
        (4, "a chain"),
        (1, "one"),
        (2, "two"),
        (3, "two"),
        (4, "three"),
        (4, "a chain"),
        (4, "a chain"),
    ]


def test_a_splitter_is_asked_before_the_run_and_once_in_it(tmp_path):
    asked = []

    def split(prompt):
        asked.append(prompt)
        return (f"{len(asked)} a", f"{len(asked)} b", f"{len(asked)} c")

    run(da.TreeOfFrames(branch=(3, 2), keep=(2,), splitter=split), folder=tmp_path)
    assert asked == ["a chain"] * 2


def test_mixed_rewards_choose_by_rank_and_no_scale_counts():
    def first(videos, prompts):
        return numbers_of(videos)[:, 0]

    def tame(videos, prompts):
        return -(numbers_of(videos).mean(1) - 1.0).abs()

    def wild(videos, prompts):
        return (8 * tame(videos, prompts)).exp() * 1e6

    for reward in (first, tame, wild):
        reward.differentiable = False
    method = da.TreeOfFrames(branch=(6, 3), keep=(3,))
    for trees, seed in ((1, 0), (2, 0), (3, 0), (3, 1), (3, 2), (3, 3)):
        method = da.TreeOfFrames(branch=(6, 3), keep=(3,), trees=trees)
        outcomes = [
            run(method, Weighted([(first, 1.0), (part, 2.0)]), seed=seed)[0].lineage
            for part in (tame, wild)
        ]
        assert outcomes[0] == outcomes[1]
    method = da.TreeOfFrames(branch=(6, 3), keep=(3,), mix="scores")
    outcomes = [
        run(method, Weighted([(first, 1.0), (part, 2.0)]))[0].lineage for part in (tame, wild)
    ]
    assert outcomes[0] != outcomes[1]


def test_early_choices_drop_the_worse_half_of_first_chunks():
    law = Law(evaluations=4)
    result, _ = run(da.TreeOfFrames(branch=(8, 1), keep=(1,), early=(1, 2)), law=law)
    # 8 first chunks run to evaluation 1, 4 of them to 2, and 2 to the end
    assert result.ledger.nfe == 8 * 1 + 4 * 1 + 2 * 2 + 3 * 4 + 4 * 4
    assert chunks(law) == [3, 2, 2, 2]
    roots = [node for node in result.tree.nodes[1:] if node.step == 1]
    assert sorted(node.name for node in roots) == [str(i) for i in range(8)]


def test_what_was_dropped_early_was_worse():
    result, _ = run(da.TreeOfFrames(branch=(8, 1), keep=(1,), early=(3,)))
    roots = {node.name: node for node in result.tree.nodes[1:] if node.step == 1}
    leaves = {name: node.value for name, node in roots.items() if node.image is not None}
    assert len(leaves) == 7  # four dropped early, three after the chunk


@pytest.mark.parametrize("nfe", [32, 48, 100, 150])
def test_a_budget_is_kept_and_gives_a_whole_video(nfe):
    result, law = run(da.TreeOfFrames(), budget=da.Budget(nfe=nfe))
    assert result.ledger.nfe <= nfe
    assert result.scored >= 1
    assert result.tensor.shape[0] == law.chunks


def test_a_budget_of_scores_is_kept():
    result, _ = run(da.TreeOfFrames(trees=None), budget=da.Budget(rewards=30))
    assert result.ledger.rewards <= 30
    with pytest.raises(ValueError, match="The budget is too small"):
        run(da.TreeOfFrames(), budget=da.Budget(nfe=31))


@pytest.mark.parametrize("limit", ["rewards", "decodes"])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("method", ["(6,2,1),keep=(2)", "(4,1),keep=(1),early=(1,2)"])
def test_every_limit_of_scores_and_decodes_gives_a_video(method, several, limit):
    """From the least on; each video and each look counts once, also where several rewards look."""

    def first(videos, prompts):
        return numbers_of(videos)[:, 0]

    first.differentiable = False
    reward = Weighted([(near, 1.0), (first, 0.5)]) if several else near
    for trees in ("1", "none"):
        for number in range(2, 24):
            text = f"tree-of-frames:branch={method},trees={trees}"
            result, _ = run(text, reward, budget=da.Budget(**{limit: number}))
            assert getattr(result.ledger, limit) <= number
            assert result.scored >= 1
    with pytest.raises(ValueError, match="The budget is too small"):
        run(text, reward, budget=da.Budget(**{limit: 1}))


def test_trees_go_on_until_the_budget_ends():
    result, _ = run(da.TreeOfFrames(trees=None), budget=da.Budget(nfe=400))
    assert 300 < result.ledger.nfe <= 400
    assert result.end.startswith("budget")


class Cut(RuntimeError):
    pass


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("method", ["tree-of-frames", "tree-of-frames:early=(1),trees=2"])
def test_a_run_that_was_cut_goes_on_to_the_same_end(method, steps, tmp_path):
    def stop(status):
        if status.step == steps:
            raise Cut

    whole, first = run(method)
    law = Law()
    with pytest.raises(Cut):
        run(method, law=law, folder=tmp_path, show=stop)
    rest, _ = run(method, law=law, folder=tmp_path)
    assert rest.lineage == whole.lineage
    assert torch.equal(rest.tensor, whole.tensor)
    assert rest.ledger.nfe == whole.ledger.nfe
    assert law.made == first.made
    assert [node.name for node in rest.tree.nodes] == [node.name for node in whole.tree.nodes]


SCRIPT = """
import os, signal, sys
from pathlib import Path
from diffalign.core import Reward
from diffalign.testing.chain_videos import Law, numbers_of, search_chain

class Made(list):
    def extend(self, chunks):
        for chunk in chunks:
            self.append(chunk)
            if len(self) == 9:  # between two batches of the second level
                os.kill(os.getpid(), signal.SIGKILL)

GOAL = 3.0

def near(videos, prompts):
    return -((numbers_of(videos).sum(1) - GOAL) ** 2)

search_chain("tree-of-frames", near, Law(made=Made()), batch=2, folder=Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_end(tmp_path):
    """The process ends by a real SIGKILL in the middle of a level; the level is made again."""
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT, tmp_path])
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "state.pt").is_file()
    whole, first = run("tree-of-frames", batch=2)
    rest, law = run("tree-of-frames", batch=2, folder=tmp_path)
    assert rest.lineage == whole.lineage
    assert torch.equal(rest.tensor, whole.tensor)
    assert rest.ledger.nfe == whole.ledger.nfe
    assert law.made == first.made[6:]


def test_ctrl_c_between_trees_gives_the_best():
    def stop(status):
        if status.step == 4:
            raise KeyboardInterrupt

    result, _ = run(da.TreeOfFrames(trees=3), show=stop)
    assert result.end == "interrupted"
    assert result.scored == 2


def test_ctrl_c_before_a_whole_video_is_raised():
    def stop(status):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(da.TreeOfFrames(), show=stop)


def test_the_result_is_made_again_bit_for_bit():
    result, _ = run(da.TreeOfFrames(branch=(3, 3), keep=(2,)))
    assert len(result.lineage.moves) >= 1
    assert result.seed is None
    assert torch.equal(result.repeat()[0].float(), result.tensor)
    best = max(result.top, key=lambda c: c.score)
    assert torch.equal(best.image, result.tensor)


@pytest.mark.parametrize("inner", ["linear-search:n=6", "tree-of-frames:branch=(6,2,1),keep=(2)"])
def test_drafts_of_fewer_steps(inner):
    """Drafts differ by little here, so the full video is one of the search without drafts."""
    law = Law(error=1e-3)
    result, _ = run(da.DraftCommit(inner, commits=2), law=law)
    made = [6, 6, 6, 6] if inner.startswith("linear") else [6, 4, 2, 2]
    # half of the evaluations in drafts; two in full, and the final call
    assert result.ledger.nfe == sum(made) * 2 + 3 * 4 * 4
    assert result.scored == 2
    plain, _ = run(inner, law=Law(error=1e-3))
    assert result.lineage in [c.lineage for c in plain.top]


def test_a_clip_goes_on():
    law = Law(chunks=5)
    clip = 0.5 + torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1) / 32
    result, _ = run(da.TreeOfFrames(branch=(4, 2), keep=(2,)), law=law, clip=clip)
    assert chunks(law) == [0, 0, 5, 5, 5]
    assert numbers_of(result.tensor[None])[0, :2].tolist() == pytest.approx([1.0, 2.0], abs=1e-5)
    assert torch.equal(result.repeat()[0].float(), result.tensor)


def test_a_clip_that_cannot_go_on():
    for count, law in ((4, Law()), (9, Law())):
        with pytest.raises(ValueError, match=r"F one of 1, 2, 3 of the video's 4 frames; got \["):
            run(da.TreeOfFrames(), law=law, clip=torch.zeros(count, 3, 1, 1))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"early": (4,)}, r"early=\(4,\) must be evaluations of the first chunk \(1 to 3 here\)"),
        ({"splitter": lambda prompt: ["one", "two"]}, "splitter must give three texts"),
        ({"splitter": lambda prompt: ["one", "", "two"]}, "splitter must give three texts"),
        (
            {"splitter": "/no/such/model"},
            "splitter='/no/such/model' must be 'rules', 'whole', or a",
        ),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(options, text):
    law = Law()
    with pytest.raises(ValueError, match=text):
        run(da.TreeOfFrames(**options), law=law)
    assert not law.made


def test_texts_of_stages_are_tried_before_anything_runs():
    def strict(videos, prompts):
        if prompts[0] == "two":
            raise ValueError("this is no text for me.")
        return near(videos, prompts)

    law, method = Law(), da.TreeOfFrames(splitter=lambda prompt: ("one", "two", "three"))
    strict.differentiable = False
    text = r"cannot score 2 frames against the text of the middle stage, 'two': this is no text"
    with pytest.raises(ValueError, match=text):
        run(method, strict, law=law)
    with pytest.raises(ValueError, match="an empty prompt has no stages"):
        run(da.TreeOfFrames(), law=law, prompt=" ")
    assert not law.made


def test_no_early_choice_without_previews():
    with pytest.raises(ValueError, match=r"early=\(1,\) must be evaluations .* \(none here\)"):
        run(da.TreeOfFrames(early=(1,)), law=Law(previews=False))


def test_a_reward_that_needs_more_frames_than_there_are():
    method, flicker = da.TreeOfFrames(branch=(3, 2), keep=(2,)), da.rewards.load("flicker")
    with pytest.raises(ValueError, match="a choice after chunk 1 sees 1 frames, and the reward"):
        run(method, flicker)
    # beside another reward it is left out where it cannot say anything
    result, _ = run(method, Weighted([("brightness", 1.0), ("flicker", 1.0)]))
    assert result.scored == 2
    assert run(da.TreeOfFrames(branch=(3, 2), keep=(0, 2)), flicker)[0].scored == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"branch": ()}, "at least one number each"),
        ({"keep": ()}, "at least one number each"),
        ({"branch": (0,)}, "branch"),
        ({"keep": (-1,)}, "keep"),
        ({"early": (2, 1)}, "must ascend"),
        ({"mix": "sum"}, "mix"),
        ({"trees": 0}, "trees"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        da.TreeOfFrames(**options)


def test_an_unfinished_video_is_no_result():
    with pytest.raises((BudgetExceeded, ValueError)):
        run(da.TreeOfFrames(), budget=da.Budget(nfe=10))
