"""``check``: what is right is ok, what is wrong is said, one failure does not hide the others, and
the file holds everything."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from typer.testing import CliRunner

import diffalign as da
from diffalign import cli
from diffalign.cli import examination
from diffalign.cli.examination import Examination, Finding, faults
from diffalign.core import COND, Guidance
from diffalign.core.registry import TECHNIQUES
from diffalign.generate.models import Setting, open_model
from diffalign.kernels import agreement
from diffalign.kernels.choice import Choice
from diffalign.seams.support import Support

STEPS = 4


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """Every technique on a tiny model: what was printed and what was written."""
    place = tmp_path_factory.mktemp("check")
    further = ["-t", "fdg:high=3", "-t", "adaptive-guidance+pladis"]
    arguments = ["check", "--model", folder, "--steps", STEPS, "--output", place / "new", *further]
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    return result, json.loads((place / "new" / "check.json").read_text())


def by_name(data):
    return {finding["name"]: finding for finding in data["findings"]}


@pytest.mark.slow
def test_every_technique_runs(whole):
    result, data = whole
    found = by_name(data)
    assert result.exit_code == 0, result.stdout
    assert (data["failed"], data["finished"], data["steps"]) == (0, True, STEPS)
    assert set(da.techniques()) <= set(found)
    assert len(data["findings"]) == sum(data[k] for k in ("ok", "refused", "skipped"))
    assert found["cfg"]["remark"] == "the plain image, bit for bit"
    assert found["cfg"]["nfe"] == found["cfg"]["declared"] == found["off"]["nfe"] == 2 * STEPS
    assert found["pag"]["nfe"] == found["pag"]["declared"] == 3 * STEPS
    assert found["nag"]["options"][0]["negative_prompt"]
    assert "convolutions" in found["cat"]["remark"]
    assert found["auto-guidance"]["result"] == "skipped"
    both = found["adaptive-guidance+pladis"]
    assert both["result"] == "ok"
    assert [c["name"] for c in both["options"]] == ["adaptive-guidance", "pladis"]
    for finding in data["findings"]:
        if finding["options"] and finding["result"] == "ok":
            assert finding["seconds"] > 0
            assert finding["plain_seconds"] > 0


@pytest.mark.slow
def test_the_file_says_where_it_ran_and_no_path(whole):
    _, data = whole
    assert data["environment"]["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert "executable" not in data["environment"]
    assert data["environment"]["kernels"]["triton"]
    assert (data["device"], data["dtype"]) == ("cpu", "float32")


@pytest.mark.slow
def test_the_table_has_every_finding(whole):
    result, data = whole
    for name in by_name(data):
        assert name.split(":")[0] in result.stdout
    assert "check.json" in result.stdout


def test_what_cannot_be_used_is_refused(run, folder, tmp_path):
    for arguments, word in (
        (["--seconds", "0"], "--seconds"),
        (["--seconds", "nan"], "--seconds"),
        (["--seconds", "inf"], "--seconds"),
        (["--steps", "0"], "--steps"),
        (["--model", "no-such"], "no-such"),
        (["--technique", "no-such"], "no-such"),
        (["--device", "abacus"], "abacus"),
    ):
        result = run("check", "--model", folder, "--output", tmp_path / "x", *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert word in result.stderr
        assert not (tmp_path / "x").exists()
    (tmp_path / "check.json").mkdir()
    assert run("check", "--model", folder, "--output", tmp_path).exit_code == 2


@dataclass(frozen=True, slots=True)
class Bad(Guidance[None]):
    """The conditional model, with something wrong."""

    def passes(self, step, state):
        return (COND,)

    def combine(self, preds, step, state):
        return preds[COND], None


class Broken(Bad):
    def combine(self, preds, step, state):
        raise RuntimeError("out of\nluck")


class Spoiler(Bad):
    """Changes the model for good."""

    def resolve(self, context):
        with torch.no_grad():
            next(context.module.parameters()).add_(0.1)
        return self


class Picky(Bad):
    """Has no values for this call."""

    def resolve(self, context):
        raise LookupError(f"nothing is known for {context.steps} steps")


@pytest.fixture
def model(folder):
    return open_model(str(folder), Setting(steps=2))


@pytest.fixture
def only(monkeypatch):
    """An examination that knows these techniques alone."""

    def make(model, **classes):
        for name, cls in classes.items():
            monkeypatch.setitem(TECHNIQUES.registered, name, cls)
        table = [Support(name, True, "", "") for name in classes]
        monkeypatch.setattr(examination, "supports", lambda pipe: table)
        return Examination(model, 60.0, 2)

    return make


def finished(examined):
    list(examined.examine())
    return {finding.name: finding for finding in examined.findings}


def test_one_failure_does_not_hide_the_others(only, model):
    found = finished(only(model, broken=Broken, spoiler=Spoiler, picky=Picky, fine=Bad))
    assert found["broken"].result == "failed"
    assert found["broken"].remark == "RuntimeError: out of luck"
    assert found["spoiler"].result == "failed"
    assert "another image" in found["spoiler"].remark
    assert found["picky"].result == "refused"
    assert found["picky"].remark == "nothing is known for 2 steps"
    assert (found["fine"].result, found["fine"].nfe, found["fine"].declared) == ("ok", 2.0, 2.0)


def test_what_is_counted_must_be_declared_and_finite(only, model):
    examined = only(model, fine=Bad)
    finding = finished(examined)["fine"]
    plain = examined.plain
    assert faults(finding, plain, plain, True) == ["4 evaluations, 2 are declared"]
    more = replace(plain, rows=plain.rows + 1)
    assert "5 rows entered the model and 4 were counted" in faults(finding, more, plain, True)
    lost = replace(plain, latents=plain.latents * float("nan"))
    assert "NaN or infinity in the image" in faults(finding, lost, plain, True)
    other = replace(plain, latents=plain.latents + 1)
    wrong = faults(Finding("cfg", "ok"), other, plain, True)
    assert wrong[0].startswith("not the pipeline's own guidance")
    near = replace(plain, latents=plain.latents * (1 + 1e-6))
    assert faults(Finding("cfg", "ok"), near, plain, True)
    assert not faults(Finding("cfg", "ok"), near, plain, True, rounding=2e-6)
    assert not faults(Finding("cfg", "ok"), other, plain, repeats=False)


def test_a_pipeline_that_does_not_repeat_itself_is_not_compared(only, model, monkeypatch):
    examined, run = only(model, fine=Bad), Examination.run
    noise = iter(range(100))

    def restless(self, *group):
        result = run(self, *group)
        return replace(result, latents=result.latents + next(noise))

    monkeypatch.setattr(Examination, "run", restless)
    found = finished(examined)
    assert found["off"].result == "skipped"
    assert found["fine"].result == "ok"


def test_a_pipeline_that_fails_ends_it(only, model, monkeypatch):
    examined = only(model, fine=Bad)
    monkeypatch.setattr(model.pipe, "encode_prompt", None)
    found = finished(examined)
    assert found["off"].result == "failed"
    assert "fine" not in found


def test_nothing_begins_after_the_time(only, model):
    examined = only(model, fine=Bad)
    examined.budget = 0.0
    assert finished(examined)["fine"].remark == "the 0 s were over"


def test_a_kernel_that_is_wrong_or_does_not_run(only, model, monkeypatch):
    monkeypatch.setattr(
        agreement.nag, "choose", lambda z: Choice(lambda pos, neg, **s: pos, "triton: wrong")
    )
    found = finished(only(model))
    assert found["kernel nag"].result == "failed"
    assert "triton: wrong" in found["kernel nag"].remark
    assert found["kernel pladis"].result == "ok"
    monkeypatch.setattr(agreement.pladis, "choose", lambda q, k: 1 / 0)
    assert finished(only(model))["kernels"].remark.startswith("ZeroDivisionError")


def test_a_failure_is_exit_code_one_and_an_interruption_keeps_what_is_known(
    run, folder, tmp_path, only, model, monkeypatch
):
    only(model, broken=Broken, fine=Bad)
    arguments = ("check", "--model", folder, "--steps", 2, "--output", tmp_path)
    result = run(*arguments, "--json")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert data == json.loads((tmp_path / "check.json").read_text())
    assert (data["failed"], data["finished"]) == (1, True)

    def stop(device, dtype):
        raise KeyboardInterrupt

    monkeypatch.setattr(examination, "kernels_on", stop)
    result = run(*arguments)
    assert result.exit_code == 130
    assert "check.json" in result.stderr
    data = json.loads((tmp_path / "check.json").read_text())
    assert not data["finished"]
    assert [finding["name"] for finding in data["findings"]] == ["off"]
