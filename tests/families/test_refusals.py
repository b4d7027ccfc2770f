"""The refusal table: every exported pipeline class has a row or a reason, and the reasons are true
of the installed sources."""

import inspect
import re
from collections.abc import Iterator

import diffusers
import pytest
from diffusers import DiffusionPipeline, ModularPipeline

from diffalign.core import UnsupportedModel
from diffalign.families import FAMILIES, family_of, modular_families, refusals


def exported() -> Iterator[tuple[str, type]]:
    """Every pipeline class diffusers exports, those with a missing optional dependency included;
    the abstract base is not one."""
    for name in dir(diffusers):
        # where onnxruntime is installed, diffusers lists a class that it does not define
        found = getattr(diffusers, name, type(None))
        if not inspect.isclass(found) or found is DiffusionPipeline:
            continue
        undefined = found is type(None) or "dummy" in found.__module__
        absent = undefined and "Pipeline" in name
        if absent or issubclass(found, (DiffusionPipeline, ModularPipeline)):
            yield name, found


EXPORTED = dict(exported())


def source(name: str) -> str:
    return re.sub(r"\s+", " ", inspect.getsource(EXPORTED[name]))


def test_every_exported_class_has_a_row_or_a_reason_and_not_both() -> None:
    assert len(EXPORTED) > 300
    known = set(FAMILIES)
    assert set(EXPORTED) - known - set(refusals()) == set()
    assert set(refusals()) & known == set()
    assert set(refusals()) - set(EXPORTED) == set()


def test_reasons_are_one_specific_sentence_each() -> None:
    for name, reason in refusals().items():
        assert 25 < len(reason) < 240, name
        assert reason.endswith("."), name
        assert name not in reason, name


def test_modular_classes_are_sent_to_guiders_where_these_exist() -> None:
    for name, reason in refusals().items():
        served = name in modular_families()
        assert ("da.guider(technique, pipe)" in reason) is served, name
        if served:
            with pytest.raises(UnsupportedModel, match=r"guider=da\.guider\(technique, pipe\)"):
                family_of(EXPORTED[name])
    assert len(modular_families()) > 4


def test_classes_named_as_alternatives_can_be_used() -> None:
    for name, reason in refusals().items():
        for other in re.findall(r"\w+Pipeline\b", reason):
            assert other in EXPORTED, (name, other)
        for other in re.findall(
            r"(?:use|use the plain|as|as in|of) (\w+Pipeline)\b", reason
        ) + re.findall(r"(\w+Pipeline) is supported", reason):
            assert other in set(FAMILIES), (name, other)


@pytest.mark.parametrize(
    ("mark", "pattern"),
    [
        ("three-way batch", r"chunk\((\( ?)?3"),
        ("guider component (pipe.guider)", r"guider"),
        ("perturbed-attention", r"_apply_perturbed_attention_guidance"),
        ("guidance-distilled: the scale is", r"guidance_scale|guidance"),
        ("the U-Net also predicts a variance", r"variance"),
        ("torch.lerp", r"torch\.lerp"),
        ("video and audio", r"audio"),
    ],
)
def test_reasons_of_a_kind_are_found_in_the_source(mark: str, pattern: str) -> None:
    named = [
        name
        for name, reason in refusals().items()
        if mark in reason and not reason.startswith("modular")
    ]
    assert named
    for name in named:
        assert re.search(pattern, source(name)), name


def test_modular_classes_are_refused_for_being_modular() -> None:
    for name, found in EXPORTED.items():
        if issubclass(found, ModularPipeline):
            assert "modular" in refusals()[name], name
        elif name in refusals():
            assert "modular" not in refusals()[name], name


def test_classes_without_any_guidance_are_not_called_untested() -> None:
    """ "Not tested yet" promises that a row could exist: the source must then mix two branches
    somewhere."""
    mixes = re.compile(r"(uncond|neg)\w* \+ \w|chunk\(2|noise_pred - neg|lerp|pos - neg")
    for name, reason in refusals().items():
        if "not tested yet" in reason and "dummy" not in EXPORTED[name].__module__:
            assert mixes.search(source(name)), name
