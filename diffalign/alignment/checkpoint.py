"""A run's folder: what it is in ``run.json``, where it stands in ``state.pt``.

The state is read back without running code of the file: besides tensors and plain values only
dataclasses of modules that are loaded already are allowed in it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch

from diffalign.core.types import Json

RUN, STATE = "run.json", "state.pt"


class Folder:
    """The folder of one run; it appears with the first state, once nothing can refuse the run.

    Raises: ValueError where another run's folder is given, with what differs, and for a place where
    no folder can be.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Json) -> None:
        self.path = Path(path)
        self.text = json.dumps(identity, indent=2, sort_keys=True, default=str)
        place = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not place.is_dir():
            raise ValueError(f"folder={str(path)!r}: {str(place)!r} is a file; give a folder.")
        if not os.access(place, os.W_OK):
            raise ValueError(f"folder={str(path)!r} cannot be written; give another folder.")
        if (self.path / RUN).exists():
            self._compare(json.loads((self.path / RUN).read_text("utf-8")))

    def _compare(self, other: Json) -> None:
        same: Json = json.loads(self.text)
        absent = sorted(same.keys() - other.keys() - {"clip"})
        if absent:
            raise ValueError(
                f"folder={str(self.path)!r} holds a run of an earlier diffalign, which did not "
                f"note {', '.join(absent)}: nobody can say whether this is the same run. Give "
                "another folder."
            )
        keys = sorted(key for key in {**other, **same} if other.get(key) != same.get(key))
        if keys:
            raise ValueError(
                f"folder={str(self.path)!r} holds another run: {', '.join(keys)} differ. Give "
                "another folder, or the settings of that run to continue it."
            )

    def load(self) -> dict[str, Any] | None:
        """What ``save`` wrote, None where the run has not come that far.

        Raises: ValueError for a file that cannot be read.
        """
        file = self.path / STATE
        if not file.exists():
            return None
        try:
            with open(file, "rb") as stream:
                classes = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
                with torch.serialization.safe_globals([_class(name) for name in classes]):
                    state: dict[str, Any] = torch.load(stream, "cpu", weights_only=True)
        except Exception as error:  # torch and pickle have many
            raise ValueError(
                f"{STATE} in {str(self.path)!r} cannot be read ({error}); delete it to start anew."
            ) from error
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state; the file is always whole, the one before or this one."""
        if not (self.path / RUN).exists():
            self.path.mkdir(parents=True, exist_ok=True)
            _write(self.path / RUN, self.text.encode())
        part = self.path / f".{STATE}.{os.getpid()}.part"
        try:
            torch.save(dict(state), part)
            part.replace(self.path / STATE)
        finally:
            part.unlink(missing_ok=True)


def _class(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    value = getattr(sys.modules.get(module), attribute, None)
    if not (isinstance(value, type) and is_dataclass(value)):
        raise ValueError(f"{name} is not a dataclass of a loaded module")
    return value


def _write(file: Path, data: bytes) -> None:
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
