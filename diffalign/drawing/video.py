"""Video files: GIF by Pillow, MP4 by PyAV (the extra ``video``), and frames out of either."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageSequence

Frames = Sequence[Image.Image]
RATE = 8
"""Frames a second where nobody says how many."""
NEEDS_PYAV = "PyAV is not installed; pip install 'diffalign[video]'"


def has_pyav() -> bool:
    """Whether MP4 files can be written and read."""
    return find_spec("av") is not None


def save_gif(frames: Frames, path: str | os.PathLike[str], rate: float = RATE) -> None:
    """Write frames as a GIF that repeats; each has up to 256 colours of its own.

    The file appears complete or not at all. Raises: ValueError without frames or for another rate.
    """
    data = gif(frames, rate)
    _whole(Path(path), lambda part: _write(part, data))


def gif(frames: Frames, rate: float = RATE) -> bytes:
    """The content of such a file."""
    _check(frames, rate)
    # a GIF counts hundredths of a second, and viewers slow down below two
    duration = max(20, round(100 / rate) * 10)
    first, *others = [frame.convert("RGB").quantize(256) for frame in frames]
    stream = io.BytesIO()
    first.save(
        stream,
        format="GIF",
        save_all=True,
        append_images=others,
        duration=duration,
        loop=0,
        optimize=False,
    )
    return stream.getvalue()


def save_mp4(frames: Frames, path: str | os.PathLike[str], rate: float = RATE) -> None:
    """Write frames as an H.264 video that browsers play.

    Odd sides are made even by repeating the last row or column, as the format asks for.
    Raises: ImportError without PyAV; ValueError without frames or for another rate.
    """
    _check(frames, rate)
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{NEEDS_PYAV}, to write MP4 files") from error
    from fractions import Fraction

    width, height = (side + side % 2 for side in frames[0].size)

    def write(part: Path) -> None:
        with av.open(str(part), "w", format="mp4") as file:
            stream = file.add_stream("libx264", rate=Fraction(rate).limit_denominator(1000))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"crf": "16"}
            for frame in frames:
                picture = av.VideoFrame.from_image(_even(frame.convert("RGB"), width, height))
                file.mux(stream.encode(picture))
            file.mux(stream.encode())

    _whole(Path(path), write)


def read_frames(path: str | os.PathLike[str]) -> list[Image.Image]:
    """All frames of a GIF or a video file, as RGB.

    Raises: ImportError for a video without PyAV; ValueError for a file that cannot be read or holds
    no frames.
    """
    name = Path(path).name
    if not Path(path).is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    try:
        if Path(path).suffix.lower() == ".gif":
            with Image.open(path) as image:
                return [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
        frames = _decoded(path)
    except OSError as error:  # Pillow's and PyAV's errors of bad files are among them
        raise ValueError(f"{name!r} cannot be read as a video: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name!r} cannot be read as a video: {error}") from error
    if not frames:
        raise ValueError(f"{name!r} holds no frames")
    return frames


def _decoded(path: str | os.PathLike[str]) -> list[Image.Image]:
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{NEEDS_PYAV}, to read {Path(path).name!r}; a GIF needs none") from error
    with av.open(str(path)) as file:
        if not file.streams.video:
            raise ValueError("it has no pictures")
        return [frame.to_image().convert("RGB") for frame in file.decode(video=0)]


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` frames, evenly spread, with both ends."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)] if most > 1 else [0]


def _even(frame: Image.Image, width: int, height: int) -> Image.Image:
    if frame.size == (width, height):
        return frame
    whole = Image.new("RGB", (width, height))
    for x in {0, width - frame.width}:
        for y in {0, height - frame.height}:
            whole.paste(frame, (x, y))
    whole.paste(frame, (0, 0))
    return whole


def _check(frames: Frames, rate: float) -> None:
    if not frames:
        raise ValueError("A video needs at least one frame; got none.")
    if not isinstance(rate, int | float) or not 0 < rate <= 240:
        raise ValueError(f"rate must be in (0, 240] frames a second; got {rate!r}.")
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        raise ValueError(f"The frames of a video have one size; got {sizes}.")


def _write(part: Path, data: bytes) -> None:
    part.write_bytes(data)


def _whole(path: Path, write: Callable[[Path], None]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
