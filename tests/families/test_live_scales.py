"""Which pipelines read their guidance scale anew at each step, so that a callback may change it: as
their sources say."""

import inspect
import re

import diffusers
import pytest

from diffalign.families import FAMILIES


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.gates])
def test_a_scale_is_live_where_the_loop_reads_it(name):
    family = FAMILIES[name]
    loop = inspect.getsource(getattr(diffusers, name).__call__).partition("enumerate(timesteps)")[2]
    assert loop, "its loop is written in another way"
    reads = re.search(rf"self\._?({'|'.join(family.gates)})\b", loop)
    assert bool(reads) is family.live_scale
