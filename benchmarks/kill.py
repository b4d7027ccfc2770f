"""Kill an evaluation again and again at random moments, then let it end: the files must be those of
a run that nobody stopped.

``python benchmarks/kill.py [--times 20] [--prompts 40]``. Every round runs ``diffalign eval`` in a
process of its own, forked after the libraries are loaded, waits for a random number of finished
files and a random fraction of a second, and sends SIGKILL.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"


def start(folder: Path, prompts: int) -> int:
    """The process id of an evaluation that runs from now on."""
    process = os.fork()
    if process == 0:
        from diffalign.cli import main

        options = ["--samples", "2", "--steps", "2", "--limit", str(prompts), "--quiet"]
        sys.argv = ["diffalign", "eval", "geneval", *options, "--output", str(folder)]
        try:
            main()
        except SystemExit as end:
            os._exit(int(end.code or 0))
        os._exit(1)
    return process


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but those that hold seconds and dates."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and path.relative_to(folder).parts[0] not in ("timing", "timing.json", "index.html")
    }


def progress(folder: Path) -> int:
    """Prompts that have a record, and those that have scores."""
    return sum(len(list((folder / part).rglob("[0-9]*.json"))) for part in ("records", "scores"))


def kill(folder: Path, prompts: int, times: int, rng: random.Random) -> int:
    """Kill evaluations in ``folder``; how many were still running when they were."""
    kills = 0
    for number in range(times):
        goal = min(2 * prompts * number // times + rng.randint(0, 3), 2 * prompts - 1)
        process = start(folder, prompts)
        while progress(folder) < goal and os.waitpid(process, os.WNOHANG) == (0, 0):
            time.sleep(0.01)
        time.sleep(0.3 * rng.random())
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        kills += os.WIFSIGNALED(status)
        print(f"kill {kills}: {progress(folder)} of {2 * prompts} files are there", flush=True)
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=40)
    options = parser.parse_args()
    import torch
    from diffusers import StableDiffusionPipeline  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    from diffalign.eval import report, scoring  # noqa: F401
    from diffalign.generate import models, samples  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        whole, broken = Path(root) / "whole", Path(root) / "broken"
        kills = kill(broken, options.prompts, options.times, random.Random(0))
        for folder in (broken, whole):
            _, status = os.waitpid(start(folder, options.prompts), 0)
            assert status == 0, f"the run in {folder.name} ended with status {status}"
        one, two = contents(whole), contents(broken)
        differing = sorted(name for name in {*one, *two} if one.get(name) != two.get(name))
        print(f"{kills} kills, {len(one)} files, {len(differing)} differ {differing[:5]}")
        sys.exit(bool(differing))


if __name__ == "__main__":
    main()
