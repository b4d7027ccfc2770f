"""Loss curves of the shipped models: ``python -m diffalign.embedded.workshop.plot --model
emoji-judge --out docs/emoji-judge-loss.png``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

from diffalign.drawing.charts import Curve, line_chart
from diffalign.embedded.load import FOLDER

# what a record holds beside the parts of the loss
NO_LOSS = ("updates", "samples", "seconds", "rate", "norm")


def curves(log: Path, skip: int = 50) -> dict[str, list[tuple[float, float]]]:
    """Name of each logged part -> (update, value), from a JSON-lines log; values at 0 and records
    before update ``skip`` are left out."""
    parts: dict[str, list[tuple[float, float]]] = {}
    for line in log.read_text().splitlines():
        record = json.loads(line)
        if "updates" not in record or record["updates"] < skip:
            continue
        for name, value in record.items():
            if name not in NO_LOSS and value > 0:
                parts.setdefault(name, []).append((record["updates"], value))
    return parts


def plot(model: str, log: Path) -> Image.Image:
    """The log as a picture."""
    return line_chart(
        [Curve(name, points) for name, points in curves(log).items()],
        title=f"{model}: training loss and its parts",
        x_label="updates",
        y_label="loss",
        log="y",
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--log", type=Path, help="another log than that of the shipped model")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture = plot(options.model, options.log or FOLDER / options.model / "log.jsonl")
    picture.save(options.out, optimize=True)


if __name__ == "__main__":
    main()
