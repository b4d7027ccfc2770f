"""Help, lists of models and ``import diffalign`` answer at once: they load no heavy library."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import diffalign

HEAVY = {"torch", "numpy", "PIL", "diffusers", "transformers", "accelerate", "safetensors"}
HEAVY |= {"open_clip", "triton", "xformers", "scipy", "matplotlib", "gradio"}
COMMANDS = [
    ["--help"],
    ["--version"],
    *(
        [name, "--help"]
        for name in ("generate", "compare", "demo", "check", "models", "rewards", "env")
    ),
    ["eval", "--help"],
    *(["eval", name, "--help"] for name in ("run", "generate", "score", "report")),
    ["fit", "--help"],
    ["fit", "linear-ag", "--help"],
    ["calibrate", "--help"],
    ["calibrate", "adaptive-guidance", "--help"],
    ["models"],
    ["models", "FluxPipeline"],
    ["models", "--json"],
]
SCRIPT = """
import contextlib, io, json, sys
from diffalign.cli import main
loaded = {}
for command in json.loads(sys.argv[1]):
    sys.argv = ["diffalign", *command]
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        main()
    assert shown.getvalue().strip(), command
    loaded[" ".join(command)] = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps(loaded))
"""


def output_of(script, *arguments):
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def loaded():
    """Command -> modules that are loaded after it and those before it in the list."""
    return json.loads(output_of(SCRIPT, json.dumps(COMMANDS)))


@pytest.mark.parametrize("command", [" ".join(command) for command in COMMANDS])
@pytest.mark.few(8)
def test_no_heavy_library_is_loaded(loaded, command):
    assert not set(loaded[command]) & HEAVY


def test_importing_the_package_loads_nothing_else():
    script = "import sys; before = set(sys.modules); import diffalign; print(*sys.modules - before)"
    script = script.replace("sys.modules - before", "(set(sys.modules) - before)")
    ours = {name for name in output_of(script).split() if name.startswith("diffalign")}
    assert ours == {"diffalign"}


def test_public_names_are_those_that_type_checkers_see():
    tree = ast.parse(Path(diffalign.__file__).read_text(encoding="utf-8"))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If)
        and not node.orelse
        and (ast.unparse(node.test) == "TYPE_CHECKING")
    )
    names, wholes = set(), []
    for node in block.body:
        for alias in node.names:
            if alias.name == "*":
                wholes.append(node.module)
            else:
                assert alias.name == alias.asname, "re-export it: from x import y as y"
                names.add(alias.name)
    assert tuple(wholes) == diffalign._WHOLE
    listed = {*diffalign._ROOMS, *(name for group in diffalign._NAMES.values() for name in group)}
    assert names == listed
    assert set(diffalign.__all__) >= listed


def test_star_import_dir_and_unknown_names():
    names: dict[str, object] = {}
    exec("from diffalign import *", names)
    assert set(diffalign.__all__) <= names.keys()
    assert set(diffalign.__all__) <= set(dir(diffalign))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = diffalign.nothing
