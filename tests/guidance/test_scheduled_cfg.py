import math

import pytest
import torch

from diffalign.guidance import CFG, ScheduledCFG
from diffalign.guidance.scheduled_cfg import NAMES, shape_at
from diffalign.testing.contracts import GuidanceContract

# the shapes at u = 0, 1/4, 1/2, 3/4, 1, worked out by hand from their formulas
FIVE = {
    "constant": (1, 1, 1, 1, 1),
    "linear": (0, 0.5, 1, 1.5, 2),
    "cosine": (0, 0.2929, 1, 1.7071, 2),
    "inverse-linear": (2, 1.5, 1, 0.5, 0),
    "sine": (2, 1.7071, 1, 0.2929, 0),
    "v": (2, 1, 0, 1, 2),
    "lambda": (0, 1, 2, 1, 0),
    "pcs": (0, 0.1464, 0.5, 0.8536, 1),
}
# area of pcs over [0, 1] by power, from an independent table to four places
PCS_AREA = {0.01: 0.9995, 0.1: 0.965, 1.0: 0.5, 2.0: 0.313, 4.0: 0.178}


class TestScheduledCFG(GuidanceContract):
    def make(self):
        return ScheduledCFG(3.0, shape="cosine")

    def off(self):
        return ScheduledCFG(3.0, shape="constant"), CFG(3.0)

    def rows(self, steps, batch):
        return (2 * steps - 1) * batch  # the first step has weight 1


def mean_of(shape, count, **options):
    return math.fsum(ScheduledCFG(2.0, shape=shape, **options).weights(count)) / count - 1.0


@pytest.mark.parametrize("shape", FIVE)
def test_five_point_table(shape):
    for u, expected in zip((0, 0.25, 0.5, 0.75, 1), FIVE[shape]):
        assert shape_at(shape, u) == pytest.approx(expected, abs=5e-5)


def test_every_shape_is_in_a_table():
    assert set(NAMES) == {*FIVE, "interval"}


@pytest.mark.parametrize("shape", [s for s in FIVE if s != "pcs"])
def test_area_is_one(shape):
    # midpoint rule: error below max|f''| / (24 n^2) = pi^2 / (24 n^2), kinks fall on cell edges
    n = 4000
    area = math.fsum(shape_at(shape, (i + 0.5) / n) for i in range(n)) / n
    assert abs(area - 1.0) < math.pi**2 / (24 * n * n) + 1e-12


@pytest.mark.parametrize("power", PCS_AREA)
def test_pcs_area(power):
    n = 200_000
    area = math.fsum(shape_at("pcs", (i + 0.5) / n, power) for i in range(n)) / n
    assert area == pytest.approx(PCS_AREA[power], abs=6e-4)  # the table has three to four places


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "inverse-linear", "sine"])
def test_mean_on_the_grid_is_exact(shape):
    assert mean_of(shape, 50) == pytest.approx(1.0, abs=1e-12)


def test_v_and_lambda_need_normalising():
    assert mean_of("v", 50) == pytest.approx(1.0204, abs=5e-5)
    assert mean_of("lambda", 50) == pytest.approx(0.9796, abs=5e-5)
    for shape in NAMES:
        assert mean_of(shape, 50, normalise=True, band=(0.2, 0.7)) == pytest.approx(1.0, abs=1e-12)


def test_excess_starts_at_the_conditional_model_and_total_at_the_unconditional():
    excess, total = ScheduledCFG(5.0).weights(5), ScheduledCFG(5.0, ramp="total").weights(5)
    assert excess == (1.0, 3.0, 5.0, 7.0, 9.0)
    assert total == (0.0, 2.5, 5.0, 7.5, 10.0)


def test_clamp_is_a_scale_and_is_not_renormalised():
    # the paper's c = 2 for omega is a scale of 3
    assert ScheduledCFG(5.0, clamp=3.0).weights(5) == (3.0, 3.0, 5.0, 7.0, 9.0)


def test_paper_demo():
    # max(1, 2 w0 t) in the paper's omega with w0 = 14, hence 1 more as a scale
    weights = ScheduledCFG(15.0, clamp=2.0).weights(29)
    assert weights[0] == 2.0
    assert weights[14] == 15.0
    assert weights[-1] == 29.0


def test_interval_is_half_open_and_keeps_the_area():
    weights = ScheduledCFG(3.0, shape="interval", band=(0.25, 0.75)).weights(5)
    assert weights == (1.0, 5.0, 5.0, 1.0, 1.0)
    assert ScheduledCFG(3.0, shape="interval", band=(0.0, 1.0)).weights(5) == (3.0,) * 5
    assert ScheduledCFG(3.0, shape="interval", band=(0.5, 1.0)).weights(5) == (
        1.0,
        1.0,
        5.0,
        5.0,
        5.0,
    )


@pytest.mark.parametrize("scale", [0.0, 0.7, 1.0, 1.1, 7.1])
def test_constant_is_the_scale_to_the_bit(scale):
    assert ScheduledCFG(scale, shape="constant").weights(7) == (scale,) * 7


@pytest.mark.parametrize(
    ("shape", "skipped"), [("linear", [0]), ("sine", [7]), ("lambda", [0, 7]), ("constant", [])]
)
def test_steps_of_weight_one_run_one_pass(shape, skipped):
    contract = TestScheduledCFG()
    trace = contract.sample(ScheduledCFG(3.0, shape=shape))
    assert trace.rows_per_call == [
        contract.batch * (1 if i in skipped else 2) for i in range(contract.steps)
    ]


def test_total_ramp_runs_the_unconditional_model_alone_at_weight_zero():
    trace = TestScheduledCFG().sample(ScheduledCFG(3.0, ramp="total"))
    assert [p.name for p in trace.passes[0]] == ["uncond"]
    assert trace.rows_per_call[0] == 3


def test_single_step_has_no_ramp():
    assert ScheduledCFG(4.0, shape="lambda", normalise=True).weights(1) == (4.0,)


def test_scale_comes_from_the_pipeline():
    contract = TestScheduledCFG()
    assert torch.equal(
        contract.sample(ScheduledCFG(shape="linear")).sample,
        contract.sample(ScheduledCFG(3.0)).sample,
    )


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"scale": math.inf}, "scale"),
        ({"clamp": math.nan}, "clamp"),
        ({"shape": "cosinus"}, "shape"),
        ({"ramp": "both"}, "ramp"),
        ({"power": 0.0}, "power"),
        ({"band": (0.5, 0.5)}, "band"),
        ({"band": (0.5, 1.2)}, "band"),
    ],
)
def test_bad_options_are_named(options, word):
    with pytest.raises(ValueError, match=f"ScheduledCFG.*{word}"):
        ScheduledCFG(**options)


def test_normalising_nothing_is_an_error():
    with pytest.raises(ValueError, match="no weight on any of 2 steps"):
        ScheduledCFG(3.0, shape="lambda", normalise=True).weights(2)
