"""The runner: what it writes, that it goes on after any stop, and what it says when it cannot."""

import dataclasses
import errno
import json
import os
import subprocess
import sys

import pytest

import diffalign as da
from diffalign.eval import generation
from diffalign.eval.benchmarks import compbench_val, geneval, named, of_file
from diffalign.eval.files import RunError, write, write_json
from diffalign.eval.folder import RunFolder, Share, differences
from diffalign.eval.generation import Search, generate
from diffalign.eval.scoring import pictures_of, score
from diffalign.tasks.compbench.prompts import read_name

from .conftest import Brightness


def contents(folder, without=("timing",)):
    """Path -> bytes of everything below a folder that does not change from machine to machine."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not set(path.relative_to(folder).parts) & set(without)
    }


def scored(folder, scorer=None, pictures=None):
    return score(scorer or Brightness(), folder, pictures or pictures_of(folder))


def test_lists_of_prompts():
    assert (len(geneval().items), len(compbench_val().items)) == (553, 2400)
    assert [len(geneval().spread(n)) for n in (1, 10, 553, 600, None)] == [1, 10, 553, 553, 553]
    assert {item.tag for item in geneval().spread(12)} == set(geneval().tags)
    few, more = ({item.index for item in geneval().spread(n)} for n in (10, 20))
    assert few <= more
    with pytest.raises(ValueError, match=r"unknown benchmark 'genevall'.*Nearest: geneval"):
        named("genevall")
    with pytest.raises(ValueError, match="has no category 'colour'"):
        named("compbench", ["colour"])
    item = named("compbench", ["color"]).items[7]
    name = compbench_val().file(item, 4)
    assert read_name(name.rpartition("/")[2]) == (item.prompt, 74)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds no prompt"),
        ("{", "line 1: not JSON"),
        ('{"text": "a"}', "line 1: expected an object"),
        ('{"prompt": "a"}\n{"prompt": "a"}', "stands twice"),
        ('{"prompt": "a", "category": 3}', "category must be a text"),
        ('{"prompt": "a", "questions": ["yes"]}', "questions must be pairs"),
        ('{"prompt": "a", "questions": [["Is it?", " "]]}', "questions must be pairs"),
        ('{"prompt": "a", "vqa_list": "yes"}', "questions must be pairs"),
    ],
)
def test_bad_files_of_prompts(tmp_path, lines, message):
    path = tmp_path / "p.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=message):
        of_file(path)


def test_lines_of_geneval_2_are_read_as_they_are(tmp_path):
    path = tmp_path / "geneval2_data.jsonl"
    questions = [["How many dogs are there?", "two"], ["Is the dog red?", "Yes"]]
    line = {"prompt": "two red dogs", "atom_count": 3, "vqa_list": questions, "skills": ["count"]}
    path.write_text(json.dumps(line))
    (item,) = of_file(path).items
    assert (item.prompt, item.tag) == ("two red dogs", "atomicity 3")
    assert item.facts["questions"] == questions


def test_units_of_processes_are_a_partition():
    items = geneval().items
    shares = [
        Share.of(f"{i}/2", {"RANK": str(rank), "WORLD_SIZE": "3"})
        for i in range(2)
        for rank in range(3)
    ]
    parts = [share.of_items(items) for share in shares]
    assert sorted(item.index for part in parts for item in part) == list(range(553))
    assert Share.of(None, {}) == Share(0, 1)
    few = geneval().spread(12)  # all of even index
    assert [len(Share(i, 2).of_items(few)) for i in range(2)] == [6, 6]
    for text in ("2/2", "1", "a/b", "-1/2"):
        with pytest.raises(ValueError, match="shard"):
            Share.of(text, {})


def test_layout_is_genevals_and_seeds_come_from_prompt_and_number(plan, tmp_path):
    folder = RunFolder.begin(tmp_path / "run", plan.settings())
    assert generate(plan, folder) == 5
    place = tmp_path / "run" / "images" / "00002"
    assert sorted(p.name for p in place.iterdir()) == ["metadata.jsonl", "samples"]
    assert sorted(p.name for p in (place / "samples").iterdir()) == ["00000.png", "00001.png"]
    facts = json.loads((place / "metadata.jsonl").read_text())
    assert facts["include"] == [{"class": "dog", "count": 2}]
    record = folder.record(plan.benchmark.items[2])
    from diffalign.core.seeds import seed_of

    assert [s["seed"] for s in record["samples"]] == [
        seed_of("a photo of two dogs", k) for k in (0, 1)
    ]
    assert record["samples"][0]["nfe"] == 4.0
    assert record["samples"][0]["size"] == [16, 16]
    assert generate(plan, folder) == 0


def test_effective_scales_that_are_no_numbers_do_not_stop_a_run():
    assert generation._mean([1.0, None, float("nan"), 2.0, float("inf")]) == 1.5
    assert generation._mean([None, float("nan")]) is None


def test_any_number_of_processes_and_order_gives_the_same_bytes(plan, tmp_path):
    whole = RunFolder.begin(tmp_path / "whole", plan.settings())
    generate(plan, whole)
    scored(whole)
    parts = RunFolder.begin(tmp_path / "parts", plan.settings())
    for share in (Share(2, 3), Share(0, 3), Share(1, 3)):
        generate(plan, parts, share.of_items(plan.benchmark.items))
    for rank in (1, 0):
        scored(parts, pictures=pictures_of(parts)[rank::2])
    assert contents(parts.path) == contents(whole.path)


def test_a_torn_unit_is_made_again_whole_and_a_finished_one_never(plan, tmp_path, monkeypatch):
    folder = RunFolder.begin(tmp_path / "run", plan.settings())
    generate(plan, folder)
    before = contents(folder.path)
    items = plan.benchmark.items
    folder.record_file(items[1]).unlink()  # killed before the record
    folder.image(plan.benchmark, items[1], 1).unlink()
    part = folder.image(plan.benchmark, items[1], 1).with_name(".00001.png.7.part")
    part.write_bytes(b"half")
    folder.record_file(items[2]).write_text('{"index": 2, "sam')  # lost power
    folder.image(plan.benchmark, items[3], 0).write_bytes(b"changed")
    prompts = []
    monkeypatch.setattr(
        generation,
        "_sampled",
        lambda plan, items, make=generation._sampled: (
            prompts.extend(item.index for item in items) or make(plan, items)
        ),
    )
    assert generate(plan, folder) == 3
    assert prompts == [1, 2, 3]
    assert contents(folder.path) == before


def test_another_runs_folder_is_refused(plan, tmp_path):
    RunFolder.begin(tmp_path / "run", plan.settings())
    other = dataclasses.replace(plan, techniques=(da.CFG(4.0),), samples=3)
    with pytest.raises(RunError, match=r"another run: samples is 2 there and 3 here, techniques"):
        RunFolder.begin(tmp_path / "run", other.settings())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds thesis\.txt and no run"):
        RunFolder.begin(tmp_path / "full", plan.settings())
    with pytest.raises(RunError, match=r"no run\.json"):
        RunFolder.open(tmp_path / "full")
    assert differences({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b is 1 there and 2 here"


def test_a_model_that_fails_in_the_middle_keeps_what_is_finished(plan, tmp_path, monkeypatch):
    folder = RunFolder.begin(tmp_path / "run", plan.settings())
    cls = type(plan.model.pipe.unet)
    forward, calls = cls.forward, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:  # two steps of a prompt
            raise RuntimeError("out of memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", failing)
    with pytest.raises(
        RunError, match=r"prompt 2 \('a photo of two dogs'\).*out of memory 2 prompts"
    ):
        generate(plan, folder)
    assert [item.index for item, _ in folder.entries()] == [0, 1]
    monkeypatch.setattr(cls, "forward", forward)
    assert generate(plan, folder) == 3


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "must not be")],
)
def test_a_failing_disk_is_said_and_nothing_is_half_written(
    plan, tmp_path, monkeypatch, code, message
):
    from diffalign.drawing import png

    folder = RunFolder.begin(tmp_path / "run", plan.settings())
    save, calls = png.save_png, []

    def full(*args):
        calls.append(1)
        if len(calls) == 4:  # the second image of the second prompt
            raise OSError(code, "no")
        save(*args)

    monkeypatch.setattr(png, "save_png", full)
    with pytest.raises(RunError, match=f"{message}.*is kept"):
        generate(plan, folder)
    monkeypatch.setattr(png, "save_png", save)
    assert [item.index for item, _ in folder.entries()] == [0]
    assert generate(plan, folder) == 4


def test_bad_images_are_named(evaluated, plan):
    folder = evaluated("run")
    image = folder.image(plan.benchmark, plan.benchmark.items[3], 1)
    data = image.read_bytes()
    other = Brightness(border=0.5)
    other.name = "other"
    image.write_bytes(data[: len(data) // 2])
    with pytest.raises(RunError, match=r"00003.samples.00001\.png is not the one of its record"):
        scored(folder, other)
    image.unlink()
    with pytest.raises(
        RunError, match=r"00001\.png is missing. Make it again with `diffalign eval"
    ):
        scored(folder, other)
    assert other.images == 6
    assert generate(plan, folder) == 1
    assert scored(folder, other) == 2


def test_broken_scorers_are_said(evaluated, plan, tmp_path):
    folder = RunFolder.begin(tmp_path / "run", plan.settings())
    generate(plan, folder)
    with pytest.raises(RunError, match=r"is broken: all is dark. No image was scored"):
        scored(folder, Brightness(broken="all is dark"))
    with pytest.raises(RunError, match=r"returned nan for 00002/samples/00000\.png"):
        scored(folder, Brightness(failing=2))
    last = Brightness()
    assert scored(folder, last) == 3
    with pytest.raises(RunError, match="scores of another brightness"):
        scored(folder, Brightness(border=0.9))


def test_scoring_twice_is_the_same_and_costs_nothing(evaluated):
    folder, again = evaluated("run"), Brightness()
    before = contents(folder.path)
    assert scored(folder, again) == 0
    assert again.images == 0
    assert contents(folder.path) == before


def test_files_appear_whole_beside_other_writers(tmp_path):
    (tmp_path / ".a.json.99.part").write_text("half")
    write_json(tmp_path / "a.json", {"b": 1, "a": "ü"})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == '{\n "a": "ü",\n "b": 1\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "b.json", {"a": float("nan")})
    write(tmp_path / "x[1].txt", "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "x[1].txt"]


@pytest.mark.slow
def test_a_search_makes_each_image(plan, tmp_path):
    search = Search("best-of-n:n=2", "emoji-clip")
    one = dataclasses.replace(plan, search=search, samples=1)
    folder = RunFolder.begin(tmp_path / "run", one.settings())
    generate(one, folder, one.benchmark.items[:1])
    ((_, record),) = folder.entries()
    (sample,) = record["samples"]
    assert sample["nfe"] == 3 * 4  # two images and the final call
    assert sample["rewards"] >= 2
    with pytest.raises(ValueError, match="seconds"):
        Search("best-of-n", "emoji-clip", da.Budget(seconds=1.0)).check()
    with pytest.raises(ValueError, match="Unknown reward"):
        Search("best-of-n", "emoji-clop").check()


KILLS = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from diffalign.eval.benchmarks import of_file
from diffalign.eval.folder import RunFolder
from diffalign.eval.generation import Plan, generate
from diffalign.generate.models import Model
from diffalign.testing.tiny import tiny_pipeline
root = Path(sys.argv[1])
pipe = tiny_pipeline("StableDiffusionPipeline", text=True)
pipe.set_progress_bar_config(disable=True)
call = {"num_inference_steps": 2, "guidance_scale": 3.0}
model = Model("tiny", "folder", pipe, 2, 3.0, call, {"model": "tiny"})
plan = Plan(of_file(root / "many.jsonl"), model, samples=2)

def start(name):
    process = os.fork()
    if process == 0:
        code = 1
        try:
            generate(plan, RunFolder.begin(root / name, plan.settings()))
            code = 0
        finally:
            os._exit(code)
    return process

def count():
    return len(list((root / "killed" / "records").glob("[0-9]*.json")))

for moment in (3, 9, 16):
    process = start("killed")
    while count() < moment:
        assert os.waitpid(process, os.WNOHANG) == (0, 0)
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    print(os.WTERMSIG(os.waitpid(process, 0)[1]), count())
for name in ("killed", "whole"):
    assert os.waitpid(start(name), 0)[1] == 0
"""


@pytest.mark.slow
def test_kill_9_loses_at_most_the_unit_in_flight(tmp_path):
    """Three kills at different moments, then one run to the end: the files are those of a run that
    nobody stopped. One process loads the libraries and forks the others."""
    lines = [json.dumps({"prompt": f"a photo of {n} things"}) for n in range(24)]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    root = os.path.dirname(os.path.dirname(da.__file__))
    command = [sys.executable, "-c", KILLS, str(tmp_path), root]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    signals, counts = zip(*(map(int, line.split()) for line in result.stdout.splitlines()))
    assert signals == (9, 9, 9)
    assert 3 <= counts[0] < counts[1] < counts[2] < 24
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
