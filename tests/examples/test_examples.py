"""The example scripts run on the embedded models and print what their documentation says."""

import ast
import re
import runpy
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples").glob("*.py"))
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def promise(path):
    """What a script says that it prints."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return textwrap.dedent(text.partition("It prints:\n\n")[2]).strip().splitlines()


def test_there_are_five_and_each_is_short():
    assert len(FILES) == 5
    for path in FILES:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 60
        assert promise(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_prints_what_it_says(path, monkeypatch, tmp_path, capsys):
    """Words exactly; numbers may differ where a processor rounds otherwise."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    runpy.run_path(str(path), run_name="__main__")
    assert torch.equal(torch.get_rng_state(), before)
    printed = capsys.readouterr().out.strip().splitlines()
    assert [NUMBER.sub("N", line) for line in printed] == [
        NUMBER.sub("N", line) for line in promise(path)
    ]
