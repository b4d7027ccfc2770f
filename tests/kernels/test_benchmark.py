"""The kernel benchmark says where it ran, compares before it times, and times every form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def benchmark(benchmark_module):
    return benchmark_module("kernels")


def run(benchmark, folder: Path) -> None:
    benchmark.main(
        [
            "--runs",
            "1",
            "--no-compile",
            "--device",
            "cpu",
            "--share",
            "512",
            "--output",
            str(folder),
        ]
    )


@pytest.mark.slow
def test_report_of_a_cpu_run(benchmark, tmp_path):
    run(benchmark, tmp_path)
    report = json.loads((tmp_path / "kernels_cpu.json").read_text())
    assert {"device", "commit", "versions", "command"} <= set(report["environment"])
    assert report["options"]["seed"] == 0
    assert [row["model"] for row in report["rows"]] == 2 * list(benchmark.LAYERS)
    assert all(
        row["torch / published"] > 0 and row["chosen"].startswith("torch: cpu")
        for row in report["rows"]
    )
    assert all(row["sdpa / published"] > 0 for row in report["rows"])
    assert "run on a CPU: ratios in float32" in (tmp_path / "kernels_cpu.md").read_text()


@pytest.mark.slow
def test_report_of_the_gpu_part(tmp_path):
    script = Path(__file__).with_name("gpu_part.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "kernels_cuda.json").read_text())["rows"]
    assert [row["kernel"] for row in rows] == 7 * ["NAG epilogue"] + 7 * ["PLADIS"]
    for row in rows:
        assert row["chosen"].startswith("triton: ")
        assert {
            "sdpa ms",
            "published ms",
            "torch ms",
            "triton ms",
            "error published",
            "error triton",
        } <= set(row)
        assert ("GB/s at 3 sweeps, best" in row) == (row["kernel"] == "NAG epilogue")
        assert 0 < row["error triton"] < 1e-3
    assert (
        "run on a GPU: times in float16, 1/2048 of the image tokens"
        in (tmp_path / "kernels_cuda.md").read_text()
    )


def test_a_gpu_that_is_not_there_is_said(benchmark, capsys):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            benchmark.main(["--device", "cuda"])
        assert "sees no GPU" in capsys.readouterr().err


def test_published_forms_are_the_methods(benchmark, rng):
    pos, neg = (torch.randn(1, 5, 16, generator=rng, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(
        benchmark.published_nag(pos, neg),
        benchmark.nag.nag(pos, neg, **benchmark.NAG),
        rtol=0,
        atol=1e-13,
    )
    q, k, v = (torch.randn(1, 2, n, 8, generator=rng, dtype=torch.float64) for n in (5, 9, 9))
    ours = benchmark.pladis.pladis(q, k, v, strength=benchmark.STRENGTH)
    torch.testing.assert_close(benchmark.published_pladis(q, k, v), ours, rtol=0, atol=1e-12)


def test_a_wrong_form_is_not_timed(benchmark, tmp_path, monkeypatch):
    right = benchmark.nag.nag
    monkeypatch.setattr(
        benchmark.nag,
        "nag",
        lambda p, n, **s: right(p, n, **s) * (1 + 1e-4 * (p.dtype == torch.float32)),
    )
    with pytest.raises(SystemExit, match="torch is wrong"):
        run(benchmark, tmp_path)
    assert not list(tmp_path.iterdir())
