"""The page of the example scripts: what each prints, and its code."""

import ast
from pathlib import Path

FILES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
HEAD = """# Examples

Each script solves a whole problem on the embedded models, on a CPU, in seconds. Put your own
pipeline in the place of `da.load(...)`.
"""


def page() -> str:
    """All scripts, one section each."""
    return "\n".join([HEAD, *map(section, FILES)])


def section(path: Path) -> str:
    """A script: its documentation as text, then the code."""
    text = path.read_text(encoding="utf-8")
    documentation = ast.get_docstring(ast.parse(text)) or ""
    title, _, rest = documentation.partition("\n\n")
    body = ast.parse(text).body[1:]
    code = "\n".join(text.splitlines()[body[0].lineno - 1 :])
    name = f"examples/{path.name}"
    return f"## {title.rstrip('.')}\n\n`python {name}`\n\n{rest}\n\n```python\n{code}\n```\n"
