"""Settings inside a PNG file: one JSON object in a tEXt chunk named ``diffalign``."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

CHUNK = "diffalign"


def save_png(
    image: Image.Image, path: str | os.PathLike[str], settings: Mapping[str, object]
) -> None:
    """Write ``image`` with ``settings`` (JSON: text is escaped to ASCII; infinities and NaN are
    Python's ``Infinity`` and ``NaN``).

    The file appears complete or not at all. Raises: ValueError if the name does not end in .png,
    TypeError if settings are not JSON, OSError if the folder cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(
            "path must end in .png, because the settings travel in a PNG chunk; got "
            f"{target.name!r}."
        )
    try:
        text = json.dumps(dict(settings))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"settings must be JSON values (numbers, text, lists, mappings, None): {error}."
        ) from error
    info = PngInfo()
    info.add_text(CHUNK, text)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        image.save(part, format="PNG", pnginfo=info)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def read_settings(path: str | os.PathLike[str]) -> dict[str, object]:
    """The settings that ``save_png`` wrote.

    Raises: ValueError if the file is no PNG or carries none, OSError if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(CHUNK) if image.format == "PNG" else None
    except UnidentifiedImageError as error:
        raise ValueError(f"{Path(path).name!r} is not an image.") from error
    if not isinstance(text, str):
        raise ValueError(
            f"{Path(path).name!r} carries no diffalign settings. Only a PNG saved by diffalign "
            "does, and editing may strip them."
        )
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"The settings in {Path(path).name!r} are not JSON: {text[:80]!r}."
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"The settings in {Path(path).name!r} must be a JSON object; got {text[:80]!r}."
        )
    return settings
