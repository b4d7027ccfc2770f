"""``diffalign eval`` as a program: one command or three, a settings file, folders of others, and
what it says when it cannot go on."""

import errno
import json
import shutil

import pytest

from diffalign.drawing.png import read_settings
from diffalign.eval.benchmarks import geneval


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    texts = ("a photo of a bench", "a photo of a red bench", "a photo of two benchs")
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def judged(emoji, monkeypatch):
    """The fake judge of the tiny model, whose canary is not asked: it sees benches everywhere."""
    from diffalign.eval.scorers.emoji import EmojiScorer

    monkeypatch.setattr(EmojiScorer, "canary", lambda self: None)
    return emoji


def files(folder, without="timing"):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and without not in str(p) and p.name != "index.html"
    }


@pytest.mark.slow
def test_one_command_or_three_are_the_same(run, judged, prompts, tmp_path):
    common = (prompts, "-s", 2, "--samples", 2)
    whole = run("eval", *common, "-o", tmp_path / "whole")
    assert whole.exit_code == 0, whole.stderr
    assert "0.667" in whole.stdout
    assert whole.stdout.splitlines()[-1].endswith("timing.json")
    for i in range(2):
        part = tmp_path / f"part-{i}"
        part_run = run("eval", "generate", *common, "--shard", f"{i}/2", "-o", part)
        assert part_run.exit_code == 0, part_run.stderr
        assert run("eval", "score", part).exit_code == 0
    parts = [tmp_path / "part-0", tmp_path / "part-1"]
    joined = run("eval", "report", *parts, "-o", tmp_path / "joined", "--json")
    numbers = json.loads(joined.stdout)
    (result,) = numbers["results"].values()
    assert result["mean_of_tags"]["mean"] == pytest.approx(2 / 3)
    assert {name: result["tags"][name]["mean"] for name in result["tags"]} == {
        "single_object": 1.0,
        "counting": 0.0,
        "colors": 1.0,
    }
    whole_files, joined_files = files(tmp_path / "whole"), files(tmp_path / "joined")
    assert {name: whole_files[name] for name in joined_files} == joined_files
    again = run("eval", *common, "-o", tmp_path / "whole")
    assert again.exit_code == 0
    assert files(tmp_path / "whole") == whole_files


@pytest.mark.slow
def test_a_search_that_branches_gets_its_kernel(run, judged, prompts, tmp_path):
    command = (prompts, "-s", 3, "--samples", 1, "--limit", 1, "--scheduler", "ddim")
    command += ("--align", "dts-star:preset=small", "--budget", "nfe=60", "--reward", "brightness")
    result = run("eval", *command, "-o", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    (picture,) = (tmp_path / "run" / "images").rglob("*.png")
    assert read_settings(picture)["kernel"] == "Eta(eta=1.0)"


@pytest.mark.slow
def test_a_settings_file_and_options_beside_it(run, judged, prompts, tmp_path):
    pytest.importorskip("yaml")
    settings = tmp_path / "run.yaml"
    settings.write_text(
        f"benchmark: {prompts}\nsamples: 1\nsteps: 2\ntechnique: ['cfg:scale=2']\nlimit: 1\n"
        f"output: {tmp_path / 'run'}\n"
    )
    result = run("eval", settings)
    assert result.exit_code == 0, result.stderr
    assert "emoji: cfg:scale=2" in result.stdout
    assert "1 of 3 prompts" in result.stderr
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (saved["steps"], saved["samples"]) == (2, 1)
    other = run("eval", settings, "-s", 3)
    assert (other.exit_code, other.stdout) == (1, "")
    assert "holds another run: steps is 2 there and 3 here" in other.stderr


@pytest.mark.slow
def test_images_of_another_tool(run, judged, tmp_path):
    from PIL import Image

    for n in (0, 7):
        place = tmp_path / "theirs" / f"{n:05d}"
        (place / "samples").mkdir(parents=True)
        (place / "metadata.jsonl").write_text(json.dumps(geneval().items[n].facts))
        Image.new("RGB", (20, 16), (9, 9, 9)).save(place / "samples" / "00000.png")
    before = files(tmp_path / "theirs")
    score = ("eval", "score", tmp_path / "theirs", "--benchmark", "geneval")
    result = run(*score, "-o", tmp_path / "ours")
    assert (result.exit_code, result.stderr) == (0, "")
    assert files(tmp_path / "theirs") == before
    numbers = json.loads(run("eval", "report", tmp_path / "ours", "--json").stdout)
    result = numbers["results"]["theirs"]
    assert result["tags"]["single_object"]["mean"] == 0.5
    assert result["overall"] is None
    empty = run("eval", "score", tmp_path, "--benchmark", "compbench", "-o", tmp_path / "x")
    assert empty.exit_code == 1
    assert "holds no images in the layout of compbench" in empty.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["genevall"], ["unknown benchmark 'genevall'", "Nearest: geneval"]),
        (["geneval", "--samples", "0"], ["--samples must be at least 1"]),
        (["geneval", "--limit", "0"], ["--limit must be at least 1"]),
        (["geneval", "--shard", "2/2"], ["shard counts from 0"]),
        (["geneval", "--category", "colour"], ["no category 'colour'"]),
        (["geneval", "--technique", "cgf"], ["cgf", "Nearest"]),
        (["geneval", "--budget", "nfe=9"], ["give --align METHOD"]),
        (["geneval", "--align", "best-of-m"], ["best-of-m"]),
        (["geneval", "--align", "best-of-n", "--budget", "seconds=9"], ["seconds", "nfe"]),
        (["geneval", "--align", "best-of-n", "--reward", "emoji-judge"], ["is no test"]),
        (["geneval", "--align", "best-of-n", "--model", "none"], ["--reward is needed for none"]),
        (["geneval", "--scorer", "emoji-jugde"], ["unknown scorer"]),
        (["compbench", "--samples", "11"], ["at most 10"]),
        (["compbench", "--category", "texture"], ["no prompt of these categories"]),
        (["missing.jsonl"], ["missing.jsonl", "cannot be read"]),
        (["missing.yaml"], ["missing.yaml", "cannot be read"]),
        (["geneval", "--engine", "spark"], ["--engine must be local or ray; got 'spark'"]),
        (["geneval", "--engine", "ray", "--workers", "0"], ["--workers must be at least 1"]),
        (["score", "nowhere", "--engine", "rai"], ["--engine must be local or ray"]),
        (["score", "nowhere", "--benchmark", "geneval"], ["--benchmark and --output go together"]),
    ],
)
def test_bad_input(program, judged, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = program("eval", *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    for word in words:
        assert word in err
    assert not (tmp_path / "outputs").exists()


def failing_disk(code):
    """Breaks the second image that is written."""

    def install(monkeypatch, folder):
        from diffalign.drawing import png

        save, calls = png.save_png, []

        def full(*arguments):
            calls.append(1)
            if len(calls) == 2:
                raise OSError(code, "no")
            save(*arguments)

        monkeypatch.setattr(png, "save_png", full)

    return install


def failing_model(monkeypatch, folder):
    """Runs out of memory at the third prompt, of two steps each."""
    from diffusers import UNet2DConditionModel

    forward, calls = UNet2DConditionModel.forward, []

    def failing(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return forward(self, *arguments, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", failing)


def failing_scorer(monkeypatch, folder):
    from diffalign.eval.scorers import Outcome
    from diffalign.eval.scorers.emoji import EmojiScorer

    score = EmojiScorer.score

    def failing(self, images, item):
        if item.index == 1:
            return [Outcome(float("nan"), "", {}) for _ in images]
        return score(self, images, item)

    monkeypatch.setattr(EmojiScorer, "score", failing)


def broken_scorer(monkeypatch, folder):
    from diffalign.eval.scorers.emoji import EmojiScorer

    monkeypatch.setattr(EmojiScorer, "canary", lambda self: "it sees nothing")


def count(folder, part):
    return len(list((folder / part).rglob("[0-9]*.json")))


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("install", "words", "records", "scores"),
    [
        (failing_disk(errno.ENOSPC), ["the disk is full", "is kept"], 1, 0),
        (failing_disk(errno.EROFS), ["read-only", "is kept"], 1, 0),
        (failing_disk(errno.EACCES), ["must not be written", "is kept"], 1, 0),
        (failing_model, ["prompt 2 ('a photo of two benchs')", "out of memory", "2 prompts"], 2, 0),
        (failing_scorer, ["returned nan for 00001/samples/00000.png", "are kept"], 3, 1),
        (broken_scorer, ["emoji-judge is broken: it sees nothing"], 0, 0),
    ],
)
def test_a_failure_ends_with_code_1_and_the_same_command_goes_on(
    program, judged, prompts, tmp_path, monkeypatch, install, words, records, scores
):
    folder = tmp_path / "run"
    command = ("eval", prompts, "-s", 2, "--samples", 1, "-o", folder)
    with monkeypatch.context() as broken:
        install(broken, folder)
        code, out, err = program(*command)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1, err
    for word in words:
        assert word in err
    assert (count(folder, "records"), count(folder, "scores")) == (records, scores)
    code, out, err = program(*command, "-q")
    assert (code, err.count("error")) == (0, 0)
    assert (count(folder, "records"), count(folder, "scores")) == (3, 3)
    assert (folder / "index.html").is_file()


@pytest.mark.slow
def test_processes_share_a_run_and_the_last_one_reports(
    program, judged, prompts, tmp_path, monkeypatch
):
    """Two processes of an outer launcher write the files that one process writes."""
    common = ("eval", prompts, "-s", 2, "--samples", 2)
    assert program(*common, "-o", tmp_path / "one", "-q")[0] == 0
    for rank in ("1", "0"):
        with monkeypatch.context() as launcher:
            launcher.setenv("RANK", rank)
            launcher.setenv("WORLD_SIZE", "2")
            code, out, err = program(*common, "-o", tmp_path / "two")
        assert (code, err.count("error")) == (0, 0)
        assert ("1 of 3 prompts are finished" in out) == (rank == "1")
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_failures_end_with_one_line_and_code_1(program, judged, prompts, tmp_path):
    folder = tmp_path / "run"
    assert program("eval", prompts, "-s", 2, "--samples", 1, "-o", folder, "-q")[0] == 0
    (folder / "images" / "00001" / "samples" / "00000.png").write_bytes(b"no picture")
    shutil.rmtree(folder / "scores")
    code, out, err = program("eval", "score", folder)
    assert (code, out) == (1, "")
    assert "00000.png is not the one of its record" in err
    assert len(err.splitlines()) == 1
    code, out, err = program("eval", "report", tmp_path / "nowhere")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "no run.json" in err


@pytest.mark.slow
def test_bad_images_of_another_tool_are_named(program, judged, tmp_path):
    """A file that is no image, one that is cut off, and a folder without any."""
    from PIL import Image

    place = tmp_path / "theirs" / "00007"
    (place / "samples").mkdir(parents=True)
    (place / "metadata.jsonl").write_text(json.dumps(geneval().items[7].facts))
    file = place / "samples" / "00000.png"
    score = ("eval", "score", tmp_path / "theirs", "--benchmark", "geneval")
    code, _, err = program(*score, "-o", tmp_path / "none")
    assert (code, "holds no images in the layout of geneval" in err) == (1, True)
    Image.effect_noise((64, 64), 90).save(file)
    whole = file.read_bytes()
    for number, data in enumerate((b"no picture", whole[: len(whole) // 2])):
        file.write_bytes(data)
        code, out, err = program(*score, "-o", tmp_path / f"ours-{number}")
        assert (code, out, len(err.splitlines())) == (1, "", 1)
        assert "00007/samples/00000.png cannot be read" in err
        assert "Replace it." in err
    file.unlink()
    (place / "metadata.jsonl").unlink()
    code, _, err = program(*score, "-o", tmp_path / "ours")
    assert (code, "metadata.jsonl is missing or holds no prompt" in err) == (1, True)


def test_ray_is_refused_where_it_cannot_run(program, judged, tmp_path, monkeypatch):
    """Without the extra, and inside another launcher, whose processes would each start a pool."""
    from diffalign.cli import plan

    monkeypatch.chdir(tmp_path)
    command = ("eval", "geneval", "--engine", "ray")
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    code, out, err = program(*command)
    assert (code, out) == (2, "")
    assert "--engine ray needs Ray; install it by pip install 'diffalign[ray]'." in err
    monkeypatch.setattr(plan, "find_spec", lambda name: name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = program(*command)
    assert (code, out) == (2, "")
    assert "run it without accelerate launch or torchrun" in err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_the_work_of_rays_actors_gives_the_same_files(run, judged, prompts, tmp_path, monkeypatch):
    """What an actor does, here in this process: make and score each unit, or only score it."""
    from diffalign.cli import plan
    from diffalign.eval import cluster

    calls = []

    def spread(prepare, items, workers, *, accelerator, progress):
        calls.append((len(items), workers, accelerator))
        work = prepare()
        for item in items:
            work(item)
            progress(1)

    monkeypatch.setattr(plan, "find_spec", lambda name: name)
    monkeypatch.setattr(cluster, "spread", spread)
    common = ("eval", prompts, "-s", 2, "--samples", 2)
    assert run(*common, "-o", tmp_path / "local").exit_code == 0
    pool = ("--engine", "ray", "--workers", 3)
    result = run(*common, *pool, "-o", tmp_path / "ray")
    assert result.exit_code == 0, result.stderr
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    shutil.rmtree(tmp_path / "ray" / "scores")
    result = run("eval", "score", tmp_path / "ray", *pool, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert "3 prompts are scored" in result.stdout
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    assert calls == [(3, 3, True), (3, 3, False)]
    other = run(*common, *pool, "--seed", 1, "-o", tmp_path / "ray")
    assert other.exit_code == 1
    assert "holds another run: seed is 0 there and 1 here" in other.stderr
