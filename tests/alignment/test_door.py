"""``align``: results, budgets, interrupts, folders and bad input, on the embedded model."""

from time import perf_counter

import numpy as np
import pytest
import torch

import diffalign as da
from diffalign.alignment.identity import marks_of
from diffalign.alignment.problem import PipelineProblem
from diffalign.alignment.setting import Setting
from diffalign.core import BudgetExceeded
from diffalign.core.seeds import seed_of
from diffalign.drawing.png import read_settings

PROMPT = "a photo of a red apple"
CALL = {"num_inference_steps": 4, "guidance_scale": 3.0}
NFE = 8  # of one image


def brightness(images, prompts):
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def pipe():
    pipe = da.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain(pipe, seed, **call):
    generator = torch.Generator().manual_seed(seed)
    arguments = {**CALL, **call, "generator": generator, "output_type": "pt"}
    return pipe(PROMPT, **arguments).images[0].float()


def test_best_of_n_is_the_best_of_the_plain_calls(pipe):
    result = da.align(pipe, PROMPT, method=da.BestOfN(5, batch=2), reward=brightness, **CALL)
    seeds = [seed_of(PROMPT, index) for index in range(5)]
    images = [plain(pipe, seed) for seed in seeds]
    scores = [float(image.mean()) for image in images]
    best = max(range(5), key=scores.__getitem__)
    assert result.seed == seeds[best]
    assert torch.equal(result.tensor, images[best])
    assert result.score == pytest.approx(scores[best], abs=1e-6)
    assert result.first.score == pytest.approx(scores[0], abs=1e-5)
    assert sorted(c.score for c in result.top) == pytest.approx(sorted(scores), abs=1e-5)


def test_the_ledger_counts_the_final_call_too(pipe):
    ledger = da.align(pipe, PROMPT, method="best-of-n:n=3", reward=brightness, **CALL).ledger
    assert (ledger.nfe, ledger.evaluations) == (4 * NFE, 4 * NFE // 2)
    assert (ledger.decodes, ledger.rewards, ledger.backward) == (4, 4, 0)


@pytest.mark.parametrize("nfe", [2 * NFE, 5 * NFE + 3, 6 * NFE - 1])
def test_a_budget_ends_the_run_before_it_is_passed(pipe, nfe):
    result = da.align(
        pipe, PROMPT, method=da.BestOfN(), reward=brightness, budget=da.Budget(nfe=nfe), **CALL
    )
    assert result.scored == nfe // NFE - 1
    assert result.ledger.nfe == nfe // NFE * NFE <= nfe
    assert result.end.startswith("budget")


def test_every_kind_of_budget_is_kept(pipe):
    for budget in (da.Budget(rewards=4), da.Budget(decodes=4)):
        result = da.align(
            pipe, PROMPT, method=da.BestOfN(), reward=brightness, budget=budget, **CALL
        )
        assert (result.scored, result.ledger.rewards, result.ledger.decodes) == (3, 4, 4)


def test_techniques_act_in_the_run_and_in_the_final_call(pipe):
    techniques = (da.AdaptiveGuidance(threshold=0.5),)
    result = da.align(
        pipe, PROMPT, method="best-of-n:n=2", reward=brightness, techniques=techniques, **CALL
    )
    with da.apply(pipe, *techniques):
        image = plain(pipe, result.seed)
    assert torch.equal(result.tensor, image)
    assert not torch.equal(image, plain(pipe, result.seed))
    assert result.ledger.nfe < 3 * NFE


def test_drafts_share_one_sampler(pipe, monkeypatch):
    made = []
    before = Setting.sampler

    def sampler(setting, meter):
        made.append(setting.call["num_inference_steps"])
        return before(setting, meter)

    monkeypatch.setattr(Setting, "sampler", sampler)
    method = da.DraftCommit(inner=da.BestOfN(6, batch=2), steps=1)
    da.align(pipe, PROMPT, method=method, reward=brightness, **CALL)
    assert made.count(1) == 1


def test_replay_repeats_the_image(pipe):
    result = da.align(pipe, PROMPT, method="best-of-n:n=2", reward=brightness, **CALL)
    assert np.array_equal(np.asarray(result.replay()), np.asarray(result.image))
    assert not da.active(pipe)


def test_the_pipeline_is_what_it_was(pipe):
    before = (type(pipe), type(pipe.unet), type(pipe.scheduler), dict(vars(pipe.scheduler)))
    image = plain(pipe, 3)
    da.align(pipe, PROMPT, method="best-of-n:n=2", reward=brightness, **CALL)
    assert (type(pipe), type(pipe.unet), type(pipe.scheduler)) == before[:3]
    assert torch.equal(plain(pipe, 3), image)


def test_several_prompts_give_several_results(pipe, tmp_path):
    prompts = [PROMPT, "a photo of a dog"]
    results = da.align(
        pipe, prompts, method="best-of-n:n=2", reward=brightness, folder=tmp_path, **CALL
    )
    assert [result.prompt for result in results] == prompts
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "000-a-photo-of-a-red-apple",
        "001-a-photo-of-a-dog",
    ]


def test_judges_are_reported_and_not_optimised(pipe):
    def darkness(images, prompts):
        return -images.mean((1, 2, 3))

    result = da.align(
        pipe, PROMPT, method="best-of-n:n=3", reward=brightness, judges=[darkness], **CALL
    )
    first, last = result.judges["darkness"]
    assert last == pytest.approx(-result.score)
    assert first == pytest.approx(-result.first.score)


def test_ties_are_settled_and_counted(pipe):
    def flat(images, prompts):
        return torch.zeros(len(images))

    result = da.align(pipe, PROMPT, method="best-of-n:n=4", reward=flat, ties=[brightness], **CALL)
    scores = [float(plain(pipe, seed_of(PROMPT, index)).mean()) for index in range(4)]
    assert result.seed == seed_of(PROMPT, scores.index(max(scores)))
    assert (result.equal, result.scored) == (4, 4)
    assert "4 of 4 images share the highest score" in str(result)


def test_an_interrupt_returns_the_best_so_far(pipe):
    calls = []

    def reward(images, prompts):
        calls.append(len(images))
        if len(calls) == 4:  # the first is of the grey images
            raise KeyboardInterrupt
        return images.mean((1, 2, 3))

    def final(images, prompts):
        return reward(images, prompts)

    result = da.align(
        pipe, PROMPT, method=da.BestOfN(batch=1), reward=final, budget=da.Budget(nfe=800), **CALL
    )
    assert result.end == "interrupted"
    assert result.scored == 2
    assert not da.active(pipe)


@pytest.mark.parametrize("late", [1, 6])
def test_a_stop_ends_at_the_next_evaluation_with_the_best_image(pipe, late):
    """Of 4 steps with one image each: in the second image, one and three steps in."""
    asked = []
    seen = []

    def stop():
        asked.append(len(seen))
        return asked.count(1) >= late

    result = da.align(
        pipe,
        PROMPT,
        method=da.BestOfN(9, batch=1),
        reward=brightness,
        improved=lambda candidate: seen.append(candidate.score),
        stop=stop,
        **CALL,
    )
    assert (result.end, result.scored) == ("interrupted", 1)
    assert torch.equal(result.tensor, plain(pipe, seed_of(PROMPT, 0)))
    assert asked.count(1) == late  # the final call is made in full
    assert not da.active(pipe)


def test_a_stop_before_the_first_image_is_said(pipe):
    with pytest.raises(da.Cancelled, match="stopped"):
        da.align(pipe, PROMPT, method="best-of-n:n=2", reward=brightness, stop=lambda: True, **CALL)
    assert not da.active(pipe)


def test_an_interrupt_among_drafts_runs_the_best_draft_in_full(pipe, tmp_path):
    calls = []

    def reward(images, prompts):
        calls.append(len(images))
        if len(calls) == 4:  # the first is of the grey images
            raise KeyboardInterrupt
        return images.mean((1, 2, 3))

    method = da.DraftCommit(inner=da.BestOfN(batch=1), steps=1)
    result = da.align(pipe, PROMPT, method=method, reward=reward, budget=da.Budget(nfe=800), **CALL)
    assert result.end == "interrupted"
    generator = torch.Generator().manual_seed(result.lineage.moves[0].seed)
    image = pipe(PROMPT, generator=generator, output_type="pt", **CALL).images[0]
    assert torch.equal(result.tensor, image)
    assert result.score == float(image.float().mean())
    assert result.first.score == result.score
    assert [c.score for c in result.top] == [m.score for m in result.history] == [result.score]
    assert "curve.png" in [path.name for path in result.save(tmp_path)]


def test_an_interrupt_of_the_final_call_returns_the_image_that_was_found(pipe, monkeypatch):
    def repeat(problem, lineage):
        raise KeyboardInterrupt

    monkeypatch.setattr(PipelineProblem, "repeat", repeat)
    result = da.align(pipe, PROMPT, method="best-of-n:n=2", reward=brightness, **CALL)
    assert result.end == "interrupted before the final call"
    assert torch.equal(result.tensor, result.top[0].image)
    assert result.score == result.top[0].score
    assert not da.active(pipe)


@pytest.mark.parametrize("when", ["prompt", "nowhere"])
def test_a_stop_keeps_the_results_of_the_prompts_before(pipe, when):
    """In the second prompt, before it has an image."""
    seen = []
    results = da.align(
        pipe,
        [PROMPT, "a photo of a dog", "a photo of a cat"],
        method=da.BestOfN(1),
        reward=brightness,
        improved=lambda candidate: seen.append(candidate.score),
        stop=lambda: when == "prompt" and len(seen) == 1,
        **CALL,
    )
    assert [result.prompt for result in results][:1] == [PROMPT]
    assert len(results) == (1 if when == "prompt" else 3)


@pytest.mark.parametrize("answer", [float("nan"), RuntimeError("no words for it")])
def test_a_judge_that_fails_on_the_result_costs_no_result(pipe, answer):
    def judge(images, prompts):
        if images.std() == 0:  # the grey images
            return torch.zeros(len(images))
        if isinstance(answer, Exception):
            raise answer
        return torch.full((len(images),), answer)

    with pytest.warns(UserWarning, match="The judge judge was left out"):
        result = da.align(
            pipe,
            PROMPT,
            method="best-of-n:n=1",
            reward=brightness,
            judges=[judge, brightness],
            **CALL,
        )
    assert result.judges == {"brightness": (result.score, result.score)}


def test_a_tie_leaves_the_final_call_its_score(pipe):
    def flat(images, prompts):
        return torch.zeros(len(images))

    result = da.align(
        pipe,
        PROMPT,
        method="best-of-n",
        reward=flat,
        ties=[brightness],
        budget=da.Budget(rewards=4),
        **CALL,
    )
    assert result.ledger.rewards <= 4


def test_an_error_leaves_the_pipeline_plain(pipe):
    def reward(images, prompts):
        if images.shape[-1] == 64 and images.std() > 0:
            raise ZeroDivisionError
        return images.mean((1, 2, 3))

    with pytest.raises(ZeroDivisionError):
        da.align(pipe, PROMPT, method="best-of-n:n=2", reward=reward, **CALL)
    assert not da.active(pipe)


def test_a_run_continues_where_it_stopped(pipe, tmp_path):
    def stop(status):
        if status.step == 2:
            raise MemoryError("killed")

    options = {"method": da.BestOfN(6, batch=2), "reward": brightness, "folder": tmp_path, **CALL}
    with pytest.raises(MemoryError):
        da.align(pipe, PROMPT, show=stop, **options)
    seen = []
    again = da.align(pipe, PROMPT, show=lambda status: seen.append(status.step), **options)
    whole = da.align(pipe, PROMPT, **{**options, "folder": None})
    assert seen == [3]
    assert again.seed == whole.seed
    assert torch.equal(again.tensor, whole.tensor)
    assert again.ledger.nfe == whole.ledger.nfe
    assert again.scored == whole.scored == 6
    assert [m.score for m in again.history] == [m.score for m in whole.history]


def shift_weights(pipe, monkeypatch):
    weight = pipe.unet.conv_out.bias
    monkeypatch.setattr(weight, "data", weight.data + 1.0)


def shift_adapter(pipe, monkeypatch):
    """A layer with an active adapter, as peft leaves it."""
    layer = pipe.unet.conv_out
    monkeypatch.setattr(layer, "lora_B", {"style": torch.nn.Identity()}, raising=False)
    monkeypatch.setattr(layer, "active_adapters", ["style"], raising=False)
    monkeypatch.setattr(layer, "scaling", {"style": 0.5}, raising=False)


def shift_scheduler(pipe, monkeypatch):
    config = {**pipe.scheduler.config, "rescale_betas_zero_snr": True}
    monkeypatch.setattr(pipe, "scheduler", type(pipe.scheduler).from_config(config))


def other_place():
    def brightness(images, prompts):
        return images.mean((1, 2, 3))

    return brightness


@pytest.mark.parametrize(
    ("shift", "options", "names"),
    [
        (shift_weights, {}, "weights"),
        (shift_adapter, {}, "adapters"),
        (shift_scheduler, {}, "scheduler_config"),
        (None, {"reward": other_place()}, "functions"),
        (None, {"cross_attention_kwargs": {"scale": torch.tensor(0.5)}}, "call"),
    ],
)
def test_a_folder_is_continued_by_the_same_run_only(
    pipe, tmp_path, monkeypatch, shift, options, names
):
    same = {"cross_attention_kwargs": {"scale": torch.tensor(0.25)}}
    given = {"method": "best-of-n:n=1", "reward": brightness, "folder": tmp_path, **same, **CALL}
    da.align(pipe, PROMPT, **given)
    if shift is not None:
        shift(pipe, monkeypatch)
    with pytest.raises(ValueError, match=f"holds another run: {names} differ"):
        da.align(pipe, PROMPT, **{**given, **options})


def test_a_refused_run_leaves_its_folder_to_the_next(pipe, tmp_path):
    folder = tmp_path / "run"
    given = {"method": "best-of-n:n=1", "reward": brightness, "folder": folder, **CALL}
    with pytest.raises(da.UnsupportedModel, match="FlowSDE is for flow models"):
        da.align(pipe, PROMPT, kernel="flow-sde", **given)
    assert not folder.exists()
    assert da.align(pipe, PROMPT, kernel="eta", **given).scored == 1


def test_functions_are_told_apart_by_what_they_do(pipe):
    def mark(text, module):
        names = {"__name__": module}
        exec(text, names)
        (found,) = marks_of(pipe, names["reward"], ())["functions"]
        return found

    first = "reward = lambda images, prompts: images.mean((1, 2, 3))"
    assert mark(first, "__main__") == mark(first, "script")
    assert mark(first.replace("mean", "sum"), "script") != mark(first, "script")
    assert mark(first.replace("3", "2"), "script") != mark(first, "script")


def test_save_writes_pictures_and_numbers(pipe, tmp_path):
    result = da.align(pipe, PROMPT, method="best-of-n:n=3", reward=brightness, **CALL)
    names = sorted(path.name for path in result.save(tmp_path))
    assert names == ["before_after.png", "best.png", "curve.png", "image.png", "result.json"]
    settings = read_settings(tmp_path / "image.png")
    assert settings["seed"] == result.seed
    assert settings["method"]["name"] == "best-of-n"
    assert da.techniques_of(settings) == ()


REFUSED = [
    ({"method": "best-of-m"}, "Unknown method 'best-of-m'. Nearest: best-of-n"),
    ({"method": 5}, "takes a method like"),
    ({"reward": "emoji-clap"}, "Unknown reward 'emoji-clap'. Nearest: emoji-clip"),
    ({"reward": 5}, "takes a name, a reward, or a function"),
    ({"method": "best-of-n", "budget": None}, "goes on until its budget ends"),
    (
        {"budget": da.Budget(nfe=2 * NFE - 1)},
        rf"BestOfN needs at least nfe={2 * NFE}, .* One image takes {NFE} NFE",
    ),
    ({"method": da.SMC(), "budget": da.Budget(decodes=4), "eta": 1.0}, "SMC needs .* decodes=5"),
    (
        {"method": da.PromptSearch(), "budget": da.Budget(nfe=6 * NFE - 1)},
        f"PromptSearch needs at least nfe={6 * NFE}, decodes=6",
    ),
    (
        {"method": da.DraftCommit(), "budget": da.Budget(nfe=3 * NFE)},
        f"DraftCommit needs at least nfe={3 * NFE + NFE // 2}",
    ),
    ({"reward": lambda images, prompts: images}, "one score per image"),
    ({"reward": lambda images, prompts: images.mean((1, 2, 3)) * float("nan")}, "finite"),
    ({"reward": lambda images, prompts: images.mean().reshape(1)}, "one score per image"),
    ({"judges": [lambda images, prompts: images]}, "one score per image"),
    ({"ties": [lambda images, prompts: images.mean((1, 2, 3)) / 0]}, "finite"),
    ({"latents": torch.zeros(1)}, "set by the sampler"),
    ({"generator": torch.Generator()}, r"align\(generator=...\) is set .*; pass .* seed= instead"),
    ({"bugdet": da.Budget(nfe=80)}, "no argument 'bugdet'. Nearest: budget"),
    ({"judge": ["emoji-clip"]}, "no argument 'judge'. Nearest: judges"),
    ({"num_inference_step": 4}, "'num_inference_step'. Nearest: num_inference_steps"),
    ({"num_images_per_prompt": 4}, "makes no more images: .* budget="),
    ({"budget": 100}, "takes a budget like da.Budget.*; got 100"),
    ({"budget": {"nfe": 100}}, "takes a budget like da.Budget.*'nfe': 100"),
    ({"budget": "nfes=3"}, "Nearest: nfe"),
    ({"kernel": 5}, "or a name: eta, flow-sde, native, vp-flow; got 5"),
    ({"kernel": da.Eta}, r"got the class Eta. Write da.Eta\(\)"),
    ({"kernel": "eta+eta"}, "must name one kernel; got 2"),
    ({"judges": 5}, r"align\(judges=...\) takes names or rewards; got 5"),
    ({"ties": "emoji-clap"}, "Unknown reward 'emoji-clap'"),
    ({"techniques": 5}, "takes techniques like .* got 5"),
    ({"techniques": "adaptive-guide"}, "Nearest: adaptive-guidance"),
    *(({"batch": value}, "batch=...* at least 1, or None") for value in (0, -1, "4", True)),
    *(({"seed": value}, "seed=...* must be an integer") for value in (None, 1.5, "1")),
    ({"folder": ""}, "folder=...* is empty"),
    ({"folder": 5}, "folder=...* takes the path"),
    ({"show": 5}, "show=...* takes a function"),
    *(({"prompt": value}, "a list of at least one text") for value in (None, 5, [], [5])),
    *(({"num_inference_steps": value}, "integer of at least 1") for value in (0, "4", 4.0)),
    *(
        ({"guidance_scale": value}, "guidance_scale=...* must be a finite number")
        for value in (float("nan"), "3", torch.tensor(float("inf")))
    ),
]


@pytest.mark.parametrize(("changes", "text"), REFUSED)
def test_bad_input_is_refused_before_anything_runs(pipe, changes, text, monkeypatch):
    def forward(*args, **kwargs):
        raise AssertionError("the model ran")

    monkeypatch.setattr(type(pipe.unet), "forward", forward)
    options = {"method": "best-of-n:n=2", "reward": brightness, "prompt": PROMPT, **CALL, **changes}
    with pytest.raises((ValueError, TypeError), match=text) as refusal:
        da.align(pipe, **options)
    assert "\n" not in str(refusal.value)


def test_one_name_is_a_list_of_one(pipe):
    """And what has a text is read from it."""
    options = {"method": "best-of-n:n=2", "reward": brightness, **CALL}
    many = da.align(
        pipe,
        PROMPT,
        budget=da.Budget(nfe=100),
        techniques=[da.AdaptiveGuidance()],
        judges=[brightness],
        ties=["emoji-clip"],
        **options,
    )
    for techniques in (da.AdaptiveGuidance(), "adaptive-guidance"):
        one = da.align(
            pipe,
            PROMPT,
            budget="nfe=100",
            techniques=techniques,
            judges=brightness,
            ties="emoji-clip",
            **options,
        )
        assert (one.seed, one.judges, one.settings) == (many.seed, many.judges, many.settings)
        assert torch.equal(one.tensor, many.tensor)


def test_a_budget_of_seconds_stops_the_search(pipe, monkeypatch):
    now = [perf_counter()]

    def slow(images, prompts):
        now[0] += 1.0
        return images.mean((1, 2, 3))

    for module in ("diffalign.core.budget", "diffalign.alignment.progress"):
        monkeypatch.setattr(f"{module}.perf_counter", lambda: now[0])
    options = {"method": da.BestOfN(batch=1), "reward": slow, **CALL}
    result = da.align(pipe, PROMPT, budget=da.Budget(seconds=7.5), **options)
    assert result.end.startswith("budget")
    # of seven scores one is a probe, two are timed, and one is the final call's
    assert result.scored == 3
    assert result.ledger.seconds <= 7.5
    assert (result.ledger.nfe, result.ledger.rewards) == (4 * NFE, 4)


@pytest.mark.parametrize(
    ("method", "images"),
    [(da.BestOfN(batch=8), 8), (da.SMC(particles=8), 8), (da.DraftCommit("best-of-n:n=4"), 1)],
    ids=lambda value: type(value).__name__,
)
def test_the_first_round_in_a_budget_of_seconds_is_a_whole_one(pipe, method, images):
    """Time enough for all that is asked for; the first whole image ends the run."""
    finished = []
    result = da.align(
        pipe,
        PROMPT,
        method=method,
        reward=brightness,
        budget=da.Budget(seconds=1000.0),
        improved=finished.append,
        stop=lambda: bool(finished),
        batch=8,
        eta=1.0 if method.branches else 0.0,
        **CALL,
    )
    assert result.scored == images


def test_seconds_that_are_ample_change_nothing(pipe):
    def run(**limits):
        method = da.BestOfN(batch=3)
        budget = da.Budget(nfe=6 * NFE, **limits)
        return da.align(pipe, PROMPT, method=method, reward=brightness, budget=budget, **CALL)

    plain, timed = run(), run(seconds=1000.0)
    assert torch.equal(timed.tensor, plain.tensor)
    assert timed.ledger.nfe == plain.ledger.nfe
    assert timed.scored == plain.scored == 5


def test_running_out_of_budget_before_one_image_says_so(pipe):
    class Greedy(da.BestOfN):
        def step(self, problem, state):
            raise BudgetExceeded("nothing was done")

    with pytest.raises(BudgetExceeded, match="nothing was done"):
        da.align(pipe, PROMPT, method=Greedy(2), reward=brightness, **CALL)
