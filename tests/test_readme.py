"""README and docs: every Python block of the README runs, every command exists, every technique has
its row, every link its file."""

import ast
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from typer.main import get_command

import diffalign as da
from diffalign.cli import app
from diffalign.core.registry import parse, techniques
from diffalign.testing.tiny import tiny_pipeline

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [
    page
    for name in ("guidance", "pruning", "noise_opt", "search", "rewards", "app")
    if (page := ROOT / name / "README.md").is_file()
]


def blocks(page, language):
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S
    )


@pytest.fixture
def models(monkeypatch):
    """Where the embedded model is not installed, a tiny one of random weights takes its place."""
    if not any(model.name == "emoji" for model in import_module("diffalign.embedded").available()):
        monkeypatch.setattr(
            da, "load", lambda name: tiny_pipeline("StableDiffusionPipeline", text=True)
        )


def test_python_of_the_readme_runs(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = blocks(ROOT / "README.md", "python")
    assert found
    for code in found:
        assert len([line for line in code.splitlines() if line.strip()]) <= 12
        before = torch.get_rng_state()
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
        assert torch.equal(before, torch.get_rng_state())
    printed = capsys.readouterr().out
    assert "adaptive-guidance" in printed
    assert re.search(r"guided \d+ of \d+ steps", printed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_of_every_page_is_python_and_its_imports_exist(page):
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffalign"):
                module = import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), (
                        f"{page.name}: from {node.module} import {alias.name}"
                    )
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "da"
            ):
                assert hasattr(da, node.attr), f"{page.name}: da.{node.attr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_every_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_of_every_page_exist(page):
    program = get_command(app)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for line in "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = re.findall(r'"[^"]*"|\S+', line.partition("#")[0])
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        if words[:1] != ["diffalign"]:
            continue
        assert words[1] in program.commands, line
        command = program.commands[words[1]]
        if hasattr(command, "commands"):
            # `diffalign eval geneval` is short for `diffalign eval run geneval`
            name = words[2] if words[2] in command.commands else "run"
            assert name in command.commands, line
            command = command.commands[name]
        known = {
            option
            for parameter in command.params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        for i, word in enumerate(words):
            assert not word.startswith("-") or word in known, f"{line}: {word}"
            if word in ("-t", "--technique"):
                parse(words[i + 1].strip('"'))


@pytest.mark.parametrize("name", ["README.md", "guidance/README.md", "search/README.md"])
def test_the_tables_are_what_the_results_say(benchmark_module, name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert benchmark_module("readme").render(name, text) == text, "run python benchmarks/readme.py"


def test_a_changed_result_changes_the_tables(benchmark_module, tmp_path, monkeypatch):
    """Every cell of a measured technique comes from the numbers of the result files."""
    readme = benchmark_module("readme")
    estimate = {"value": -0.123, "low": -0.2, "high": -0.1, "n": 200}
    names = {"apg": "APG 9", "adaptive-guidance": "AG", "linear-ag": "L"}
    rows = [
        {
            "technique": name,
            "method": method,
            "scale": 9.0,
            "NFE": 30.0,
            "vs best": estimate,
            "vs CFG at its scale": estimate,
            "second judge vs best": estimate,
        }
        for name, method in names.items()
    ]
    rows.append({"technique": None, "method": "CFG 2", "NFE": 40.0})
    data = {"rows": rows, "units": {}, "facts": {"best": "CFG 2"}}
    (tmp_path / "guidance.json").write_text(json.dumps(data))
    found = {"rows": [], "units": {}, "facts": {}}
    share = {"emoji-judge: all": {"one": 0.5}}
    found["facts"]["from one image to the best"] = share
    for method in ("best-of-n", "beam, svdd"):
        found["rows"].append({"method": method, "NFE": 800, "judge": estimate | {"value": 0.75}})
    (tmp_path / "search.json").write_text(json.dumps(found))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    cells = readme.row_of("apg")
    assert cells[3:6] == ["30", "-0.123 [-0.200, -0.100]", "–"]
    assert cells[6].startswith("APG 9: Leave it off: -0.123 against")
    assert "Not measured yet." in readme.row_of("tcfg")
    short = readme.by_purpose()
    assert "| 25% fewer evaluations | -0.123 [-0.200, -0.100] |" in short
    assert "| -0.123 [-0.200, -0.100] over plain at scale 9 |" in short
    assert short.count("| 20 times as many | right images 50% to 75% |") == 2
    assert readme.short("tcfg")[1:] == ["2 passes per step", "not measured yet"]
    assert readme.costs("tcfg") == "2 passes per step"


def test_the_second_model_has_its_column(benchmark_module, tmp_path, monkeypatch):
    """A difference to the best plain scale, or to plain guidance at a scale that is too strong; in
    the README without its interval."""
    readme = benchmark_module("readme")
    estimates = {
        key: {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 200}
        for key, value in (("vs best", -0.2), ("vs CFG at its scale", 0.05), ("score", 0.4))
    }
    estimates["second judge vs best"] = estimates["vs best"]
    ways = {"apg": ("APG 4", 4.0), "adaptive-guidance": ("AG", 2.5), "cfg-zero-star": ("Z", 2.5)}
    rows = [
        {"technique": name, "method": method, "scale": scale, "NFE": 30.0} | estimates
        for name, (method, scale) in ways.items()
    ]
    plain = (("CFG 2.5", 2.5), ("CFG 1", 1.0))
    rows += [
        {"technique": None, "method": m, "scale": s, "NFE": 40.0} | estimates for m, s in plain
    ]
    data = json.dumps({"rows": rows, "units": {}, "facts": {"best": "CFG 2.5"}})
    (tmp_path / "emoji-dit").mkdir()
    for folder in (tmp_path, tmp_path / "emoji-dit"):
        (folder / "guidance.json").write_text(data)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.on_flow("apg") == "+0.050 [-0.050, +0.150] over plain at scale 4"
    assert readme.on_flow("adaptive-guidance") == "-0.200 [-0.300, -0.100]"
    assert readme.on_flow("cfg") == "0.400 at scale 2.5, the best; 0.400 without guidance"
    assert readme.on_flow("tcfg") == "–"
    flow_only = readme.row_of("cfg-zero-star")
    assert flow_only[3:6] == ["30", "–", "-0.200 [-0.300, -0.100]"]
    told = "Flow models only, so not on `emoji`. `emoji-dit`, Z: Leave it off: -0.200 against"
    assert flow_only[6].startswith(told)
    short = readme.outcome("adaptive-guidance")
    assert short == "-0.200 [-0.300, -0.100]; `emoji-dit` -0.200"
    repaired = "+0.050 [-0.050, +0.150] over plain at scale 4; `emoji-dit` +0.050"
    assert readme.outcome("apg") == repaired


def test_figures_about_negation(benchmark_module):
    """The share of NAG beside that of CFG at its strength, by hand from the stored rows."""
    readme = benchmark_module("readme")
    data = json.loads((ROOT / "benchmarks/results/negation.json").read_text())
    rows = {row["method"]: row for row in data["rows"] if row["negated"] == "object"}
    equal = rows["NAG 5"]["CFG's negative prompt at equal strength"]
    shares = [round(100 * rows[name]["gone and kept"]["value"]) for name in ("NAG 5", equal)]
    text = f"obeyed in {shares[0]}%; CFG's negative prompt, equally strong: {shares[1]}%"
    assert text in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"NAG 5: {text}." in readme.row_of("nag")


def test_the_readme_is_short():
    """At most 800 words; at most four columns in a table, and no cell over 80 characters."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 800
    for line in re.findall(r"^\|.*\|$", text, flags=re.M):
        cells = line.strip("|").split("|")
        assert len(cells) <= 4, line
        assert max(map(len, map(str.strip, cells))) <= 80, line


def test_every_row_names_a_technique():
    pages = [(ROOT / name / "README.md").read_text("utf-8") for name in ("guidance", "pruning")]
    names = re.findall(r"^\| \[`([a-z0-9-]+)`\]", "\n".join(pages), flags=re.M)
    assert sorted(names) == sorted(techniques())
    short = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`(\w+)`\]\((\S+)\)", short, flags=re.M)
    assert rows
    for name, path in rows:
        assert getattr(da, name).__module__.replace(".", "/") + ".py" == path
    assert f"[All {len(techniques())}](guidance/README.md)" in short
