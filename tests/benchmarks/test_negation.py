"""The negation benchmark's measure of strength, and that a run goes on where it stopped."""

import argparse

import pytest
from rich.progress import Progress

from diffalign.embedded.load import MODELS, load


@pytest.fixture(scope="module")
def negation(benchmark_module):
    return benchmark_module("negation")


@pytest.mark.parametrize("model", ["emoji", "emoji-dit"])
def test_strength_of_plain_guidance_is_its_scale(model, negation, tmp_path):
    """<d - d_n, d_c - d_n> / |d_c - d_n|^2 is 1 without guidance, w under CFG with the negative
    prompt, and nothing is off that line."""
    pipe, judge, options = (
        load(model),
        load(MODELS[model].judge),
        argparse.Namespace(runs_folder=str(tmp_path), steps=3),
    )
    cases = negation.objects()[:2]
    with Progress(disable=True) as bar:

        def collect(**way):
            return negation.collect(
                pipe, judge, negation.Way(steps=3, **way), cases, "object", options, bar
            )

        for scale, records in ((1.0, collect()), (2.5, collect(cfg=2.5, negative=True))):
            assert [r["strength"] for r in records] == pytest.approx([scale] * 2, abs=1e-4)
            assert max(r["off"] for r in records) < 1e-2  # the square root of float32 rounding
        guided = collect(nag=5.0)
        assert all(r["off"] > 0.05 for r in guided)
        lines = next(tmp_path.glob("*/object/NAG-5,-3-steps/records.jsonl"))
        whole = lines.read_text()
        lines.write_text(whole.splitlines()[0] + "\n{torn")
        again = collect(nag=5.0)
        assert again[0] == guided[0]
        assert again[1]["strength"] == pytest.approx(
            guided[1]["strength"], rel=1e-3
        )  # alone in its batch
        assert len(lines.read_text().splitlines()) == 2


def test_cases_are_the_official_prompts(negation):
    cases = negation.objects()
    assert len(cases) == 2 * 99
    assert cases[0].text == f"a photo of a {cases[0].negated}"
    assert len({(c.prompt_id, c.sample) for c in cases}) == len(cases)
