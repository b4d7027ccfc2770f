"""What the package promises as a whole: layout, layers, imports, what a wheel holds, and nothing of
the machine it was written on."""

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import import_module
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

import diffalign

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffalign"
COMPANIONS = ("guidance", "pruning", "noise_opt", "search", "rewards", "app")
# a module may import its own layer and those below it; `testing` is for tests and stands outside,
# and the workshop, which nothing imports, stands on top
LAYERS = (
    ("core", "kernels", "drawing", "tasks"),
    ("families",),
    ("seams",),
    ("embedded",),
    ("guidance", "attention", "pruning", "rewards"),
    ("search", "noise_opt"),
    ("generate", "alignment"),
    ("calibration",),
    ("eval",),
    ("app",),
    ("cli",),
    ("__main__",),
)
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
PARSED = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, nodes):
    """Dotted names that these statements of a module import, relative ones made absolute."""
    package = (
        name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    )
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                [*package[: len(package) + 1 - node.level], *(node.module or "").split(".")]
                if node.level
                else node.module.split(".")
            )
            base = [part for part in base if part]
            yield from (
                ".".join([*base, alias.name]) if base == ["diffalign"] else ".".join(base)
                for alias in node.names
            )


def statements(tree, inside_functions=False):
    """Statements of a module, without those for type checkers only.

    Those inside functions only when asked: they do not run when the module is imported.
    """
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        yield node
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if function and not inside_functions:
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        todo += ast.iter_child_nodes(node)


def part_of(name):
    """The part of the package that a dotted name belongs to: "guidance" for diffalign.guidance.cfg,
    None for the rest of the world."""
    parts = name.split(".")
    return parts[1] if parts[0] == "diffalign" and len(parts) > 1 else None


def test_every_part_has_a_layer():
    parts = {path.relative_to(PACKAGE).parts[0] for path in MODULES if path.parent != PACKAGE}
    assert parts - {"testing"} <= set(LAYER)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_downwards(path):
    mine = "__main__" if "workshop" in path.parts else part_of(name_of(path))
    if mine in (None, "testing"):
        return
    for name in imports(path, statements(PARSED[path], inside_functions=True)):
        other = part_of(name)
        assert name != "diffalign", f"{name_of(path)} imports the whole package"
        if other is not None and other != mine:
            assert other != "testing", f"{name_of(path)} imports test tools: {name}"
            # a room below, or a public name of the package, which lies below cli and app
            level = LAYER.get(other, LAYER["generate"] if other != "__version__" else -1)
            assert level < LAYER[mine], f"{name_of(path)} imports sideways or upwards: {name}"


@pytest.mark.parametrize(
    "path", [path for path in MODULES if part_of(name_of(path)) == "tasks"], ids=name_of
)
def test_tasks_are_rules_on_plain_values(path):
    """They know no model, no image and no tensor: the standard library and each other."""
    names = set(imports(path, ast.walk(PARSED[path])))
    others = {name for name in names if part_of(name) != "tasks"}
    assert {name.split(".")[0] for name in others} <= sys.stdlib_module_names


def test_nothing_imports_the_workshop():
    """Training and its reports stand apart: whoever uses a model never loads what trained it."""
    for path, tree in PARSED.items():
        if "workshop" not in path.parts:
            names = imports(path, ast.walk(tree))
            assert not [name for name in names if "workshop" in name.split(".")], name_of(path)


def test_make_embedded_runs_modules_of_the_workshop():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (room,) = re.findall(r"^TRAIN := \$\(PY\) -m (\S+)$", text, flags=re.M)
    programs = {f"{room}.{name}" for name in re.findall(r"\$\(TRAIN\)\.(\w+)", text)}
    assert programs
    assert programs <= {name_of(path) for path in MODULES}


@pytest.mark.parametrize(
    "path", [path for path in MODULES if part_of(name_of(path)) == "core"], ids=name_of
)
def test_core_imports_torch_and_nothing_of_ours_even_inside_functions(path):
    ours = {
        part_of(name)
        for name in imports(path, ast.walk(PARSED[path]))
        if name.startswith("diffalign")
    }
    assert ours <= {"core"}
    others = (
        {name.split(".")[0] for name in imports(path, statements(PARSED[path]))}
        - sys.stdlib_module_names
        - {"diffalign"}
    )
    assert others <= {"torch", "PIL"}


def test_importing_diffalign_loads_no_model_library():
    code = "import sys, diffalign; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )
    assert not loaded & {
        "diffusers",
        "transformers",
        "accelerate",
        "open_clip",
        "triton",
        "gradio",
        "typer",
        "rich",
        "xformers",
        "scipy",
        "matplotlib",
    }


def test_importing_the_command_line_loads_no_model_library():
    code = (
        "import sys, diffalign.cli; print(*sorted({name.partition('.')[0] for name in "
        "sys.modules}))"
    )
    loaded = set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )
    assert not loaded & {
        "diffusers",
        "transformers",
        "accelerate",
        "open_clip",
        "triton",
        "gradio",
        "xformers",
        "scipy",
        "matplotlib",
    }


def test_every_public_name_exists():
    assert len(set(diffalign.__all__)) == len(diffalign.__all__)
    for name in diffalign.__all__:
        assert getattr(diffalign, name) is not None
    for path in PACKAGE.glob("*/__init__.py"):
        module = import_module(name_of(path))
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{module.__name__}.{name}"


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.name != "__main__.py"], ids=name_of
)
def test_every_module_can_be_imported(path):
    if find_spec("triton") or "triton" not in imports(path, statements(PARSED[path])):
        import_module(name_of(path))


def test_third_party_imports_are_declared():
    """Whatever the package imports, even inside a function, is declared."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    declared = {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in lines}
    distributions = packages_distributions()
    for path, tree in PARSED.items():
        for top in (
            {name.split(".")[0] for name in imports(path, ast.walk(tree))}
            - sys.stdlib_module_names
            - {"diffalign"}
        ):
            found = {name.lower().replace("_", "-") for name in distributions.get(top, [top])}
            extra = {"huggingface-hub", "tokenizers"}  # of diffusers and transformers
            assert found & (declared | extra), (
                f"{name_of(path)} imports {top}, which pyproject.toml does not declare"
            )


def test_companion_folders_are_no_packages():
    for name in COMPANIONS:
        assert not list((ROOT / name).rglob("__init__.py")), name
        assert (ROOT / name / "README.md").is_file(), name


def files_of_the_project():
    """Files that git would commit, or everything of a source archive."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [
            ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()
        ]
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file() and not {".git", ".venv", ".venv-ci", "runs"} & set(path.parts)
    ]


def test_no_machine_paths():
    """No path of the machine it was written on, and no package index."""
    trees = ("work", "root", "tmp", "home", "mnt", "opt")
    machine = re.compile(
        rf"(?<![\w.~}}])/(?:{'|'.join(trees)})/\w"
        r"|\b(?:pypi|registry)\.[a-z.-]+\.(?:com|net|org|io)\b|/simple/?\b"
    )
    # the tests' own arguments, and files that are other people's text
    for path in files_of_the_project():
        data = path.read_bytes()
        if (
            b"\0" in data[:8192]
            or "data" in path.parts
            or "models" in path.parts
            or path == Path(__file__)
        ):
            continue
        found = machine.search(data.decode("utf-8", errors="replace"))
        assert found is None, f"{path.relative_to(ROOT)} holds {found[0]!r}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_line_is_above_100_columns(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 100]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_and_classes_are_short(path):
    """A function has at most 60 lines, a class 150 lines and 15 attributes."""
    too_long = []
    for node in ast.walk(PARSED[path]):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        length = node.end_lineno - node.lineno + 1
        if length > (150 if isinstance(node, ast.ClassDef) else 60):
            too_long.append(f"{node.name} has {length} lines")
        if isinstance(node, ast.ClassDef) and len(names := attributes(node)) > 15:
            too_long.append(f"{node.name} has {len(names)} attributes: {', '.join(sorted(names))}")
    assert not too_long


def attributes(cls):
    """Names that a class annotates or assigns in its body, and those that its methods assign on
    their first parameter; inherited ones do not count."""
    names = set()
    for node in cls.body:
        if isinstance(node, ast.AnnAssign):
            names.add(ast.unparse(node.target))
        elif isinstance(node, ast.Assign):
            names |= {ast.unparse(target) for target in node.targets}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.args.args:
            me = node.args.args[0].arg
            names |= {
                part.attr
                for part in ast.walk(node)
                if isinstance(part, ast.Attribute)
                and isinstance(part.ctx, ast.Store)
                and isinstance(part.value, ast.Name)
                and part.value.id == me
            }
    return names - {"__slots__", "__match_args__", "__hash__"}


def test_no_file_is_a_rest():
    for path in PACKAGE.rglob("*"):
        assert path.name not in ("utils.py", "helpers.py", "misc.py", "common.py"), path


def test_techniques_are_frozen_dataclasses_with_one_positional_option():
    import dataclasses
    import inspect

    for name, cls in diffalign.techniques().items():
        assert dataclasses.is_dataclass(cls), name
        assert cls.__dataclass_params__.frozen, name
        positional = [
            p.name
            for p in inspect.signature(cls).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        assert positional in ([], ["scale"], ["strength"], ["keep"]) or len(positional) == 1, (
            name,
            positional,
        )


def test_any_is_rare_outside_the_seams():
    """Where diffusers' own objects are not touched, values have types: the word ``Any`` is counted
    wherever it stands, imports and prose too."""
    rooms = (PACKAGE / "families", PACKAGE / "seams")
    files = [p for p in PACKAGE.rglob("*.py") if not any(room in p.parents for room in rooms)]
    counts = {p: len(re.findall(r"\bAny\b", p.read_text("utf-8"))) for p in files}
    most = sorted(counts, key=counts.__getitem__, reverse=True)[:5]
    assert sum(counts.values()) <= 250, [(p.name, counts[p]) for p in most]


@pytest.mark.slow
def test_wheel_built_from_the_source_archive_is_the_package(tmp_path):
    """The archive builds, and the wheel built from it has one top-level package with every module
    and data file of the tree."""
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(ROOT),
    ]
    built = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PIP_NO_INDEX": "1"}
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,), (archive,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    assert {name.split("/")[0] for name in held if ".dist-info/" not in name} == {"diffalign"}
    tree = {
        p.relative_to(ROOT).as_posix()
        for p in PACKAGE.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts and p.suffix != ".pyc"
    }
    assert {name for name in held if name.startswith("diffalign/")} == tree
    assert "diffalign/py.typed" in held
    # a stranger's folder, with the package from the wheel alone
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    (entries,) = (tmp_path / "installed").glob("*.dist-info/entry_points.txt")
    assert "diffalign = diffalign.cli:main" in entries.read_text("utf-8")
    away = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-m", "diffalign", "models", "--json"]
    listed = subprocess.run(
        command, capture_output=True, text=True, env=away, cwd=tmp_path, check=True
    )
    from diffalign.embedded.load import MODELS

    assert [model["name"] for model in json.loads(listed.stdout)["embedded"]] == list(MODELS)
    assert any(name.endswith("licenses/LICENSE") for name in held)
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "tests/test_package.py",
        "Makefile",
        "constraints.txt",
    } <= names
    assert not [
        name
        for name in names
        if name.split("/")[0] in ("runs", "outputs", ".venv", ".venv-ci", "dist")
    ]
    assert wheel.stat().st_size < 100e6, "the embedded models may take 100 MB together"
