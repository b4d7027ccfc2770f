"""A meter counts work before it is done, and counts nothing of what it refuses."""

import pytest

from diffalign.core import Budget, BudgetExceeded, Cancelled, Meter
from diffalign.core.budget import read_budget


def counts(meter):
    return meter.rows, meter.calls, meter.decodes, meter.rewards, meter.backward


def test_rows_are_counted_and_each_charge_with_rows_is_one_call():
    meter = Meter()
    meter.charge(rows=4)
    meter.charge(rows=2, decodes=3)
    meter.charge(rewards=5, backward=7)
    assert counts(meter) == (6, 2, 3, 5, 7)
    assert meter.nfe == meter.rows


def test_rows_that_join_a_call_are_not_another_call():
    meter = Meter()
    meter.charge(rows=2)
    meter.charge(rows=2, joined=True)
    assert counts(meter) == (4, 1, 0, 0, 0)


@pytest.mark.parametrize(
    ("limit", "work"), [("nfe", "rows"), *((n, n) for n in ("rewards", "decodes", "backward"))]
)
def test_a_limit_may_be_reached_and_not_passed(limit, work):
    meter = Meter(Budget(**{limit: 10}))
    meter.charge(**{work: 8})
    meter.charge(**{work: 2})
    before = counts(meter)
    with pytest.raises(BudgetExceeded, match=f"{limit}: 11 would pass the budget of 10"):
        meter.charge(**{work: 1})
    assert counts(meter) == before


def test_nothing_at_all_is_counted_of_work_that_one_limit_refuses():
    meter = Meter(Budget(rewards=1))
    with pytest.raises(BudgetExceeded, match="rewards: 2"):
        meter.charge(rows=3, decodes=2, rewards=2)
    assert counts(meter) == (0, 0, 0, 0, 0)


def test_other_meters_are_charged_with_the_same_work():
    outer = Meter(rows=5, calls=1)
    inner = Meter(others=(outer,))
    inner.charge(rows=2, decodes=1)
    assert counts(inner) == (2, 1, 1, 0, 0)
    assert counts(outer) == (7, 2, 1, 0, 0)
    outer.charge(rows=1)
    assert inner.rows == 2


@pytest.mark.parametrize("tight", [0, 1, 2])
def test_a_refusal_of_any_meter_leaves_all_as_they_were(tight):
    budgets = [Budget(nfe=3 if i == tight else 100) for i in range(3)]
    others = (Meter(budgets[1]), Meter(budgets[2]))
    meter = Meter(budgets[0], others=others)
    meter.charge(rows=3)
    with pytest.raises(BudgetExceeded, match="nfe: 4 would pass the budget of 3"):
        meter.charge(rows=1)
    assert [m.rows for m in (meter, *others)] == [3, 3, 3]
    assert [m.calls for m in (meter, *others)] == [1, 1, 1]


def test_a_stop_refuses_all_work_and_counts_nothing():
    answers = iter([False, True])
    meter = Meter(stop=lambda: next(answers))
    meter.charge(rows=2)
    with pytest.raises(Cancelled, match="stopped"):
        meter.charge(rows=2)
    assert counts(meter) == (2, 1, 0, 0, 0)


def test_a_check_counts_nothing():
    meter = Meter(Budget(nfe=4))
    meter.check(rows=4)
    with pytest.raises(BudgetExceeded):
        meter.check(rows=5)
    assert counts(meter) == (0, 0, 0, 0, 0)


def test_time_runs_from_where_the_meter_was_made():
    meter = Meter(Budget(seconds=60.0))
    meter.charge(rows=1)
    meter.started -= 61.0
    assert 61.0 <= meter.seconds < 120.0
    with pytest.raises(BudgetExceeded, match=r"seconds: 61\.\d passed the budget of 60"):
        meter.charge(rows=1)
    assert meter.rows == 1


@pytest.mark.parametrize("name", ["nfe", "rewards", "seconds", "decodes", "backward"])
def test_a_budget_is_positive(name):
    for value in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=rf"Budget\({name}=...\) must be positive or None"):
            Budget(**{name: value})
    Budget(**{name: None})


def test_evaluations_are_noted_even_after_the_time_is_over():
    """They tell of finished work, which must not be lost."""
    outer = Meter(Budget(seconds=60.0))
    outer.started -= 61.0
    meter = Meter(others=(outer,))
    meter.note(evaluations=8)
    assert meter.evaluations == outer.evaluations == 8
    assert counts(outer) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("value", ["400", True, float("inf"), float("nan"), [4]])
@pytest.mark.parametrize("name", ["nfe", "seconds"])
def test_a_limit_is_a_finite_number(name, value):
    with pytest.raises(ValueError, match=rf"Budget\({name}=...\) must be .* a finite number; got"):
        Budget(**{name: value})


def test_a_budget_is_read_from_its_text():
    assert read_budget("nfe=400, seconds=1.5") == Budget(nfe=400, seconds=1.5)
    assert read_budget("decodes=1e2").decodes == 100
    for text, reason in (
        ("nfe", "'nfe' is not one of nfe, rewards"),
        ("second=3", "Nearest: seconds"),
        ("nfe=many", "nfe must be a number; got 'many'"),
        ("nfe=1.5", "nfe must be a whole number; got '1.5'"),
        ("nfe=inf", "nfe must be a whole number; got 'inf'"),
        ("nfe=nan", "nfe must be a whole number; got 'nan'"),
        ("seconds=inf", r"Budget\(seconds=...\) must be positive"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_budget(text)
