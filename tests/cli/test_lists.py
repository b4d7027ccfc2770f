"""``techniques``, ``models``, ``env``, ``--version`` and ``--help``: complete, light, and the same
as tables and as JSON."""

import json
import re

import pytest
import torch

import diffalign as da
from diffalign.cli.show import to_json
from diffalign.core.option import options_of
from diffalign.core.registry import make
from diffalign.core.values import type_text, value_text
from diffalign.families import FAMILIES, refusals


def test_every_technique_is_listed_with_paper_cost_and_options(run):
    table, data = run("techniques").stdout, json.loads(run("techniques", "--json").stdout)
    assert [entry["name"] for entry in data] == list(da.techniques())
    for entry in data:
        assert entry["name"] in table
        cls = da.techniques()[entry["name"]]
        assert [o["name"].replace("-", "_") for o in entry["options"]] == list(options_of(cls))
        assert re.fullmatch(r".+ \d{4}, arXiv:\d{4}\.\d{5}", entry["paper"]), entry
        assert entry["cost"], entry


def test_printed_defaults_are_what_the_command_line_reads(run):
    """Giving every printed default back makes the technique with its defaults."""
    for entry in json.loads(run("techniques", "--json").stdout):
        options = {o["name"].replace("-", "_"): o["default"] for o in entry["options"]}
        if "required" not in options.values():
            assert make(entry["name"], options) == da.techniques()[entry["name"]]()


def test_one_technique_with_its_documentation(run):
    text = run("techniques", "adaptive-guidance").stdout
    assert "Castillo et al. 2023" in text
    assert re.search(r"threshold\s+\S\s+number or none\s+\S\s+none", text)
    assert re.search(r"space\s+\S\s+eps \| x0 or none\s+\S\s+none", text)


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (float | None, "number or none"),
        (tuple[float, float] | None, "(number, number) or none"),
        (tuple[str, ...], "(text, ...)"),
        (bool, "true | false"),
        (int, "integer"),
    ],
)
def test_types_as_text(hint, text):
    assert type_text(hint) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1"),
        (True, "true"),
        (None, "none"),
        ((0.0, 1.0), "(0,1)"),
        ("eps", "eps"),
        (1, "1"),
        (float("inf"), "inf"),
    ],
)
def test_defaults_as_text(value, text):
    assert value_text(value) == text


def test_techniques_on_a_model(run, folder):
    found = {
        e["name"]: e for e in json.loads(run("techniques", "--model", folder, "--json").stdout)
    }
    assert found["cfg"]["works"]
    assert not found["skip-layer-guidance"]["works"]
    assert "layers" in found["skip-layer-guidance"]["reason"]
    assert "layers" in run("techniques", "--model", folder).stdout


def test_models_lists_embedded_models_and_families(run, emoji):
    data = json.loads(run("models", "--json").stdout)
    assert [m["name"] for m in data["embedded"]] == ["emoji", "emoji-judge"]
    assert sorted(name for names in data["families"].values() for name in names) == sorted(FAMILIES)
    assert data["refused"] == len(refusals())
    table = run("models").stdout
    assert "emoji" in table
    assert all(family in table for family in data["families"])


def test_rewards_lists_every_reward_with_its_facts(run):
    data = json.loads(run("rewards", "--json").stdout)
    table = run("rewards").stdout
    assert [entry["name"] for entry in data] == [info.name for info in da.rewards.available()]
    for entry in data:
        assert entry["name"] in table
        assert entry["what"], entry
    facts = {entry["name"]: entry for entry in data}
    assert facts["image-reward"]["licence"] == "Apache-2.0"
    assert facts["image-reward"]["gradient"]
    assert not facts["ocr"]["gradient"]
    assert facts["hps-v3"]["size"] == "8.3 B"


def test_one_reward_with_its_documentation_and_options(run):
    text = run("rewards", "da-score").stdout
    assert "Singh and Zheng 2023, arXiv:2307.04749" in text
    assert re.search(r"offload\s+\S\s+true \| false", text)
    assert "memory" in text
    result = run("rewards", "clap")
    assert result.exit_code == 2
    assert "unknown reward 'clap'. Nearest: clip" in result.stderr


def test_one_pipeline_class_or_the_reason_against_it(run):
    assert "family sd," in run("models", "StableDiffusionPipeline").stdout
    assert json.loads(run("models", "FluxPipeline", "--json").stdout)["scale"] == ["true_cfg_scale"]
    name, reason = next(iter(refusals().items()))
    result = run("models", name)
    assert result.exit_code == 2
    assert " ".join(reason.split()) in result.stderr


def test_env(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    data = json.loads(run("env", "--json").stdout)
    assert data["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert data["threads"]["torch"] == torch.get_num_threads()
    extras = {"app", "eval", "ocr", "ray", "video", "triton", "xformers"}
    assert set(data["extras"]) == extras
    assert data["kernels"]["triton"] == "not usable: no CUDA device"
    assert data["devices"][-1].startswith("cpu")
    table = run("env").stdout
    assert all(name in table for name in data["packages"])


def test_json_has_no_values_that_json_lacks():
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    value = {"a": float("nan"), "b": [float("inf"), (1.5, -float("inf"))], 3: {"c": None}}
    assert json.loads(to_json(value), parse_constant=refuse) == {
        "a": None,
        "b": [None, [1.5, None]],
        "3": {"c": None},
    }


def test_version_and_help(run):
    assert run("--version").stdout.strip() == da.__version__
    text = run("--help").stdout
    assert all(
        name in text
        for name in ("generate", "compare", "fit", "calibrate", "models", "techniques", "env")
    )
    for command in ("generate", "compare"):
        assert "--technique" in run(command, "--help").stdout


@pytest.mark.parametrize("command", [(), ("fit",), ("calibrate",)])
def test_without_a_command_there_is_help_and_no_complaint(program, command):
    code, out, err = program(*command)
    assert (code, err) == (2, "")
    assert "Usage:" in out
    assert "Commands" in out


def test_program_ends_with_zero(program):
    code, out, err = program("--version")
    assert (code, out.strip(), err) == (0, da.__version__, "")
