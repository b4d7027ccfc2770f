"""The state of a trajectory: all that belongs to an image travels with it."""

import pytest
import torch

from diffalign.core.sampler import State


class History:
    def __init__(self, values):
        self.values = values

    def select(self, rows):
        return History([self.values[row] for row in rows])


def state(**changes):
    fields = {
        "latents": torch.arange(3.0).reshape(3, 1) * 10,
        "step": 2,
        "count": 5,
        "rng": tuple(torch.tensor([i]) for i in range(3)),
        "scheduler": History(["a", "b", "c"]),
        "techniques": {"apg": History([4, 5, 6]), "cfg": None},
    }
    return State(**fields | changes)


def test_every_part_is_selected_in_the_same_order():
    before = state()
    after = before.select([2, 0, 2])
    assert after.latents.tolist() == [[20.0], [0.0], [20.0]]
    assert [int(rng) for rng in after.rng] == [2, 0, 2]
    assert after.scheduler.values == ["c", "a", "c"]
    assert after.techniques["apg"].values == [6, 4, 6]
    assert after.techniques["cfg"] is None
    assert (after.step, after.count) == (2, 5)
    assert before.latents.tolist() == [[0.0], [10.0], [20.0]]
    assert before.scheduler.values == ["a", "b", "c"]


def test_the_copy_shares_no_memory_with_the_state():
    before = state()
    after = before.select([0, 1, 2])
    after.latents.add_(1)
    assert before.latents.tolist() == [[0.0], [10.0], [20.0]]


def test_a_state_before_the_first_step_has_no_history():
    after = state(scheduler=None, techniques=None).select([1])
    assert after.scheduler is None
    assert after.techniques == {}
    assert after.latents.tolist() == [[10.0]]


@pytest.mark.parametrize(("step", "finished"), [(0, False), (4, False), (5, True), (6, True)])
def test_a_trajectory_is_finished_after_its_last_evaluation(step, finished):
    assert state(step=step).finished is finished
