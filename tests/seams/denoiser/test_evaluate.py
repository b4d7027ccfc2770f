"""Which rows each pass runs, in which order, and what a model that fixes its rows gets instead."""

from dataclasses import replace

import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig
from diffusers.models.cache_utils import CacheMixin
from torch import nn

from diffalign.core import COND, UNCOND, Budget, BudgetExceeded, Meter, Pass, StepInfo
from diffalign.families.sd import SD
from diffalign.seams.denoiser.call import pipeline_call
from diffalign.seams.denoiser.evaluate import Branches, Evaluator

STEP = StepInfo(0, 1, 1.0)
SKIP = Pass("skip", True, blocks=("block",))


class Model(nn.Module, CacheMixin):
    """Adds ten times the text to the latents and remembers what each call got."""

    def __init__(self, config=None):
        super().__init__()
        self._cache_config, self.calls = config, []

    def forward(self, sample, timestep, text):
        self.calls.append(sample.flatten().tolist())
        return (sample + 10 * text, "more")


def evaluation(model=None, order="uc", budget=None):
    """An evaluator, the pipeline's call with rows 0, 1, 2, 3 of which two have the text 1, and its
    branches."""
    model = model or Model()
    first, second = [0, 1], [2, 3]
    cond, uncond = (second, first) if order == "uc" else (first, second)
    text = torch.tensor([[float(row in cond)] for row in range(4)])
    call = pipeline_call(
        "unet", model, model.forward, (torch.arange(4.0)[:, None], 5), {"text": text}
    )
    evaluator = Evaluator(replace(SD, order=order), Meter(budget or Budget()))
    return evaluator, call, Branches(cond, uncond)


def numbers(preds):
    return {p.name: prediction.flatten().tolist() for p, prediction in preds.items()}


@pytest.mark.parametrize(
    ("order", "preds"),
    [
        ("uc", {"uncond": [0.0, 1.0], "cond": [12.0, 13.0]}),
        ("cu", {"cond": [10.0, 11.0], "uncond": [2.0, 3.0]}),
    ],
)
@pytest.mark.parametrize("passes", [(COND, UNCOND), (UNCOND, COND)])
def test_both_branches_go_in_one_call_in_the_pipelines_order(order, preds, passes):
    evaluator, call, branches = evaluation(order=order)
    evaluations = []

    def look(denoise):
        def run(call, arguments):
            evaluations.append((call.passes, call.conditioned))
            return denoise(call, arguments)

        return run

    evaluator.middleware.append(look)
    output, predictions = evaluator.passes(call, STEP, passes, branches)
    assert call.module.calls == [[0.0, 1.0, 2.0, 3.0]]
    assert numbers(predictions) == preds
    assert output[1] == "more"
    prompted = order == "cu"
    assert evaluations[0][1] == (prompted, prompted, not prompted, not prompted)
    assert evaluations[0][0] == ((COND, UNCOND) if prompted else (UNCOND, COND))
    assert (evaluator.meter.rows, evaluator.meter.calls) == (4, 1)


@pytest.mark.parametrize(
    ("order", "passes", "rows", "preds"),
    [
        ("uc", (COND,), [2.0, 3.0], {"cond": [12.0, 13.0]}),
        ("cu", (UNCOND,), [2.0, 3.0], {"uncond": [2.0, 3.0]}),
        (
            "uc",
            (COND, replace(UNCOND, rows=(1,))),
            [1.0, 2.0, 3.0],
            {"uncond": [1.0], "cond": [12.0, 13.0]},
        ),
        ("uc", (replace(COND, rows=(1, 0)),), [3.0, 2.0], {"cond": [13.0, 12.0]}),
    ],
)
def test_only_the_rows_that_are_needed_run(order, passes, rows, preds):
    evaluator, call, branches = evaluation(order=order)
    _, predictions = evaluator.passes(call, STEP, passes, branches)
    assert call.module.calls == [rows]
    assert numbers(predictions) == preds
    assert evaluator.meter.rows == len(rows)


@pytest.mark.parametrize("kind", ["compiled", "cached"])
def test_a_model_with_fixed_rows_runs_whole_branches(kind):
    model = Model(FirstBlockCacheConfig() if kind == "cached" else None)
    if kind == "compiled":
        model.add_module("_orig_mod", Model())
    evaluator, call, branches = evaluation(model)
    passes = (replace(COND, rows=(1,)), replace(UNCOND, rows=(1, 0)))
    _, predictions = evaluator.passes(call, STEP, passes, branches)
    assert model.calls == [[0.0, 1.0, 2.0, 3.0]]
    assert numbers(predictions) == {"uncond": [1.0, 0.0], "cond": [13.0]}
    assert evaluator.meter.rows == 4


@pytest.mark.parametrize(
    ("p", "prediction"), [(COND, [12.0, 13.0]), (replace(UNCOND, rows=(1,)), [1.0])]
)
def test_faster_cache_always_gets_both_branches(p, prediction):
    evaluator, call, branches = evaluation(Model(FasterCacheConfig()))
    _, predictions = evaluator.passes(call, STEP, (p,), branches)
    assert call.module.calls == [[0.0, 1.0, 2.0, 3.0]]
    assert numbers(predictions) == {p.name: prediction}


def test_a_pass_that_skips_blocks_has_a_call_of_its_own():
    evaluator, call, branches = evaluation()
    groups = []

    def answer(denoise):
        def run(call, arguments):
            groups.append(call.passes)
            return arguments["sample"] if call.passes == (SKIP,) else denoise(call, arguments)

        return run

    evaluator.middleware.append(answer)
    output, predictions = evaluator.passes(call, STEP, (COND, SKIP, UNCOND), branches)
    assert groups == [(UNCOND, COND), (SKIP,)]
    assert numbers(predictions)["skip"] == [2.0, 3.0]
    assert output[1] == "more"  # of the first call
    assert (evaluator.meter.rows, evaluator.meter.calls) == (6, 2)


def test_the_first_middleware_is_outermost():
    evaluator, call, branches = evaluation()

    def around(name):
        return lambda denoise: lambda c, arguments: (names.append(name), denoise(c, arguments))[1]

    names = []
    evaluator.middleware += [around("outer"), around("inner")]
    evaluator.passes(call, STEP, (COND,), branches)
    assert names == ["outer", "inner"]


def test_rows_are_charged_before_they_run():
    evaluator, call, branches = evaluation(budget=Budget(nfe=3))
    with pytest.raises(BudgetExceeded):
        evaluator.passes(call, STEP, (COND, UNCOND), branches)
    assert call.module.calls == []
