"""Sets of techniques: any valid one composes, in one order whatever the user's; others raise."""

import itertools
import random
from dataclasses import dataclass

import pytest
import torch

import diffalign as da
from diffalign.core import BlockTechnique, Guidance
from diffalign.core.registry import techniques
from diffalign.families import FAMILIES
from diffalign.guidance import PAG, SEG, AutoGuidance
from diffalign.testing.beside.base import BATCH, STEPS, Neighbour, Part, nothing
from diffalign.testing.beside.check import Setting, differences, footprint, is_absent
from diffalign.testing.beside.examples import neutral
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]
FAMILY_NAMES = [
    "StableDiffusionPipeline",
    *(
        pytest.param(name, marks=pytest.mark.exhaustive)
        for name in ("StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline")
    ),
]


@dataclass(frozen=True, slots=True)
class Halved(BlockTechnique[None]):
    """Lets every block do half of what it does."""

    def selects(self, site):
        return site.edge != "context_pre_only"  # tiny models have first and last blocks alone

    def around(self, block, streams, site, step, state):
        return tuple((a + b) / 2 for a, b in zip(streams, block())), state


# what the passes of a guidance change in attention is in the report under its own name
CHANGES = {PAG: "IdentityMaps", SEG: "BlurredQueries"}
TOGETHER = r"both guidances|is given twice"
BLOCKS = "halved blocks"
NAMES = [*techniques(), BLOCKS]


class Room:
    """A tiny pipeline and the techniques that act on its family."""

    def __init__(self, name, folder):
        self.name, self.pipe = name, tiny_pipeline(name)
        self.kind = type(self.pipe)
        neighbour = Neighbour(name="", group="", pipelines=(name,), put=None)
        self.setting = Setting(neighbour, name, self.pipe, nothing, folder)
        self.native = self.setting.run()
        self.before = footprint(self.pipe)
        self.alone = {}

    def make(self, name):
        return Halved() if name == BLOCKS else self.setting.acting(name)

    def present(self):
        return [name for name in NAMES if name == BLOCKS or not is_absent(name, self.name)]

    def run(self, *chosen):
        """The result, the report, and rows that guidances declared and that the denoiser saw."""
        counted, handles, declared = [], [], []
        modules = [getattr(self.pipe, FAMILIES[self.name].denoisers[0])]
        modules += [t.weak for t in chosen if isinstance(t, AutoGuidance)]

        def count(module, args, kwargs):
            names = ("sample", "hidden_states")
            counted.append(len(args[0] if args else kwargs[next(k for k in names if k in kwargs)]))

        for module in modules:
            handles.append(module.register_forward_pre_hook(count, with_kwargs=True))
        try:
            with noted_passes(chosen, declared), da.apply(self.pipe, *chosen) as session:
                result = self.setting.run()
        finally:
            for handle in handles:
                handle.remove()
        return result, session.report(), sum(declared), sum(counted)

    def result_of(self, name):
        """The technique by itself."""
        if name not in self.alone:
            self.alone[name] = self.run(self.make(name))[0]
        return self.alone[name]


class noted_passes:
    """Counts the rows of every pass that a guidance asks for."""

    def __init__(self, chosen, rows):
        self.cls = next((type(t) for t in chosen if isinstance(t, Guidance)), None)
        self.rows = rows

    def __enter__(self):
        if self.cls is None:
            return
        self.passes = passes = self.cls.passes

        def noted(technique, step, state):
            answer = passes(technique, step, state)
            self.rows.append(sum(BATCH if p.rows is None else len(p.rows) for p in answer))
            return answer

        self.direct = "passes" in vars(self.cls)
        self.cls.passes = noted

    def __exit__(self, *_):
        if self.cls is not None and self.direct:
            self.cls.passes = self.passes
        elif self.cls is not None:
            del self.cls.passes


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def room(request, tmp_path_factory):
    return Room(request.param, tmp_path_factory.mktemp("policies"))


def is_valid(names):
    guidances = [n for n in names if n != BLOCKS and issubclass(techniques()[n], Guidance)]
    return len(guidances) <= 1 and len(set(names)) == len(names)


def check_invalid(room, names):
    chosen = [room.make(name) for name in names]
    with pytest.raises(ValueError, match=TOGETHER) as error:
        da.apply(room.pipe, *chosen)
    assert any(type(technique).__name__ in str(error.value) for technique in chosen)
    with pytest.raises(ValueError, match=TOGETHER):  # one in the other
        nested(room.pipe, chosen)
    assert type(room.pipe) is room.kind


def nested(pipe, chosen):
    if chosen:
        with da.apply(pipe, chosen[0]):
            nested(pipe, chosen[1:])


def check_valid(room, names):
    """Rows as declared, every technique in the report, one result for every order."""
    results = []
    for order in (names, names[::-1]):
        result, report, declared, counted = room.run(*map(room.make, order))
        results.append(result)
        assert result.isfinite().all()
        assert report.rows == counted
        assert report.rows == (declared or 2 * STEPS * BATCH) + shape_row(room, names)
        assert report.steps == STEPS
        for acting, selected in report.layers.values():
            assert acting == selected > 0
        kinds = set(map(type, map(room.make, names)))
        others = {kind.__name__ for kind in kinds if not issubclass(kind, Guidance)}
        assert set(report.layers) == others | {CHANGES[kind] for kind in kinds & CHANGES.keys()}
    assert all(torch.equal(results[0], other) for other in results[1:])
    for name in names:
        assert not torch.equal(results[0], room.result_of(name)), f"{name} alone is the same"
    assert not differences(room.before, footprint(room.pipe))


def shape_row(room, names):
    """BetaCFG begins with the unconditional pass: where each branch is a call, one row tells the
    shape of the other."""
    return int("beta-cfg" in names and FAMILIES[room.name].mode == "sequential")


def broken(room, sets):
    wrong = []
    for names in sets:
        try:
            (check_valid if is_valid(names) else check_invalid)(room, names)
        except Exception as error:
            wrong.append(f"{' + '.join(names)}: {type(error).__name__} {error}")
    if not torch.equal(room.setting.run(), room.native):
        wrong.append("the pipeline is no longer what it was")
    return wrong


def test_all_pairs(room):
    assert not broken(room, list(itertools.combinations_with_replacement(room.present(), 2)))


@pytest.mark.exhaustive
def test_two_hundred_triples(room):
    """Every valid triple, and others drawn at random."""
    names, rng = room.present(), random.Random(0)
    valid = [triple for triple in itertools.combinations(names, 3) if is_valid(triple)]
    drawn = [tuple(rng.choice(names) for _ in range(3)) for _ in range(200 - len(valid))]
    assert len(valid) > 50
    assert not broken(room, [*valid, *drawn])


def test_a_technique_that_is_off_leaves_the_others_alone(room):
    """Bit for bit, whichever of the two is off."""
    names = room.present()
    for name in names:
        for other in names:
            if name == other or BLOCKS in (name, other) or not is_valid((name, other)):
                continue
            off, branch = neutral(other) or (None, "")
            if off is None or branch == "cond":
                continue
            if issubclass(techniques()[name], Guidance) or issubclass(
                techniques()[other], Guidance
            ):
                result = room.run(room.make(name), off)[0]
                assert torch.equal(result, room.result_of(name)), f"{name} beside {other} off"


def test_three_sessions_inside_one_another(room):
    """Techniques of outer sessions stay when inner ones close."""
    chosen = [room.make(name) for name in ("apg", "pladis", "nag")]
    inputs = room.setting.neighbour.inputs(room.name, Part())
    with da.apply(room.pipe, chosen[0]):
        with da.apply(room.pipe, chosen[1]):
            with da.apply(room.pipe, chosen[2]):
                three = room.setting.run()
            two = final(room.pipe, inputs)
        one = room.setting.run()
    assert torch.equal(one, room.result_of("apg"))
    assert torch.equal(two, room.run(*chosen[:2])[0])
    assert torch.equal(three, room.run(*chosen)[0])
    assert torch.equal(room.setting.run(), room.native)
