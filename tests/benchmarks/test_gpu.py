"""The benchmark of a GPU, from its options to its page, on models of a few kilobytes; and the true
sizes, on shapes alone."""

import json

import pytest
import torch

SD3 = "SD3 medium"


@pytest.fixture(scope="module")
def gpu(benchmark_module):
    return benchmark_module("gpu")


def run(gpu, folder, *more):
    arguments = ["--device", "cpu", "--tiny", "--runs", "1", "--output", str(folder), *more]
    code = gpu.main(arguments)
    return code, json.loads((folder / "gpu_cpu.json").read_text())


@pytest.fixture(scope="module")
def whole(gpu, tmp_path_factory):
    """Every cell that is not compiled."""
    folder = tmp_path_factory.mktemp("gpu")
    return folder, *run(gpu, folder, "--no-compile")


@pytest.mark.slow
def test_every_cell_is_a_row(gpu, whole):
    folder, code, data = whole
    rows = data["rows"]
    assert (code, data["facts"]["left out"]) == (0, [])
    kernels = [row for row in rows if row["part"] == "kernels"]
    names = 7 * ["NAG"] + 7 * ["PLADIS"] + 2 * ["tokens"] + 2 * ["selection"]
    assert [row["what"] for row in kernels] == names
    assert all(row["chosen"].startswith("torch: cpu") for row in kernels)
    steps = {(row["model"], row["what"]): row for row in rows if row["part"] == "eager"}
    expected = [(name, w) for name, m in gpu.MODELS.items() for w in ("plain", *m.techniques)]
    assert list(steps) == expected
    for (model, what), row in steps.items():
        assert row["ms per step"] > 0
        assert (row["beside"] == 1.0) == (what == "plain")
        assert row.get("bits") == ("the same" if what == "CFG" else None), (model, what)
        acting = what in ("NAG", "PLADIS", "CAT")
        assert bool(row.get("acted")) == acting
        assert not acting or not row["acted"].startswith("0 ")
    page = (folder / "gpu_cpu.md").read_text()
    assert "no time means anything" in page
    assert page.count("\n| model | kernel |") == page.count("\n| part | model |") == 1


@pytest.mark.slow
def test_a_second_run_measures_what_is_missing(gpu, whole, capsys):
    folder, _, before = whole
    path = folder / "gpu_cpu.json"
    lost = {**before["rows"][-1], "failed": "out of luck"}
    path.write_text(json.dumps({**before, "rows": [*before["rows"][:-1], lost]}))
    capsys.readouterr()
    code, data = run(gpu, folder, "--no-compile")
    begun = [line for line in capsys.readouterr().out.splitlines() if " s  " in line[:9]]
    assert code == 0
    assert [line[9:] for line in begun] == [" ".join(lost[k] for k in ("part", "model", "what"))]
    assert data["rows"][:-1] == before["rows"][:-1]
    assert "failed" not in data["rows"][-1]


@pytest.mark.slow
def test_compiled_steps(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.kernels, "LAYERS", {})
    code, data = run(gpu, tmp_path, "--models", SD3)
    compiled = [row for row in data["rows"] if row["part"] == "compiled"]
    assert code == 0, data["rows"]
    assert [row["what"] for row in compiled] == ["plain", "CFG", "NAG"]
    assert compiled[1]["bits"] == "the same"


def test_a_budget_is_kept_and_said(gpu, tmp_path):
    code, data = run(gpu, tmp_path, "--seconds", "1")
    assert (code, data["rows"]) == (0, [])
    assert len(data["facts"]["left out"]) == len(
        list(gpu.cells(gpu.parsed(["--device", "cpu", "--tiny"])))
    )
    assert "Not measured in 1 s: kernels SDXL 64x64 NAG" in (tmp_path / "gpu_cpu.md").read_text()


def test_what_fails_is_a_row_and_the_rest_goes_on(gpu, tmp_path, monkeypatch):
    def fail(*_):
        raise SystemExit("torch is wrong:\nerror 1")

    layers = {"SDXL 64x64": gpu.kernels.LAYERS["SDXL 64x64"]}
    monkeypatch.setattr(gpu.kernels, "LAYERS", layers)
    monkeypatch.setattr(gpu.kernels, "nag_row", fail)
    monkeypatch.setattr(gpu, "MODELS", {})
    code, data = run(gpu, tmp_path, "--no-compile")
    assert code == 1
    assert data["rows"][0]["failed"] == "SystemExit: torch is wrong: error 1"
    assert data["rows"][1]["chosen"]
    assert "torch is wrong" in (tmp_path / "gpu_cpu.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "sees no GPU"),
        (["--device", "cpu"], "needs --tiny"),
        (["--device", "cpu", "--tiny", "--runs", "0"], "must be positive"),
        (["--device", "cpu", "--tiny", "--seconds", "nan"], "must be positive"),
    ],
)
def test_bad_input(gpu, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        ("SDXL", 4 * 128 * 128),
        (SD3, 16 * 128 * 128),
        ("Flux.1", 64 * 4096),
        ("Wan 2.1 1.3B", 21 * 60 * 104 * 16),
    ],
)
def test_the_true_sizes(gpu, model, tokens):
    """A step at the published width and length, without values; ``tokens``: numbers of a latent."""
    size = gpu.Place(depth=gpu.BLOCKS, where="meta")
    pipe = gpu.MODELS[model].build(size)
    denoiser = gpu.nag_cost.denoiser_of(pipe)
    denoiser.to(torch.bfloat16)
    gpu.nag_cost.on_meta(denoiser)
    call = gpu.MODELS[model].inputs(size) | {"num_inference_steps": 1, "output_type": "latent"}
    pipe.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe), "_execution_device", torch.device("cpu"))
        latents = pipe(**call)[0]
    assert latents.numel() == tokens
