"""Which default wins: files of the user, then the entry with most conditions that all hold."""

import json
import os
import warnings

import pytest

from diffalign.core import errors, presets
from diffalign.core.presets import VARIABLE, Entry, preset

FACTS = {"family": "sd", "steps": 20, "flow": False, "model": "aa"}


def entry(value, source="paper", option="width", **when):
    return {"option": option, "value": value, "source": source, "when": when}


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(errors, "_WARNED", set())


@pytest.fixture
def ship(monkeypatch):
    """``ship(*entries)``: the table that ships has these entries of "mine"."""

    def ship(*entries):
        monkeypatch.setattr(presets, "_shipped", lambda: presets._table({"mine": entries}))

    ship()
    return ship


@pytest.fixture
def write(tmp_path, monkeypatch):
    """``write(*tables)``: one preset file of the user for each, in this order."""

    def write(*tables):
        paths = [tmp_path / f"{i}.json" for i in range(len(tables))]
        for path, table in zip(paths, tables):
            path.write_text(table if isinstance(table, str) else json.dumps({"mine": table}))
        monkeypatch.setenv(VARIABLE, os.pathsep.join(map(str, paths)))

    return write


def test_every_condition_must_hold_and_most_conditions_win(ship):
    entries = [
        entry(1),
        entry(3, steps=20, family="sd"),
        entry(2, family="sd"),
        entry(9, family="sd", steps=20, flow=True),
        entry(8, "another option", option="height", family="sd", steps=20, flow=False),
    ]
    for ordered in (entries, entries[::-1]):
        ship(*ordered)
        assert preset("mine", "width", FACTS) == (3, "paper")
        assert preset("mine", "width", FACTS | {"steps": 21}) == (2, "paper")
        assert preset("mine", "width", {"family": "flux"}) == (1, "paper")


def test_a_default_of_the_family_counts_one_condition_more(ship):
    ship(entry(1, family="sd"), entry(2, option="depth", family="sd", steps=20))
    family = [Entry("width", 5, "family"), Entry("depth", 6, "family")]
    # one condition more than none equals one condition: the first of equals stays
    assert preset("mine", "width", FACTS, family) == (1, "paper")
    assert preset("mine", "width", FACTS | {"family": "flux"}, family) == (5, "family")
    family = [Entry("width", 5, "family", {"steps": 20}), *family]
    assert preset("mine", "width", FACTS, family) == (5, "family")
    assert preset("mine", "depth", FACTS, family) == (2, "paper")


def test_a_file_of_the_user_wins_over_more_conditions_and_over_later_files(ship, write):
    ship(entry(1, family="sd", steps=20))
    family = [Entry("width", 5, "family", {"family": "sd", "steps": 20})]
    write(
        [entry(7, "mine"), entry(8, "mine", steps=20)], [entry(9, "later", family="sd", steps=20)]
    )
    assert preset("mine", "width", FACTS, family) == (8, "mine")
    assert preset("mine", "width", FACTS | {"steps": 4}, family) == (7, "mine")
    write([entry(7, "mine", family="flux")], [entry(9, "later")])
    assert preset("mine", "width", FACTS, family) == (9, "later")
    write([entry(7, "mine", family="flux")])
    assert preset("mine", "width", FACTS, family) == (5, "family")


def test_a_fact_that_must_be_computed_is_asked_last(ship):
    calls = []

    def model():
        calls.append(1)
        return "aa"

    facts = FACTS | {"model": model}
    ship(entry(2, model="aa", family="flux"), entry(1))
    assert preset("mine", "width", facts)[0] == 1
    assert calls == []
    ship(entry(2, model="aa", family="sd"), entry(1))
    assert preset("mine", "width", facts)[0] == 2
    assert calls


def test_fractions_agree_up_to_rounding(ship):
    ship(entry(2, scale=0.3), entry(1))
    assert preset("mine", "width", {"scale": 0.1 + 0.2})[0] == 2
    assert preset("mine", "width", {"scale": 0.31})[0] == 1


def test_no_entry_that_fits_is_a_lookup_error_with_the_known_facts(ship):
    ship(entry(1, family="flux"))
    with pytest.raises(LookupError, match=r"No preset for mine:width fits \{'family': 'sd'\}"):
        preset("mine", "width", {"family": "sd", "model": lambda: "aa"})


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"mine": [{"option": "width"}]}',
        '{"mine": [{"option": "width", "value": 1, "source": 3}]}',
        '{"mine": [{"option": "width", "value": 1, "source": "a", "when": []}]}',
        '{"mine": [{"option": "width", "value": 1, "source": "a", "other": 1}]}',
    ],
)
def test_a_malformed_file_is_named_with_its_variable(write, text):
    write(text)
    with pytest.raises(ValueError, match=rf"{VARIABLE} names '.*0\.json', which is not"):
        preset("mine", "width", FACTS)


def test_a_missing_file_is_named_too(monkeypatch):
    monkeypatch.setenv(VARIABLE, "nowhere.json")
    with pytest.raises(ValueError, match=r"nowhere\.json.*FileNotFoundError"):
        preset("mine", "width", FACTS)


def test_a_calibration_for_other_weights_does_not_apply_and_says_so_once(ship, write):
    ship(entry(1))
    write([entry(4, "measured here", family="sd", model="bb")])
    with pytest.warns(UserWarning, match=r"mine: the width.*weights are others \(measured here\)"):
        assert preset("mine", "width", FACTS) == (1, "paper")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preset("mine", "width", FACTS)
        errors._WARNED.clear()
        preset("mine", "width", FACTS | {"family": "flux"})
        assert preset("mine", "width", FACTS | {"model": "bb"}) == (4, "measured here")
