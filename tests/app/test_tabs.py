"""What the tabs do without a browser: orders from fields, columns on the same noise, searches,
evaluations and cards; and that the code they show makes the same images."""

import base64
import io
import json
import re
import shlex
import sys
from dataclasses import replace

import gradio as gr
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import diffalign as da
from diffalign import cli
from diffalign.app import align, compare, evaluate, models, negative, snippets
from diffalign.app.desk import Progress, Run
from diffalign.app.sampling import Settings
from diffalign.core import Cancelled
from diffalign.core.registry import METHODS, parse

FEW = Settings("emoji", 3.0, 2, 7)
PROMPT = "a photo of a dog"


def values_of(form):
    return {component: component.value for component in form.fields.components.values()}


@pytest.fixture(scope="module")
def forms(shelf):
    with gr.Blocks():
        tabs = (compare, align, negative, evaluate)
        return {tab.__name__.rpartition(".")[2]: tab.form(shelf) for tab in tabs}


def test_the_first_state_of_each_tab_is_an_order(forms):
    order = forms["compare"].order(values_of(forms["compare"]))
    assert order.columns == (("adaptive-guidance", (da.AdaptiveGuidance(),)),)
    assert order.settings == Settings("emoji", 3.0, 20, 0)
    assert forms["align"].order(values_of(forms["align"])).method == da.BestOfN()
    nag = forms["negative"].order(values_of(forms["negative"])).nag
    assert nag == da.NAG(negative_prompt="a photo of a red apple")
    assert forms["evaluate"].order(values_of(forms["evaluate"])).techniques == (da.APG(),)


def test_columns_are_the_chosen_techniques_then_the_lines(forms):
    form = forms["compare"]
    values = values_of(form) | {form.names: ["cfg", "apg"], form.text: " nag:tau=2+pladis \n\n"}
    (eta,) = (c for c in form.controls.controls if c.key == "apg.eta")
    order = form.order(values | {eta.component: 0.5})
    assert [label for label, _ in order.columns] == ["cfg", "apg:eta=0.5", "nag:tau=2+pladis"]
    assert order.columns[2][1] == (da.NAG(tau=2.0), da.PLADIS())


@pytest.mark.parametrize(
    ("name", "field", "value", "words"),
    [
        ("compare", "names", [], "one to 4 techniques"),
        ("compare", "text", "cfg\n" * 4, "one to 4 techniques.* got 5"),
        ("compare", "text", "nagg", "Nearest: nag"),
        ("compare", "text", "a" * 2000, "may have 1500 letters"),
        ("compare", "prompt", " ", "prompt is empty"),
        ("compare", "negative", "b" * 501, "may have 500 letters"),
        ("align", "nfe", 1e9, "budget must be a whole number"),
        ("align", "techniques", "cfg:scale=high", "must be a number"),
        ("negative", "negative", "", "negative prompt is empty"),
        ("evaluate", "techniques", "", "Name techniques"),
        ("evaluate", "techniques", "nag:nothing=1", "no option"),
        ("evaluate", "prompts", float("nan"), "Prompts must be a whole number"),
    ],
)
def test_bad_input_is_one_line(forms, name, field, value, words):
    form = forms[name]
    with pytest.raises(gr.Error, match=words) as caught:
        form.order(values_of(form) | {getattr(form, field): value})
    assert not caught.value.print_exception


@pytest.mark.parametrize("field", ["scale", "steps", "seed"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 1e300, None])
def test_numbers_of_the_sampling_are_bounded(forms, field, value):
    form = forms["compare"]
    with pytest.raises(gr.Error, match="must be a"):
        form.order(values_of(form) | {getattr(form.sampling, field): value})


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(code):
    exec(compile(code, "copied", "exec"), {"__name__": "copied"})


def run_shell(code):
    """The commands of the page, by our own command line."""
    for line in code.replace(" \\\n", " ").splitlines():
        words = shlex.split(line)
        assert words[0] == "diffalign"
        result = CliRunner().invoke(cli.app, words[1:])
        assert result.exit_code == 0, result.output


def same(path, image):
    return np.array_equal(np.asarray(Image.open(path).convert("RGB")), np.asarray(image))


def close(path, image):
    """Equal but for the last bits: the command line draws several columns with its own batch."""
    return np.abs(np.asarray(Image.open(path).convert("RGB"), float) - np.asarray(image)).max() <= 1


@pytest.fixture(scope="module")
def compared(shelf, news):
    run = Run("visitor", print)
    columns = tuple((text, parse(text)) for text in ("interval-cfg:stop=0.5+pladis", "apg:cap=inf"))
    compare.draw(compare.Order(PROMPT, "a cat", FEW, columns), shelf, run)
    return news(run)


def test_columns_come_one_by_one_on_the_same_noise(compared):
    assert [len(sheet.columns) for sheet in compared] == [1, 2, 3]
    assert [sheet.finished for sheet in compared] == [False, False, True]
    columns = compared[-1].columns
    assert [c.label for c in columns] == ["CFG 3", "interval-cfg:stop=0.5+pladis", "apg:cap=inf"]
    assert [c.cells[1:3] for c in columns] == [["4", "2 of 2"], ["3", "1 of 2"], ["4", "2 of 2"]]
    assert len({c.sample.job.seed for c in columns}) == 1
    assert all(c.verdict is not None for c in columns)


@pytest.mark.slow
def test_comparison_as_python_and_as_commands(compared, place):
    sheet = compared[-1]
    run_python(sheet.python)
    for number, column in enumerate(sheet.columns):
        assert same(place / f"column-{number}.png", column.image)
    run_shell(sheet.shell)
    files = sorted((place / "outputs" / "compare" / "images").glob("*.png"))
    assert len(files) == 3
    for file, column in zip(files, sheet.columns):
        assert close(file, column.image)


def test_nothing_is_left_behind(opened, compared):
    assert type(opened.model.pipe).__call__ is type(da.load("emoji")).__call__
    assert da.active(opened.model.pipe) == ()


def test_a_stop_ends_a_drawing_at_its_next_step(shelf, run, monkeypatch):
    steps = []

    def tell(told):
        steps.append(told)
        if len(steps) == 3:
            run.stopped.set()

    monkeypatch.setattr(type(run), "tell", lambda self, told: tell(told))
    order = compare.Order(PROMPT, "", replace(FEW, steps=50), (("apg", (da.APG(),)),))
    with pytest.raises(Cancelled):
        compare.draw(order, shelf, run)
    assert steps == [Progress(i, 100, "CFG 3") for i in (1, 2, 3)]


def test_a_model_that_is_not_on_the_list_is_refused(shelf, run):
    order = compare.Order(PROMPT, "", replace(FEW, model="owner/name"), (("apg", (da.APG(),)),))
    with pytest.raises(ValueError, match="not on the list"):
        compare.draw(order, shelf, run)


@pytest.fixture(scope="module")
def avoided(shelf, news):
    run = Run("visitor", print)
    nag = da.NAG(tau=2.0, negative_prompt='a "cat", black')
    negative.draw(
        negative.Order("a photo of a dog and a cat", 'a "cat", black', FEW, nag), shelf, run
    )
    return news(run)[-1]


def test_nag_stands_beside_guidance(avoided):
    columns = avoided.columns
    assert [c.label for c in columns] == [
        "CFG 3, nothing to avoid",
        "CFG 3, negative prompt",
        "NAG without CFG",
        "NAG and CFG 3",
    ]
    assert [c.sample.report.nfe for c in columns[:3]] == [4, 4, 2]
    assert avoided.base == 1
    assert len({c.image.tobytes() for c in columns}) == 4


@pytest.mark.slow
def test_negative_prompts_as_python_and_as_commands(avoided, place):
    run_python(avoided.python)
    for number, column in enumerate(avoided.columns):
        assert same(place / f"column-{number}.png", column.image)
    run_shell(avoided.shell)
    files = sorted((place / "outputs" / "compare" / "images").glob("*.png"))
    for file, number in zip(files, (0, 2, 3), strict=True):
        assert close(file, avoided.columns[number].image)
    (file,) = (f for f in (place / "outputs").rglob("*.png") if "compare" not in f.parts)
    assert close(file, avoided.columns[1].image)


def test_without_guidance_nag_stands_beside_the_plain_model(shelf, opened):
    nag = da.NAG(negative_prompt="a cat")
    order = negative.Order(PROMPT, "a cat", replace(FEW, scale=1.0), nag)
    labels = [variant.label for variant in negative.variants_of(order, opened)]
    assert labels == ["plain", "NAG without CFG"]


def order_of_search(method, nfe, techniques="", steps=2, kernel=None):
    settings = replace(FEW, steps=steps)
    return align.Order(
        PROMPT,
        settings,
        METHODS.make(method)[0],
        "emoji-clip",
        kernel,
        nfe,
        parse(techniques) if techniques else (),
    )


@pytest.fixture(scope="module")
def aligned(shelf, news):
    run = Run("visitor", print)
    align.search(order_of_search("best-of-n:n=3", 40, "cfg:scale=2"), shelf, run)
    return news(run)


def test_a_search_is_told_while_it_runs_and_ends_with_its_result(aligned):
    first, last = aligned[0], aligned[-1]
    assert first.python
    assert not first.best
    assert last.result.scored == 3
    assert last.points == sorted(last.points)
    assert last.points[-1][1] == pytest.approx(max(score for _, score in last.best))
    assert first.best == []  # what was told does not change afterwards


@pytest.mark.slow
def test_a_search_as_python_and_as_a_command(aligned, place, capsys):
    result = aligned[-1].result
    run_python(aligned[-1].python)
    assert same(place / "aligned" / "image.png", result.image)
    run_shell(aligned[-1].shell)
    assert same(place / "outputs" / "align" / "image.png", result.image)


def test_a_stopped_search_keeps_the_best(shelf, run, news, monkeypatch):
    improved = []
    tell = type(run).tell

    def watched(self, told):
        improved.append(told)
        if getattr(told, "best", None):
            run.stopped.set()
        tell(self, told)

    monkeypatch.setattr(type(run), "tell", watched)
    align.search(order_of_search("random-search:noises=400", 4000), shelf, run)
    result = news(run)[-1].result
    assert result.end == "interrupted"
    assert 1 <= result.scored <= 4


def test_a_budget_that_is_too_small_is_said(shelf, run):
    with pytest.raises(ValueError, match="budget is too small"):
        align.search(order_of_search("best-of-n:n=3", 4), shelf, run)


def test_a_method_that_branches_says_what_it_needs(shelf, run):
    with pytest.raises(ValueError, match="needs children that differ"):
        align.search(order_of_search("dts-star", 60, steps=4), shelf, run)


@pytest.mark.slow
def test_a_tree_search_shows_its_tree(shelf, run, news):
    align.search(order_of_search("dts-star", 60, steps=4, kernel="eta"), shelf, run)
    with gr.Blocks():
        frame = align.frame()
    story = news(run)[-1]
    outputs = frame.show(story)
    assert "kernel='eta'" in story.python
    assert "--kernel eta" in story.shell
    assert outputs[frame.tree].visible
    assert outputs[frame.curve].visible
    assert len(outputs[frame.gallery]) >= 2


@pytest.fixture(scope="module")
def evaluation():
    return evaluate.Order(
        "apg:eta=0.5", parse("apg:eta=0.5"), "counting", 2, 1, replace(FEW, steps=1)
    )


@pytest.mark.slow
def test_an_evaluation_its_python_and_its_commands_agree(evaluation, shelf, run, news, place):
    evaluate.evaluate(evaluation, shelf, run)
    (finding,) = news(run)
    assert [row[0] for row in finding.rows] == ["emoji: plain", "emoji: apg:eta=0.5"]
    assert "minus emoji: plain" in finding.text
    assert 'sandbox="allow-scripts"' in evaluate.framed(finding.page)
    assert "<script" not in evaluate.framed(finding.page)
    run_python(finding.python)
    run_shell(finding.shell)
    files = [place / name / "results.json" for name in ("evaluated/report", "outputs/report")]
    one, other = (json.loads(file.read_text())["results"] for file in files)
    assert one == other
    means = {name: f"{result['mean_of_tags']['mean']:.3f}" for name, result in one.items()}
    assert {row[0]: row[1] for row in finding.rows} == means


def test_a_stopped_evaluation_ends_within_a_run_of_the_model(evaluation, shelf, run):
    run.stopped.set()
    with pytest.raises(Cancelled):
        evaluate.evaluate(replace(evaluation, prompts=40), shelf, run)


def test_a_card_says_what_works_and_why_not(shelf, run, news):
    models.describe("emoji", shelf, run)
    (card,) = news(run)
    assert "StableDiffusionPipeline, family" in card.text
    rows = {name: (works, why) for name, works, why in card.rows}
    assert rows["nag"][0] == "yes"
    assert rows["cat"][0] == "no"
    assert len(rows["cat"][1]) > 20


def test_a_card_as_python_and_as_a_command(shelf, run, news, capsys):
    for name in ("emoji", "FluxPipeline"):
        models.describe(name, shelf, run)
        card = news(run)[-1]
        run_python(card.python)
        run_shell(card.shell)
    assert "adaptive-guidance" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NoSuchPipeline", "NoSuchPipeline"),
        ("StableDiffusionUpscalePipeline", "StableDiffusionUpscalePipeline"),
        ("../../etc/passwd", "not on the list"),
        ("owner/name", "--allow"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_with_a_reason(shelf, run, name, words):
    with pytest.raises(ValueError, match=words):
        models.describe(name, shelf, run)


def test_literals_are_python():
    for value in (None, True, 1.5, "a 'b' \"c\"", (1, "x"), (0.5,), ()):
        assert eval(snippets.literal(value)) == value
    assert eval(snippets.literal((0.5, float("inf")))) == (0.5, float("inf"))


@pytest.mark.parametrize("text", ["nag:sigma=(0.5,inf),norm=l2", "cat:keep=0.5", "apg:cap=inf"])
def test_a_technique_as_python_and_as_text_is_itself(text):
    (technique,) = parse(text)
    assert eval(snippets.python_of(technique), {"da": da}) == technique
    assert parse(snippets.text_of(technique)) == (technique,)


def test_a_technique_of_a_notebook_is_named(monkeypatch):
    import dataclasses

    from diffalign.core.registry import TECHNIQUES

    @dataclasses.dataclass(frozen=True)
    class Mine(da.CFG):
        """A technique of a notebook."""

    monkeypatch.setitem(TECHNIQUES.registered, "mine", Mine)
    import diffalign.core.registry

    assert eval(snippets.python_of(Mine(2.0)), {"da": diffalign}) == Mine(2.0)
    assert sys.modules["diffalign.core.registry"].parse("mine:scale=2") == (Mine(2.0),)


def test_a_video_moves_on_the_page():
    from diffalign.testing.chain_videos import Law, numbers_of, search_chain

    def total(videos, prompts):
        return numbers_of(videos).sum(1)

    result = search_chain("linear-search:n=3", total, Law())
    text = align.moving(result)
    parts = re.findall(r'alt="([^"]+)" src="data:image/gif;base64,([^"]+)"', text)
    assert [name for name, _ in parts] == ["The first whole one", "The best"]
    for _, data in parts:
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert max(image.size) == 256
            durations = []
            for frame in range(image.n_frames):
                image.seek(frame)
                durations.append(image.info["duration"])
            assert sum(durations) == 4 * 120  # equal frames are one that lasts longer
    assert align.moving(replace(result, tensor=result.tensor[0])) == ""


def test_other_tabs_refuse_a_model_of_videos(shelf, opened, monkeypatch):
    monkeypatch.setattr(type(opened.model), "videos", True)
    with pytest.raises(ValueError, match="emoji makes videos; use the tab Align"):
        shelf.images("emoji")
