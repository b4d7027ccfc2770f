"""Rows of a denoiser's arguments, wherever they lie."""

from dataclasses import replace

import torch

from diffalign.families.flux import FLUX
from diffalign.families.text import Argument
from diffalign.seams.denoiser.rows import take, take_arguments

STATES = torch.arange(2 * 3 * 4.0).reshape(2, 3, 4)


def test_rows_on_the_first_axis_and_on_another():
    assert torch.equal(take(STATES, [1], 2), STATES[1:])
    assert torch.equal(take(STATES, [1, 0, 1], 2), STATES[[1, 0, 1]])
    assert torch.equal(take(STATES, [2, 0], 3, axis=1), STATES[:, [2, 0]])
    assert torch.equal(take(STATES, [1, 2], 3, axis=1), STATES[:, 1:])
    assert take(STATES, [0], 5) is STATES
    assert take(STATES, [0], 5, axis=1) is STATES
    scalar = torch.tensor(1.0)
    assert take(scalar, [0], 1) is scalar


def test_the_family_says_where_rows_lie():
    family = replace(FLUX, text=(Argument("text"), Argument("states", axis=2, rows=1)))
    assert family.row_axes == {"states": 1}
    arguments = {
        "hidden_states": torch.arange(3.0),
        "text": torch.arange(3.0).reshape(3, 1),
        # as many layers as there are rows
        "states": torch.arange(9.0).reshape(3, 3, 1),
        "img_ids": torch.zeros(3, 3),
    }
    changed = take_arguments(arguments, [2, 1], 3, family)
    assert changed["hidden_states"].tolist() == [2.0, 1.0]
    assert changed["text"].tolist() == [[2.0], [1.0]]
    assert torch.equal(changed["states"], arguments["states"][:, [2, 1]])
    assert changed["img_ids"] is arguments["img_ids"]
