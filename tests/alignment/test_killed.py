"""A run that is killed, and a run of several processes; each is a real process."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

from diffalign.core.seeds import seed_of

SCRIPT = """
import json, sys
import torch
import diffalign as da

torch.set_num_threads(1)
pipe = da.load("emoji")
pipe.set_progress_bar_config(disable=True)
method, folder = sys.argv[1], sys.argv[2]
call = dict(num_inference_steps=4, guidance_scale=3.0)
if len(sys.argv) > 4:
    call["eta"] = float(sys.argv[4])
result = da.align(
    pipe, "a photo of a red apple", method=method, reward="emoji-clip",
    budget=da.Budget(nfe=int(sys.argv[3])), folder=folder if folder != "-" else None, **call,
)
tree = result.tree and [[n.parent, n.step, n.value, n.visits, n.image] for n in result.tree.nodes]
if tree:
    tree = [tree, [float(image.double().sum()) for image in result.tree.images], result.tree.best]
print(json.dumps({"tree": tree, "seed": result.seed, "score": result.score,
                  "nfe": result.ledger.nfe,
                  "moves": [[m.step, m.seed] for m in result.lineage.moves],
                  "image": float(result.tensor.double().sum()), "scored": result.scored}))
"""


def command(*arguments):
    return [sys.executable, "-W", "ignore", "-c", SCRIPT, *map(str, arguments)]


def outcome(*arguments, **options):
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, check=True, **options
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def killed(arguments, seconds):
    """Start a run and kill it after some seconds of work."""
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def resumed(run, folder, times):
    """What a run ends with that was killed so many times at random moments of its work."""
    start = time.perf_counter()
    outcome(*run[:1], folder / "timed", *run[1:])
    length = time.perf_counter() - start
    rng = random.Random(0)
    for _ in range(times):
        killed((run[0], folder / "run", *run[1:]), length * rng.uniform(0.4, 0.95))
    return outcome(*run[:1], folder / "run", *run[1:])


@pytest.mark.slow
def test_a_killed_run_ends_like_one_that_was_not(tmp_path):
    run = ("best-of-n:batch=2", 160)
    assert resumed(run, tmp_path, 3) == outcome(run[0], "-", run[1])


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["dts:preset=small", "dts-star:preset=small"])
def test_a_tree_search_that_is_killed_ten_times_grows_the_same_tree(method, tmp_path):
    run = (method, 1200, 1.0)
    assert resumed(run, tmp_path, 10) == outcome(run[0], "-", *run[1:])


@pytest.mark.slow
def test_two_processes_share_seeds_and_find_the_same_winner():
    alone = outcome("best-of-n:n=4", "-", 160)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    base |= {"ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            command("best-of-n:n=4", "-", 160),
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    answers = []
    for process in processes:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        answers.append(json.loads(out.strip().splitlines()[-1]))
    prompt = "a photo of a red apple"
    assert alone["seed"] in [seed_of(prompt, index) for index in range(4)]
    for answer in answers:
        assert answer["seed"] == alone["seed"]
        assert answer["image"] == pytest.approx(alone["image"], rel=1e-5)
        assert answer["scored"] == 2
