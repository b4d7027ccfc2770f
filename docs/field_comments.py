"""Fields of classes are documented by the comment above them: this makes it their documentation."""

from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Reads the comment above an attribute that has no text of its own."""

    def on_attribute(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Take the comment as the attribute's docstring."""
        path = attr.filepath
        if attr.docstring or attr.lineno is None or isinstance(path, list):
            return
        lines = attr.lines_collection[path]
        words: list[str] = []
        for line in reversed(lines[: attr.lineno - 1]):
            text = line.strip()
            if not text.startswith("#"):
                break
            words.insert(0, text.lstrip("# "))
        if words:
            attr.docstring = griffe.Docstring(" ".join(words), parent=attr)
