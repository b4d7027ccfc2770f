"""``diffalign compare``: the same noise in every column, honest costs, verdicts, one sheet and its
data."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image

from diffalign.cli.demo import prompts_of
from diffalign.core.seeds import seed_of
from diffalign.drawing.png import read_settings
from diffalign.tasks.geneval.verdict import TAGS, prompts

PROMPTS = ("-p", "a photo of a bench", "-p", "a photo of a cat", "-p", "free text")
COLUMNS = ("-t", "adaptive-guidance:threshold=-1", "-t", "cfg:scale=7.5", "-t", "cfg:scale=3+nag")


def pixels(path):
    return np.asarray(Image.open(path))


def shows(sheet, tile):
    """Whether ``tile`` appears pixel for pixel somewhere in ``sheet`` (both RGB arrays)."""
    height, width = tile.shape[:2]
    corners = np.argwhere((sheet[: 1 - height, : 1 - width] == tile[0, 0]).all(-1))
    corners = [c for c in corners if np.array_equal(sheet[c[0], c[1] : c[1] + width], tile[0])]
    return any(np.array_equal(sheet[y : y + height, x : x + width], tile) for y, x in corners)


@pytest.mark.slow
def test_columns_share_their_noise_and_plain_is_the_pipeline(run, folder, tmp_path):
    result = run(
        "compare",
        "-m",
        folder,
        "-o",
        tmp_path,
        *PROMPTS,
        *COLUMNS,
        "-c",
        2,
        "-s",
        4,
        "-b",
        4,
        "--seed",
        3,
    )
    assert result.exit_code == 0, result.stderr
    data = json.loads((tmp_path / "compare.json").read_text())
    assert [c["label"] for c in data["columns"]] == ["CFG 7.5", *COLUMNS[1::2]]
    pipe = DiffusionPipeline.from_pretrained(folder)
    todo = [(text, seed_of(text, i, base=3)) for text in PROMPTS[1::2] for i in (0, 1)]
    expected = []
    for part in (todo[:4], todo[4:]):
        rng = [torch.Generator("cpu").manual_seed(seed) for _, seed in part]
        expected += pipe([text for text, _ in part], generator=rng, num_inference_steps=4).images
    by_column = [[i for i in data["images"] if i["column"] == c["label"]] for c in data["columns"]]
    assert all([(i["prompt"], i["seed"]) for i in column] == todo for column in by_column)
    for shown, image in zip(by_column[0], expected):
        assert np.array_equal(pixels(shown["file"]), np.asarray(image))
    for plain, same in zip(
        by_column[0], by_column[2]
    ):  # CFG through a session is the pipeline's own, so the noise was the same
        assert np.array_equal(pixels(plain["file"]), pixels(same["file"]))
    for plain, other in zip(by_column[0], by_column[1]):
        assert not np.array_equal(pixels(plain["file"]), pixels(other["file"]))
    # 2 of 4 steps guided: 4 + 2; the negative stream of NAG is a second image stream in the
    # conditional rows only where text is on the sequence axis; its meter is tested with the
    # technique
    assert [c["nfe"] for c in data["columns"]][:3] == [8, 6, 8]
    assert [c["guided_steps"] for c in data["columns"]] == [4, 2, 4, 4]
    assert [round(c["effective_scale"], 2) for c in data["columns"]] == [7.5, 7.5, 7.5, 3.0]
    assert all(c["seconds_per_image"] > 0 for c in data["columns"])


def test_sheet_shows_every_image_enlarged(run, folder, tmp_path):
    result = run("compare", "-m", folder, "-o", tmp_path, *PROMPTS, *COLUMNS[:2], "-s", 2)
    assert result.exit_code == 0, result.stderr
    sheet = pixels(tmp_path / "compare.png")
    files = sorted((tmp_path / "images").iterdir())
    assert len(files) == 6
    for path in files:  # 16 pixels become 256
        assert shows(sheet, pixels(path).repeat(16, 0).repeat(16, 1))
    assert 2 * 256 < sheet.shape[1] < 4 * 256  # two columns, the labels, the margins
    assert 3 * 256 < sheet.shape[0] < 5 * 256
    settings = read_settings(tmp_path / "compare.png")
    assert settings["prompts"] == list(PROMPTS[1::2])
    assert [c["label"] for c in settings["columns"]] == ["CFG 7.5", COLUMNS[1]]


def test_table_and_json_agree(run, folder, tmp_path):
    arguments = ("-m", folder, "-p", "free text", "-t", "adaptive-guidance:threshold=-1", "-s", 4)
    text = run("compare", "-o", tmp_path / "a", *arguments)
    assert text.exit_code == 0
    for word in (
        "NFE/image",
        "effective scale",
        "CFG 7.5",
        "2 of 4",
        "only embedded models have a judge",
        "compare.png",
        "compare.json",
    ):
        assert word in text.stdout
    assert "correct" not in text.stdout
    result = run("compare", "-o", tmp_path / "b", *arguments, "--json")
    data = json.loads(result.stdout)
    assert data == json.loads((tmp_path / "b" / "compare.json").read_text())
    assert data["columns"][1]["techniques"] == [
        {
            "name": "adaptive-guidance",
            "scale": None,
            "threshold": -1.0,
            "space": None,
            "min_guided_steps": 2,
        }
    ]
    assert {c["correct"] for c in data["columns"]} == {None}
    assert run("compare", "-o", tmp_path / "c", *arguments, "--quiet").stdout == ""


def test_without_guidance_the_first_column_is_called_plain(run, folder, tmp_path):
    data = json.loads(
        run(
            "compare", "-m", folder, "-o", tmp_path, "-p", "x", "-s", 2, "--scale", "1", "--json"
        ).stdout
    )
    assert [
        (c["label"], c["nfe"], c["guided_steps"], c["effective_scale"]) for c in data["columns"]
    ] == [("plain", 2, 0, 1)]


def test_verdicts_of_the_embedded_judge(run, emoji, tmp_path):
    result = run("compare", "-o", tmp_path, *PROMPTS, "-t", "adaptive-guidance", "-s", 2, "-b", 2)
    assert result.exit_code == 0, result.stderr
    assert "1 of 2" in result.stdout
    data = json.loads((tmp_path / "compare.json").read_text())
    assert [(i["correct"], i["reason"]) for i in data["images"]] == 2 * [
        (True, ""),
        (False, "expected cat>=1, found 0"),
        (None, None),
    ]
    assert [(c["correct"], c["judged"]) for c in data["columns"]] == [(1, 2), (1, 2)]
    seen = torch.cat(emoji.seen[:2])
    assert seen.shape == (3, 3, 16, 16)
    expected = np.stack([pixels(i["file"]) for i in data["images"][:3]])
    assert torch.equal(
        (seen * 255).round().to(torch.uint8).permute(0, 2, 3, 1), torch.from_numpy(expected)
    )
    sheet = pixels(tmp_path / "compare.png")
    green, red = (
        np.nonzero((sheet == [int(c[i : i + 2], 16) for i in (1, 3, 5)]).all(-1))[0]
        for c in ("#2a9d5c", "#d8453b")
    )
    assert min(len(green), len(red)) > 256
    assert green.max() < red.min()  # the first prompt is framed as right, the second as wrong


def test_embedded_defaults(run, emoji, tmp_path):
    data = json.loads(run("compare", "-o", tmp_path, "-p", "a photo of a bench", "--json").stdout)
    assert (data["model"], data["steps"], data["scale"], data["columns"][0]["label"]) == (
        "emoji",
        20,
        3.0,
        "CFG 3",
    )


def test_interrupt_keeps_finished_images(run, folder, tmp_path, monkeypatch):
    forward, calls = UNet2DConditionModel.forward, []

    def interrupted(self, sample, timestep, encoder_hidden_states, **rest):
        calls.append(1)
        if (
            len(calls) == 2 + 4 + 2
        ):  # two steps to warm up, the plain column, then the second step of the next
            raise KeyboardInterrupt
        return forward(self, sample, timestep, encoder_hidden_states, **rest)

    monkeypatch.setattr(UNet2DConditionModel, "forward", interrupted)
    result = run("compare", "-m", folder, "-o", tmp_path, "-p", "x", "-s", 4, "-t", "cfg")
    assert result.exit_code == 130
    assert result.stderr == f"diffalign: stopped: 1 of 2 images are kept in {tmp_path / 'images'}\n"
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["00-000-x-s0-0.png"]
    assert not (tmp_path / "compare.png").exists()


@pytest.mark.slow
def test_demo_runs_one_official_prompt_of_each_category(emoji, run, tmp_path):
    result = run("demo", "--output", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    official = {entry["prompt"]: entry["tag"] for entry in prompts()}
    assert [official[i["prompt"]] for i in data["images"]] == 2 * list(TAGS)
    assert [c["label"] for c in data["columns"]] == ["CFG 3", "adaptive-guidance"]
    assert data["steps"] == 20
    assert all(c["judged"] == 6 for c in data["columns"])
    assert (tmp_path / "compare.png").exists()


def test_demo_takes_the_nth_prompt_of_each_category():
    first, last = prompts_of(0), prompts_of(79)
    groups = {tag: [e["prompt"] for e in prompts() if e["tag"] == tag] for tag in TAGS}
    assert first == [group[0] for group in groups.values()]
    assert last == [group[79 % len(group)] for group in groups.values()]
