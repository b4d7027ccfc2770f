"""The most memory that a block took."""

import sys

import numpy as np
import torch

from diffalign.core import memory
from diffalign.core.memory import Peak

MIB = 2**20


def filled(mebibytes):
    block = np.ones(mebibytes * MIB, dtype=np.uint8)
    assert block.sum() == block.size


def test_a_peak_that_is_gone_again_is_seen_and_the_next_block_begins_anew():
    with Peak(torch.device("cpu")) as large:
        filled(256)
    with Peak(torch.device("cpu")) as small:
        filled(8)
    if large.more is None:  # nobody counts here
        assert sys.platform != "linux"
        return
    assert 250 * MIB < large.more < 400 * MIB
    assert small.more < 100 * MIB
    assert large.bytes > large.more


def test_nothing_is_said_where_the_system_counts_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "nowhere" / "clear_refs")
    with Peak(torch.device("cpu")) as peak:
        pass
    assert peak.bytes is peak.more is None
    with Peak(torch.device("meta")) as peak:
        pass
    assert peak.bytes is None
