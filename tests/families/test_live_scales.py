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
    source = inspect.getsource(getattr(diffusers, name).__call__)
    loop = re.search(r"\n +for .* in .*timesteps(, \*\*\w+)?\)*:\n", source)
    assert loop, "its loop is written in another way"
    reads = re.search(rf"self\._?({'|'.join(family.gates)})\b", source[loop.end() :])
    assert bool(reads) is family.live_scale
