"""Scale, orthogonal part and cosine of steps, with numbers that are worked out by hand."""

import pytest
import torch

from diffalign.seams.denoiser import branch_log
from diffalign.seams.denoiser.branch_log import BranchLog


def images(*vectors):
    return torch.tensor(vectors)[:, :, None, None]


# d_c - d_n is (2, 0) in the first image and (0, 2) in the second
COND, UNCOND = images((3.0, 1.0), (1.0, 3.0)), images((1.0, 1.0), (1.0, 1.0))
# d - d_n is (6, 2): 3 along the line and 1 off it; and (0, 10): 5 along and 0 off
GUIDED = images((7.0, 3.0), (1.0, 11.0))
# 4 / (sqrt 10 sqrt 2) in both
COSINE = 0.894427


def near(values):
    return pytest.approx(values, abs=1e-5)


def test_a_step_is_the_mean_of_its_images():
    log = BranchLog()
    log.record(0, COND, UNCOND, GUIDED, None)
    scale, orthogonal, cosine = log.columns(1)
    assert scale == near([4.0])
    assert orthogonal == near([0.5])
    assert cosine == near([COSINE])


@pytest.mark.parametrize("pending", [0, 1 << 20])
def test_steps_stand_apart_whether_they_wait_or_not(monkeypatch, pending):
    monkeypatch.setattr(branch_log, "PENDING", pending)
    log = BranchLog()
    log.record(0, COND[:1], UNCOND[:1], GUIDED[:1], None)
    log.record(2, COND, UNCOND, GUIDED, None)
    log.record(3, COND[1:], UNCOND[1:], GUIDED[1:], None)
    scale, orthogonal, cosine = log.columns(5)
    assert [scale[i] for i in (0, 2, 3)] == near([3.0, 4.0, 5.0])
    assert [orthogonal[i] for i in (0, 2, 3)] == near([1.0, 0.5, 0.0])
    assert [cosine[i] for i in (0, 2, 3)] == near([COSINE] * 3)
    for column in (scale, orthogonal, cosine):  # one branch ran alone
        assert column[1] is column[4] is None


def test_the_cosine_is_taken_in_the_space_of_the_pair():
    log = BranchLog()
    pair = images((1.0, 0.0), (1.0, 0.0)), images((0.0, 1.0), (-2.0, 0.0))
    log.record(0, COND, UNCOND, GUIDED, pair)
    scale, orthogonal, cosine = log.columns(1)
    assert (scale, orthogonal) == (near([4.0]), near([0.5]))
    assert cosine == near([-0.5])  # mean of 0 and -1


def test_branches_that_agree_have_a_cosine_and_no_scale():
    log = BranchLog()
    log.record(0, UNCOND * (1 + 1e-7), UNCOND, GUIDED, None)
    # the second image alone has a direction
    log.record(1, torch.cat((UNCOND[:1], COND[1:])), UNCOND, GUIDED, None)
    scale, orthogonal, cosine = log.columns(2)
    assert scale[0] is orthogonal[0] is None
    assert scale[1] == near(5.0)
    assert orthogonal[1] == near(0.0)
    assert cosine == near([1.0, (1.0 + COSINE) / 2])


def test_a_prediction_that_is_overwritten_later_was_copied():
    log, cond = BranchLog(), COND.clone()
    log.record(0, cond, UNCOND, GUIDED, None)
    cond.zero_()
    assert log.columns(1)[0] == near([4.0])


def test_nothing_recorded():
    assert BranchLog().columns(0) == ([], [], [])
    assert BranchLog().columns(2) == ([None, None],) * 3
