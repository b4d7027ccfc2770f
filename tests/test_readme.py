"""README and docs: every Python block of the README runs, every command exists, every technique has its row, every link its file."""

import ast
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from typer.main import get_command

import diffalign as da
from diffalign.cli import app
from diffalign.cli.methods import describe
from diffalign.core.registry import BUILTIN, parse
from diffalign.testing.tiny import tiny_pipeline

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [page for name in ("guidance", "noise_opt", "search", "rewards", "app") if (page := ROOT / name / "README.md").is_file()]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def row_of(name):
    """The README's row of a technique, made from its documentation and its place in the tree."""
    module = BUILTIN[name].partition(":")[0]
    source = module.replace(".", "/") + ".py"
    test = f"tests/{Path(source).parent.name}/test_{Path(source).stem}.py"
    test = test if (ROOT / test).is_file() else str(Path(test).parent)
    facts = describe(name, da.methods()[name])
    return f"| `{name}` | {facts['paper']} | {facts['cost'].partition('. ')[0].rstrip('.')} | [code]({source}) [test]({test}) |"


@pytest.fixture
def models(monkeypatch):
    """Where the embedded model is not installed, a tiny one of random weights takes its place."""
    if not any(model.name == "emoji" for model in import_module("diffalign.embedded").available()):
        monkeypatch.setattr(da, "load", lambda name: tiny_pipeline("StableDiffusionPipeline", text=True))


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
                    assert hasattr(module, alias.name), f"{page.name}: from {node.module} import {alias.name}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "da":
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
            assert words[2] in command.commands, line
            command = command.commands[words[2]]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for i, word in enumerate(words):
            assert not word.startswith("-") or word in known, f"{line}: {word}"
            if word in ("-t", "--technique"):
                parse(words[i + 1].strip('"'))


@pytest.mark.parametrize("name", BUILTIN)
def test_every_technique_has_its_row(name):
    """The cost may be worded freely; paper, code and test are the technique's own. `python tests/test_readme.py` prints the rows."""
    rows = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1, f"the README needs the row {row_of(name)}"
    expected = row_of(name).split(" | ")
    assert rows[0].split(" | ")[1] == expected[1]
    code, test = re.findall(r"\]\((.*?)\)", rows[0])
    assert code in expected[-1]
    assert test.startswith("tests/")


def test_every_row_names_a_technique():
    names = re.findall(r"^\| `([a-z0-9-]+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    assert set(names) == set(BUILTIN)


if __name__ == "__main__":  # the rows of all techniques, to paste into the README
    sys.stdout.write("\n".join(map(row_of, BUILTIN)) + "\n")
