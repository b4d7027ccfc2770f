"""Kill an evaluation again and again at random moments, then let it end: the files must be those of
a run that nobody stopped.

``python benchmarks/kill.py [--times 20] [--prompts 40]``. Each round starts the installed program,
waits for a random number of finished prompts and a random fraction of a second, and sends SIGKILL.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def command(folder: Path, prompts: int, steps: int) -> list[str]:
    """The evaluation that is killed."""
    options = ["--samples", "2", "--steps", str(steps), "--limit", str(prompts), "--quiet"]
    return [sys.executable, "-m", "diffalign", "eval", "geneval", *options, "--output", str(folder)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but those that hold seconds and dates."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and path.relative_to(folder).parts[0] not in ("timing", "timing.json", "index.html")
    }


def progress(folder: Path) -> int:
    """Files that a run has finished."""
    return sum(len(list(folder.rglob(f"{part}/**/[0-9]*.json"))) for part in ("records", "scores"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as root:
        whole, killed = Path(root) / "whole", Path(root) / "killed"
        run = command(whole, options.prompts, options.steps)
        subprocess.run(run, check=True, env=environment)
        kills = 0
        for _ in range(options.times):
            run = command(killed, options.prompts, options.steps)
            process = subprocess.Popen(run, env=environment)
            start = progress(killed)
            goal = start + rng.randint(0, max(1, 4 * options.prompts // options.times))
            while process.poll() is None and progress(killed) <= goal:
                time.sleep(0.02)
            time.sleep(rng.random() * 0.2)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
            process.wait()
            print(f"kill {kills}: {progress(killed)} files were finished", flush=True)
        run = command(killed, options.prompts, options.steps)
        subprocess.run(run, check=True, env=environment)
        one, two = contents(whole), contents(killed)
        differing = sorted(k for k in {*one, *two} if one.get(k) != two.get(k))
        print(f"{kills} kills, {len(one)} files, {len(differing)} differ {differing[:5]}")
        sys.exit(bool(differing))


if __name__ == "__main__":
    main()
