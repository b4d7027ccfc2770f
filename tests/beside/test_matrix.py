"""Every technique beside everything that people have on a pipeline: right, or refused by name."""

import itertools
import traceback

import pytest

from diffalign.core.registry import techniques
from diffalign.testing.beside import NEIGHBOURS
from diffalign.testing.beside.check import beside, is_absent

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]
# one for each way of acting: a pass left out, for some images only, a pass more, inside attention,
# tokens left out
KINDS = ("interval-cfg", "some images", "s2-guidance", "nag", "pladis", "cat")
# the same in short, beside one neighbour of each group; each has broken a technique once, or might
QUICK = ("some images", "s2-guidance", "nag", "cat")
QUICKLY = {
    "IP-Adapter with two pictures",
    "LoRA, loaded",
    "T2I adapter",
    "FirstBlockCache",
    "FasterCache",
    "group offload, blocks",
    "layerwise casting",
    "a data-parallel wrapper",
    "sage",
}
FIRST = [pytest.param(n, id=n.name) for n in NEIGHBOURS if n.name in QUICKLY]
OTHERS = [
    pytest.param(neighbour, pipeline, id=f"{neighbour.name}, {pipeline}")
    for neighbour in NEIGHBOURS
    for pipeline in neighbour.pipelines[1:]
]


def failures(cells, names):
    """What is wrong, one text for each technique."""
    wrong = []
    for name in names:
        try:
            cells.check(name)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            wrong.append(
                f"{name}: {type(error).__name__} {error} ({place.filename}:{place.lineno})"
            )
    return wrong


@pytest.mark.parametrize("neighbour", FIRST)
def test_a_technique_of_each_kind(neighbour, tmp_path):
    with beside(neighbour, neighbour.pipelines[0], tmp_path) as cells:
        assert not failures(cells, QUICK)


@pytest.mark.exhaustive
@pytest.mark.parametrize("neighbour", NEIGHBOURS, ids=lambda neighbour: neighbour.name)
def test_every_technique(neighbour, tmp_path):
    with beside(neighbour, neighbour.pipelines[0], tmp_path) as cells:
        assert not failures(cells, dict.fromkeys([*KINDS, *techniques()]))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("neighbour", "pipeline"), OTHERS)
def test_a_technique_of_each_kind_on_other_families(neighbour, pipeline, tmp_path):
    """And every technique that the first family does not have."""
    absent = [n for n in techniques() if is_absent(n, neighbour.pipelines[0])]
    with beside(neighbour, pipeline, tmp_path) as cells:
        assert not failures(cells, dict.fromkeys([*KINDS, *absent]))


@pytest.mark.exhaustive
def test_the_page_is_what_is_tested(benchmark_module):
    module = benchmark_module("beside")
    page = module.PAGE.read_text(encoding="utf-8")
    assert module.page() == page, "run python benchmarks/beside.py"


def test_a_neighbour_of_every_kind():
    """Groups stand together, names are unique, and refusals name a pipeline that is tried."""
    groups = [group for group, _ in itertools.groupby(n.group for n in NEIGHBOURS)]
    assert len(set(groups)) == len(groups)
    assert len({n.name for n in NEIGHBOURS}) == len(NEIGHBOURS)
    for neighbour in NEIGHBOURS:
        for refusal in neighbour.refusals:
            assert set(refusal.pipelines) <= set(neighbour.pipelines)
            assert any(refusal.meant(name, cls) for name, cls in techniques().items())
