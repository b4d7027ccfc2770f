"""The identity table of guidance on a pipeline of every family: off is off to the bit, and cost is
what was declared."""

import math
import re
from dataclasses import dataclass

import pytest
import torch

import diffalign as da
from diffalign.core import COND, UNCOND, Guidance, UnsupportedModel
from diffalign.core.registry import techniques
from diffalign.families import FAMILIES
from diffalign.guidance.linear_ag import identity_of
from diffalign.guidance.linear_policy import LinearPolicy
from diffalign.testing import tiny_inputs, tiny_pipeline
from diffalign.testing.final import final

# the first class of each; in a video that is made chunk after chunk a technique begins anew with
# each chunk, and other rows read what is there: tests/seams/test_chunks.py
PIPELINES = {
    family.name: name for name, family in reversed(FAMILIES.items()) if family.name != "anyflow-far"
}
WITHOUT_BLOCKS = {"hunyuan-dit", "auraflow", "cogview4"}
WITHOUT_MAPS = {"sana", "auraflow", "cogview4"}
STEPS, BATCH, EPS = 4, 2, torch.finfo(torch.float32).eps
pytestmark = pytest.mark.filterwarnings(
    "ignore:The call asks", "ignore:The negative prompt has no effect"
)


class Judge:
    """Likes every candidate equally, or the later ones better."""

    sees = "next"

    def __init__(self, rising=False):
        self.rising = rising

    def score(self, latents, sigma, rows):
        return torch.arange(float(len(rows))) if self.rising else torch.zeros(len(rows))


@dataclass(frozen=True, slots=True)
class FirstSteps(Guidance[None]):
    """CFG at the first ``count`` steps and the conditional model afterwards, written out."""

    count: int

    def passes(self, step, state):
        return (COND, UNCOND) if step.index < self.count else (COND,)

    def combine(self, preds, step, state):
        SHAPE[:] = step.convert(preds[COND], "native", "eps").shape[1:]
        return (step.mix(preds[COND], preds[UNCOND], 3.0) if UNCOND in preds else preds[COND]), None


SHAPE = []  # of one prediction, noted by FirstSteps
EQUAL_TO_CFG = {
    "scheduled": da.ScheduledCFG(3.0, shape="constant"),
    "interval": da.IntervalCFG(3.0, sigma=(0.0, math.inf)),
    "adaptive": da.AdaptiveGuidance(3.0, threshold=1.5),
    "dynamic, one candidate": da.DynamicCFG(5.0, candidates=(3.0,)),
    "dynamic, no preference": da.DynamicCFG(3.0, candidates=(1.0, 5.0, 9.0), evaluators=(Judge(),)),
    "rescaled": da.RescaledCFG(3.0, phi=0.0),
    "magnitude": da.MagnitudeAware(3.0, alpha=0.0),
    "beta": da.BetaCFG(3.0, a=1.0, b=1.0, gamma=0.0),
    "s2": da.S2Guidance(3.0, omega=0.0, blocks=("*",)),
    "pag": da.PAG(3.0, pag_scale=0.0),
    "seg": da.SEG(3.0, seg_scale=0.0),
    "skip-layer": da.SkipLayerGuidance(3.0, slg_scale=0.0, layers=("*",), stop=1.0),
}
EQUAL_TO_CONDITIONAL = {
    "scheduled": da.ScheduledCFG(1.0, shape="lambda"),
    "adaptive": da.AdaptiveGuidance(1.0, threshold=0.9),
    "apg": da.APG(1.0),
    "tcfg": da.TCFG(1.0),
    "rescaled": da.RescaledCFG(1.0),
    "magnitude": da.MagnitudeAware(1.0),
    "zero star": da.CFGZeroStar(1.0, zero_steps=0),
    "s2": da.S2Guidance(1.0, omega=0.0, blocks=("*",)),
}


QUICK = {"sd", "flux"}
FAMILY_SAMPLE = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PIPELINES
]


@pytest.fixture(scope="module", params=FAMILY_SAMPLE)
def pipe(request):
    return tiny_pipeline(PIPELINES[request.param])


def family(pipe):
    return FAMILIES[type(pipe).__name__].name


def in_two_calls(pipe):
    return FAMILIES[type(pipe).__name__].mode == "sequential"


def call(pipe, *techniques, steps=STEPS, **more):
    with da.apply(pipe, *techniques) as session:
        out = final(pipe, {**tiny_inputs(type(pipe).__name__, batch=BATCH, steps=steps), **more})
    return out, session.report()


def works(pipe, name):
    """Whether the family's models are of the kind that the technique needs; the refusal itself is
    tested below."""
    if name in ("s2", "skip-layer"):
        return family(pipe) not in WITHOUT_BLOCKS
    if name in ("pag", "seg"):
        return family(pipe) not in WITHOUT_MAPS
    return name != "zero star" or next(
        s.works for s in da.supports(pipe) if s.name == "cfg-zero-star"
    )


def test_off_switches_are_exact(pipe):
    for off, table in ((da.CFG(3.0), EQUAL_TO_CFG), (da.CFG(1.0), EQUAL_TO_CONDITIONAL)):
        expected, plain = call(pipe, off)
        for name, technique in table.items():
            if works(pipe, name):
                out, report = call(pipe, technique)
                assert torch.equal(out, expected), name
                assert report.rows == plain.rows, name


def test_scale_zero_is_the_unconditional_model(pipe):
    """The model with the negative text in place of the prompt.

    Pipelines with two calls need one row of the other to begin with.
    """
    given = tiny_inputs(type(pipe).__name__, batch=BATCH, steps=STEPS)
    swapped = {key: given[f"negative_{key}"] for key in given if f"negative_{key}" in given}
    if not swapped:
        assert family(pipe) == "dit"  # its unconditional branch is a class of its own
        return
    expected, plain = call(pipe, da.CFG(1.0), **swapped)
    # Cosmos mixes x0, so what it is handed comes back up to rounding: the bound of
    # tests/seams/denoiser/test_identity.py
    bound = 2.9e-6 * expected.abs().max() if family(pipe) == "cosmos2" else 0.0
    for technique in (da.CFG(0.0), da.BetaCFG(0.0), da.ScheduledCFG(0.0, shape="constant")):
        out, report = call(pipe, technique)
        assert (out - expected).abs().max() <= bound, technique
        assert report.rows == plain.rows + in_two_calls(pipe), technique


@pytest.mark.parametrize("guided", [1, 3])
def test_techniques_that_stop_guiding(pipe, guided, tmp_path):
    """An image that latches at once, a window, and a policy without estimated steps are CFG at the
    first steps, to the bit."""
    expected, plain = call(pipe, FirstSteps(guided))
    assert plain.rows == BATCH * (STEPS + guided)
    where = identity_of(pipe, STEPS, 3.0, tuple(SHAPE), "")
    plan = ("guided",) * guided + ("conditional",) * (STEPS - guided)
    LinearPolicy(where, plan, {0: torch.zeros(1, dtype=torch.float64)}, {}, {}, 0).save(
        tmp_path / "policy"
    )
    for technique in (
        da.AdaptiveGuidance(3.0, threshold=-1.0, min_guided_steps=guided),
        da.IntervalCFG(3.0, stop=guided / STEPS),
        da.LinearAG(3.0, policy=str(tmp_path / "policy")),
    ):
        out, report = call(pipe, technique)
        assert torch.equal(out, expected), technique
        assert report.rows == plain.rows, technique


def test_off_up_to_rounding(pipe):
    """APG that keeps everything is CFG; so is S2 with no block left out, although it pays for its
    pass."""
    expected, plain = call(pipe, da.CFG(3.0))
    bound = (
        64 * EPS * expected.abs().max()
    )  # conversions to x0 and back; a pass of its own has another row count
    neutral, report = call(pipe, da.APG(3.0, eta=1.0, cap=math.inf, momentum=0.0))
    assert (neutral - expected).abs().max() <= bound
    assert report.rows == plain.rows
    assert report.scale == pytest.approx(
        plain.scale, rel=1e-3
    )  # measured on the latent, without a learned variance
    if works(pipe, "s2"):
        empty, report = call(pipe, da.S2Guidance(3.0, n_drop=0, blocks=("*",), start=0.0, stop=1.0))
        assert (empty - expected).abs().max() <= bound
        assert report.rows == 3 * STEPS * BATCH


def test_equal_predictions_leave_nothing_to_guide(pipe):
    """With one text on both sides a direction rule is the conditional model."""
    given = tiny_inputs(type(pipe).__name__, batch=BATCH, steps=STEPS)
    same = {f"negative_{key}": value for key, value in given.items() if f"negative_{key}" in given}
    if not same:
        assert family(pipe) == "dit"  # its unconditional branch is a class of its own
        return
    expected, _ = call(pipe, da.CFG(1.0), **same)
    # two branches in one batch round otherwise, by eps; the rules multiply that by their scale, and
    # CFG-Zero* by the scale again
    bound = 3 * 3 * 64 * EPS * expected.abs().max()
    for name, technique in {
        "cfg": da.CFG(3.0),
        "zero star": da.CFGZeroStar(3.0, zero_steps=0),
        "tcfg": da.TCFG(3.0),
        "rescaled": da.RescaledCFG(3.0),
        "magnitude": da.MagnitudeAware(3.0),
        "apg": da.APG(3.0, cap=math.inf, momentum=0.0),
    }.items():
        if works(pipe, name):
            assert (call(pipe, technique, **same)[0] - expected).abs().max() <= bound, name


MAKE = {
    "s2-guidance": lambda: da.S2Guidance(3.0, blocks=("*",)),
    "skip-layer-guidance": lambda: da.SkipLayerGuidance(3.0, layers=(0,), stop=0.5),
    "cfg-plus-plus": lambda: da.CFGPlusPlus(0.6),
    "dynamic-cfg": lambda: da.DynamicCFG(
        3.0, candidates=(1.0, 4.0), evaluators=(Judge(rising=True),)
    ),
    "adaptive-guidance": lambda: da.AdaptiveGuidance(3.0, threshold=-1.0),
    "interval-cfg": lambda: da.IntervalCFG(3.0, stop=0.5),
}
GUIDANCES = [name for name, cls in techniques().items() if cls.seam == "denoiser"]
# evaluated rows of one image in 4 steps, by hand, where they are not two at every step
COST = {
    "scheduled-cfg": 7,  # weight 1 at the first step
    "interval-cfg": 6,
    "adaptive-guidance": 6,
    "linear-ag": 6,  # guided, estimated, guided, conditional
    "s2-guidance": 11,  # steps 0 to 2: floor(0.1 * 4) = 0, floor(0.9 * 4) = 3
    "skip-layer-guidance": 10,
    "pag": 12,
    "seg": 12,
    "cfg-zero-star": 4 + 2 / BATCH,  # one image at each of two still steps
    "beta-cfg": 6,  # the density is 0 at both ends
}
REFUSED = {
    "s2-guidance": "knows none in",
    "skip-layer-guidance": "knows none in",
    "pag": "map that could be changed|knows no such layer",
    "seg": "map that could be changed|knows no such layer",
    "auto-guidance": "two denoisers",
    "cfg-zero-star": "defined for flow velocities",
    "cfg-plus-plus": "changes the sampler and is exact for",
}


def made(name, pipe, folder):
    if name == "cfg-zero-star":
        return da.CFGZeroStar(3.0, zero_steps=0 if family(pipe) == "qwen" else 2)
    if name == "auto-guidance":
        weak = tiny_pipeline(type(pipe).__name__, seed=1)
        return da.AutoGuidance(3.0, weak=getattr(weak, FAMILIES[type(pipe).__name__].denoisers[0]))
    if name != "linear-ag":
        return MAKE.get(name, lambda: techniques()[name](3.0))()
    call(pipe, FirstSteps(0))
    where = identity_of(pipe, STEPS, 3.0, tuple(SHAPE), "")
    plan, weights = (
        ("guided", "estimated", "guided", "conditional"),
        torch.tensor([0.1, 0.5, 0.4], dtype=torch.float64),
    )
    LinearPolicy(where, plan, {1: weights}, {}, {}, 0).save(folder / "policy")
    return da.LinearAG(3.0, policy=str(folder / "policy"))


def count_rows(pipe, counted, *others):
    """Hooks on the denoisers that count the rows which really enter them, without the meter."""

    def count(module, args, kwargs):
        first = (
            args[0]
            if args
            else kwargs[next(k for k in ("hidden_states", "sample", "x") if k in kwargs)]
        )
        counted.append(len(first))

    parts = [
        part
        for key in FAMILIES[type(pipe).__name__].denoisers
        if (part := getattr(pipe, key, None)) is not None
    ]
    return [part.register_forward_pre_hook(count, with_kwargs=True) for part in (*parts, *others)]


@pytest.mark.parametrize("name", GUIDANCES)
@pytest.mark.few(12)
def test_declared_is_metered_is_run(pipe, name, monkeypatch, tmp_path):
    """Passes that the technique declares, rows that the meter charges, and rows that enter the
    denoiser are one number, also by hand."""
    technique = made(name, pipe, tmp_path)
    cls, declared, counted = type(technique), {}, []
    passes = cls.passes

    def noted(self, step, state):
        wanted = passes(self, step, state)
        declared[step.index, step.evaluation] = sum(
            BATCH if p.rows is None else len(p.rows) for p in wanted
        )
        return wanted

    monkeypatch.setattr(cls, "passes", noted)
    weak = (technique.weak,) if name == "auto-guidance" else ()
    hooks, refusal = count_rows(pipe, counted, *weak), None
    try:
        out, report = call(pipe, technique)
    except (UnsupportedModel, ValueError) as error:
        refusal = str(error)
    for hook in hooks:
        hook.remove()
    if refusal is not None:
        reason = next(s.reason for s in da.supports(pipe) if s.name == name)
        words = (
            "repeats its last noise level"
            if (family(pipe), name) == ("cosmos2", "cfg-plus-plus")
            else REFUSED.get(name, re.escape(reason))
        )
        assert re.search(words, refusal)
        assert re.search(words, reason or refusal)
        return
    two_each = (family(pipe), name) == ("qwen", "cfg-zero-star")
    by_hand = 2 * STEPS if two_each else COST.get(name, 2 * STEPS)
    shape = name == "beta-cfg" and in_two_calls(
        pipe
    )  # one row tells it, where the first step asks for the second call alone
    assert sum(declared.values()) + shape == report.rows == sum(counted) == by_hand * BATCH + shape
    assert report.nfe == report.rows / BATCH
    assert out.isfinite().all()
    assert not torch.equal(out, call(pipe, da.CFG(1.0))[0])


def test_a_still_step_on_qwen_is_refused():
    """Its pipeline divides by the norm of the prediction: a still step would be NaN."""
    with pytest.raises(
        UnsupportedModel, match=r"QwenImagePipeline: the pipeline divides .* Pass zero_steps=0"
    ):
        call(tiny_pipeline("QwenImagePipeline"), da.CFGZeroStar(3.0))


def test_a_replayed_choice_is_the_same_image(pipe):
    """DynamicCFG's chosen weights, given back as fixed weights per step, end in the same bits: the
    scheduler saw the winners only."""

    @dataclass(frozen=True, slots=True)
    class Replay(Guidance[None]):
        def passes(self, step, state):
            return (COND, UNCOND)

        def combine(self, preds, step, state):
            rows = [
                step.mix(preds[COND], preds[UNCOND], weight)[[row]]
                if weight != 1.0
                else preds[COND][[row]]
                for row, weight in enumerate(weights[step.index])
            ]
            return torch.cat(rows), None

    class Changing(Judge):
        """Prefers another candidate at every step and for every image."""

        calls = 0

        def score(self, latents, sigma, rows):
            self.calls += 1
            return torch.tensor(
                [float(k == (self.calls + row) % 3) for row in range(BATCH) for k in range(3)]
            )

    out, report = call(
        pipe, da.DynamicCFG(3.0, candidates=(1.0, 2.5, 4.0), evaluators=(Changing(),))
    )
    (chosen,) = report.extras.values()
    weights = chosen["chosen"]
    assert weights == [[2.5, 4.0], [4.0, 1.0], [1.0, 2.5], [2.5, 4.0]]
    assert torch.equal(call(pipe, Replay())[0], out)


def test_chosen_weights_and_latches_are_reported():
    pipe = tiny_pipeline("StableDiffusionPipeline")
    _, report = call(
        pipe, da.DynamicCFG(3.0, candidates=(1.0, 4.0), evaluators=(Judge(rising=True),))
    )
    assert report.extras == {"unet": {"chosen": [[4.0] * BATCH] * STEPS}}
    assert report.scale == pytest.approx([4.0] * STEPS, rel=1e-4)
    _, report = call(pipe, da.AdaptiveGuidance(3.0, threshold=-1.0))
    assert report.extras == {"unet": {"crossed": [1] * BATCH}}
