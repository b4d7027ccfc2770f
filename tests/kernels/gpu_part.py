"""The GPU part of ``benchmarks/kernels.py`` from its options to its report, with the kernels
interpreted on the CPU.

``test_benchmark.py`` starts this file in a process of its own. Replaced are the clock, the place of
the tensors and what torch says about the device; choice of the kernels, comparison with the truth,
columns and title are the benchmark's own.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import kernels
import torch

from diffalign.kernels import nag, pladis

if __name__ == "__main__":
    wall, generator = kernels.timer(False), torch.Generator
    kernels.timer = lambda gpu: wall
    torch.Generator = lambda device: generator()
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_name = lambda index: "no GPU: Triton's interpreter"
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(
        shared_memory_per_block_optin=227 << 10
    )
    nag.why_not_triton = pladis.why_not_triton = lambda device: None
    kernels.main(
        [
            "--device",
            "cuda",
            "--dtype",
            "float16",
            "--runs",
            "1",
            "--no-compile",
            "--share",
            "2048",
            "--output",
            sys.argv[1],
        ]
    )
