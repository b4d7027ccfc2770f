"""Ray: the files of a run are those of any other engine, also when a worker is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import diffalign as da
from diffalign.eval.files import RunError


def contents(folder):
    """Path -> bytes of what does not change from machine to machine."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and path.relative_to(folder).parts[0] not in ("timing", "timing.json", "index.html")
    }


def actors(mark):
    """Process ids of Ray's actors that were started with this mark in their environment."""
    numbers = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            name = (place / "cmdline").read_bytes()
            if b"MapWorker" in name and mark.encode() in (place / "environ").read_bytes():
                numbers.append(int(place.name))
        except OSError:  # it has ended, or is another user's
            continue
    return sorted(numbers)


@pytest.mark.exhaustive
def test_a_killed_worker_changes_nothing(tiny, tmp_path):
    """SIGKILL for one of two workers in the middle: the run ends by itself, with the same files.
    About 40 s of processor time for the three processes that load the libraries again."""
    pytest.importorskip("ray", reason="the extra ray")
    tiny.pipe.save_pretrained(tmp_path / "model")
    lines = [json.dumps({"prompt": f"a photo of {n} birds"}) for n in ("two", "three", "four")]
    lines += [json.dumps({"prompt": f"a photo of a {c} car"}) for c in ("red", "blue", "green")]
    lines += [json.dumps({"prompt": f"a photo of a {c} bus"}) for c in ("red", "blue", "green")]
    lines += [json.dumps({"prompt": f"a photo of a {c} dog"}) for c in ("red", "blue", "green")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))

    def start(folder, *options):
        command = [sys.executable, "-m", "diffalign", "eval", "run", "prompts.jsonl", "--quiet"]
        command += ["--model", "model", "--scorer", "emoji-judge", "--samples", "2"]
        command += ["--steps", "12", "--output", folder, *options]
        root = str(Path(da.__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "MARK": folder}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE)

    process = start("killed", "--engine", "ray", "--workers", "2")
    records = tmp_path / "killed" / "records"
    while len(list(records.glob("[0-9]*.json"))) < 3:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.05)
    victim = actors("MARK=killed")[0]
    os.kill(victim, signal.SIGKILL)
    assert len(list(records.glob("[0-9]*.json"))) < len(lines)
    assert process.wait() == 0, process.stderr.read().decode()
    assert start("whole").wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.exhaustive
def test_a_unit_that_always_loses_its_actor_ends_the_run(tmp_path):
    """The others are done; the run says that Ray gave up, after one try and three more."""
    ray = pytest.importorskip("ray", reason="the extra ray")
    from diffalign.eval.benchmarks import geneval
    from diffalign.eval.cluster import TRIES, spread

    def prepare():
        def unit(item):
            with (tmp_path / f"{item.index}").open("a") as file:
                file.write("x")
            if item.index == 1:
                os._exit(1)

        return unit

    try:
        with pytest.raises(RunError, match=r"Ray gave up: .* What is finished is kept"):
            spread(prepare, geneval().items[:6], 1)
    finally:
        ray.shutdown()
    assert len((tmp_path / "1").read_text()) == 1 + TRIES


@pytest.mark.exhaustive
def test_the_first_error_of_a_unit_ends_the_run():
    ray = pytest.importorskip("ray", reason="the extra ray")
    from diffalign.eval.benchmarks import geneval
    from diffalign.eval.cluster import spread

    def prepare():
        def unit(item):
            if item.index == 2:
                raise RunError("prompt 2: out of memory")

        return unit

    counts = []
    try:
        with pytest.raises(RunError, match="prompt 2: out of memory"):
            spread(prepare, geneval().items[:4], 1, progress=counts.append)
        spread(prepare, geneval().items[3:6], 2, progress=counts.append)
    finally:
        ray.shutdown()
    assert counts[-3:] == [1, 1, 1]


def test_an_actor_tells_errors_and_prepares_once():
    """Without Ray: what a unit raises comes back as a text, and the model is loaded once."""
    import numpy as np

    from diffalign.eval.benchmarks import geneval
    from diffalign.eval.cluster import Actor

    items, prepared, units = geneval().items[:4], [], []

    def prepare():
        prepared.append(1)

        def unit(item):
            if item.index == 2:
                raise RunError("the disk is full")
            if item.index == 0:
                raise KeyError("weights")
            units.append(item.prompt)

        return unit

    actor = Actor(prepare, items)
    results = [actor({"index": np.array([n])}) for n in (1, 2, 3, 0)]
    assert results == [
        {"index": [1], "error": [""]},
        {"index": [2], "error": ["the disk is full"]},
        {"index": [3], "error": [""]},
        {"index": [0], "error": ["prompt 0: KeyError: 'weights'"]},
    ]
    assert prepared == [1]
    assert units == [items[1].prompt, items[3].prompt]
