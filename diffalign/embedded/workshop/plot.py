"""Loss curves of the shipped models: `python -m diffalign.embedded.workshop.plot --model
emoji-judge --out docs/emoji-judge-loss.png`."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from PIL import Image

from diffalign.drawing.chart import Curve, chart
from diffalign.embedded.load import FOLDER

__all__ = ["curves", "main", "plot"]


def curves(log: Path, skip: int = 50) -> dict[str, list[tuple[float, float]]]:
    """Name of each logged part -> (update, log10 of its value), from a JSON-lines log; records
    before update `skip` are left out."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in log.read_text().splitlines():
        record = json.loads(line)
        if "updates" not in record or record["updates"] < skip:
            continue
        for name, value in record.items():
            if name not in ("updates", "samples", "seconds", "rate", "norm") and value > 0:
                found.setdefault(name, []).append((record["updates"], math.log10(value)))
    return found


def plot(model: str, log: Path) -> Image.Image:
    """The log as a picture."""
    parts = [Curve(name, points) for name, points in curves(log).items()]
    return chart(
        parts,
        title=f"{model}: training loss and its parts",
        x_label="updates",
        y_label="log10 of the loss",
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--log", type=Path, help="another log than that of the shipped model")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    plot(options.model, options.log or FOLDER / options.model / "log.jsonl").save(
        options.out, optimize=True
    )


if __name__ == "__main__":
    main()
