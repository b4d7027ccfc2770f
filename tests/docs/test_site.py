"""The site: pages of techniques say what the code and the results say, links lead somewhere, and
the strict build passes without a network."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import diffalign as da
from diffalign.cli.techniques import option_rows

ROOT = Path(__file__).parents[2]
PAIRS = ROOT / "docs" / "pairs"


@pytest.fixture(scope="module")
def pages(docs_module):
    """Technique -> its page."""
    make = docs_module("technique_page").page
    return {name: make(name) for name in da.techniques()}


def test_a_page_has_every_option_of_its_technique(pages):
    for name, text in pages.items():
        for option in option_rows(da.techniques()[name]):
            assert re.search(rf"^\| {re.escape(option['name'])} \|", text, flags=re.M), name


def test_a_page_has_the_stored_figures(pages):
    result = json.loads((ROOT / "benchmarks/results/guidance.json").read_text())
    for row in result["rows"]:
        if row["technique"]:
            gain = row["vs best"]
            assert f"{gain['value']:+.3f} [{gain['low']:+.3f}, " in pages[row["technique"]]
    assert "No benchmark of quality has been run yet." in pages["auto-guidance"]


def test_labels_and_formulas_survive_markdown(docs_module):
    documentation = docs_module("technique_page").documentation

    class Example:
        """Mixes ``a_b * c``.

        Somebody 2025, arXiv:2501.01234. The sum over j<i of x_j*y_j.
        Cost: 2 passes.
        Raises: ValueError.
        """

    first, text, cost, error = documentation(Example)
    assert first == "Mixes ``a_b * c``."
    assert "[arXiv:2501.01234](https://arxiv.org/abs/2501.01234)" in text
    assert r"j&lt;i of x\_j\*y\_j" in text
    assert (cost, error) == ("**Cost:** 2 passes.", "**Raises:** ValueError.")


def test_purposes_have_at_most_ten_words(benchmark_module, monkeypatch):
    readme = benchmark_module("readme")
    assert set(readme.PURPOSES) <= set(da.techniques())
    assert max(len(text.split()) for text in readme.PURPOSES.values()) <= 10
    monkeypatch.delitem(readme.PURPOSES, "cfg")
    assert readme.purpose("cfg").startswith("Mixes both predictions at every step")


def test_pictures_are_small_and_have_their_facts(docs_module):
    facts = json.loads((PAIRS / "facts.json").read_text())
    assert set(facts) == {path.stem for path in PAIRS.glob("*.jpg")}
    assert set(facts) <= set(docs_module("showcase").SHOWS) <= set(da.techniques())
    sizes = [path.stat().st_size for path in PAIRS.glob("*.jpg")]
    assert max(sizes) < 40_000
    assert sum(sizes) < 1_500_000


@pytest.mark.parametrize(
    ("target", "source", "page", "address"),
    [
        ("../diffalign/guidance/apg.py", "guidance/README.md", "guidance.md", "techniques/apg.md"),
        ("embedded.md#emoji", "docs/start.md", "start.md", "embedded.md#emoji"),
        ("docs/embedded.md", "README.md", "index.md", "embedded.md"),
        ("../README.md", "docs/start.md", "results/index.md", "../index.md"),
        ("../LICENSE", "docs/start.md", "start.md", None),
    ],
)
def test_addresses(docs_module, target, source, page, address):
    known = {
        "diffalign/guidance/apg.py": "techniques/apg.md",
        "docs/embedded.md": "embedded.md",
        "README.md": "index.md",
    }
    assert docs_module("links").address(target, source, page, known) == address


def test_links_in_code_are_left_alone(docs_module):
    text = "[a](b.md)\n```python\nx[a](b.md)\n```\n[c](https://c.org) ![d](docs/d.png)"
    known = {"b.md": "sub/b.md", "docs/d.png": "d.png"}
    new = docs_module("links").rewritten(text, "README.md", "index.md", known)
    assert new == text.replace("(b.md)", "(sub/b.md)", 1).replace("docs/d.png", "d.png")


def test_which_pair_is_shown(docs_module):
    """A gain before everything; for what saves, the first that both have right; else the largest
    change."""
    showcase = docs_module("showcase")

    def side(*verdicts, values=(0.0, 0.0, 0.0)):
        images = [SimpleNamespace(image=torch.tensor(value)) for value in values]
        return list(zip(images, verdicts, strict=True))

    plain = side(True, False, True)
    assert showcase.pick(plain, side(True, True, False), saves=False) == 1
    assert showcase.pick(plain, side(True, True, False), saves=True) == 0
    changed = side(True, False, True, values=(0.1, 0.9, -0.2))
    assert showcase.pick(plain, changed, saves=False) == 2
    assert showcase.pick(side(False, False, False), changed, saves=False) == 0
    nothing = side(False, False, False, values=(0.1, 0.9, -0.2))
    assert showcase.pick(side(False, False, False), nothing, saves=False) == 1


@pytest.mark.slow
def test_the_site_builds_strictly_and_fetches_nothing(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    build = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    for name in da.techniques():
        assert (tmp_path / "techniques" / f"{name}.html").is_file()
    # the comment above a field is its documentation
    assert "steps that ran both branches" in (tmp_path / "reference.html").read_text("utf-8")
    for path in tmp_path.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", text)
        places = [place for tag in tags for place in re.findall(r'(?:src|href)="([^"]+)"', tag)]
        assert not [place for place in places if re.match(r"(?:https?:)?//", place)], path.name
