"""Launch the fused kernels through Triton's own just-in-time path, with a stand-in for the driver,
and keep what it compiled.

``test_aot.py`` starts this file in a process of its own without the interpreter. A real call runs
up to the launch itself: signature, specialisation and options are those that a GPU would see. One
line of JSON per call: the entry of ``aot.py`` it should equal, and whether the machine code is the
same byte for byte.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # a cached binary may carry another file's line numbers

import aot
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from diffalign.kernels.nag import triton as nag
from diffalign.kernels.pladis import joint
from diffalign.kernels.pladis import triton as pladis
from diffalign.kernels.selection import triton as selection
from diffalign.kernels.tokens import triton as tokens

BF16 = torch.bfloat16
compiled: list[Any] = []
guarded: list[torch.device] = []


class Driver:
    """A GPU of compute capability 9.0 that nothing is ever sent to."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def launch(function: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """``function[grid]`` that compiles and does not launch."""
    assert all(0 < size < 65536 for size in grid[1:])
    return lambda *args, **options: compiled.append(
        function.run(*args, grid=grid, warmup=True, **options)
    )


class Guard:
    """In place of ``torch.cuda.device_of``: the launch must happen on the tensor's device."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __enter__(self) -> None:
        guarded.append(self.tensor.device)

    def __exit__(self, *error: object) -> None:
        pass


def calls() -> Iterator[tuple[str, Callable[[], Tensor]]]:
    setting = {"scale": 5, "tau": 2.5, "alpha": 1}
    z = torch.randn(2, 5, 640).to(BF16)
    for norm in ("l1", "l2"):
        yield (
            f"nag E640 {norm} bf16 sm_90",
            lambda norm=norm: nag.nag(z, z + 1, norm=norm, **setting),
        )
    yield "nag E640 l1 bf16 sm_90", lambda: nag.nag(z[:1, :1], z[:1, :1] + 1, **setting)
    q, k = (torch.randn(2, n, 10, 64).to(BF16).transpose(1, 2) for n in (3, 77))
    base, mass, mask = (
        torch.zeros(2, 10, 3, 64, dtype=BF16),
        torch.ones(2, 10, 3, dtype=BF16),
        torch.zeros(1, 1, 1, 80)[..., 3:],
    )
    for what, more in (
        ("entmax", {"strength": 2.0}),
        ("entmax", {"strength": 1, "scale": 1}),
        ("sparsemax", {"strength": 2.0, "alpha": 2}),
        ("entmax bias", {"strength": 2.0, "mask": torch.ones(2, 1, 1, 77, dtype=torch.bool)}),
        ("entmax bias", {"strength": 2.0, "mask": mask}),
        ("entmax joint", {"strength": 2.0, "base": base, "mass": mass}),
        ("entmax joint", {"strength": 2.0, "base": base}),
    ):
        yield (
            f"pladis D64 K128 {what} bf16 sm_90",
            lambda more=more: pladis.pladis(q, k, k + 1, **more),
        )
    for size in (40, 128):
        s = torch.randn(2, 4, 117, size).to(BF16)
        for text, image in ((slice(0, 77), slice(77, 117)), (slice(40, 117), slice(0, 40))):
            yield (
                f"pladis D{size} K128 entmax joint bf16 sm_90",
                lambda s=s, t=text, i=image: joint.pladis_joint(
                    s, s + 1, s + 2, text=t, image=i, strength=2.0, call=pladis.pladis
                ),
            )
    k = torch.randn(2, 24, 7, 64).to(BF16)
    for first in (True, False):
        keys, values = torch.zeros(2, 2, 24, 13, 64, dtype=BF16)
        index = torch.tensor([[1, 5, 8], [2, 3, 9]])
        yield (
            f"tokens E768 D32 text-{'first' if first else 'last'} i32 sm_90",
            lambda a=keys, b=values, k=k, i=index, f=first: tokens.write(
                a, b, k, k.clone(), i, text_first=f
            ),
        )
    labels = torch.arange(600).reshape(2, 300) % 7
    yield "selection ranks i64 sm_90", lambda: selection.ranks(labels.float(), labels)
    yield "selection N512 i64 sm_90", lambda: selection.smallest(labels, 90)


if __name__ == "__main__":
    driver.set_active(Driver())
    jit.JITFunction.__getitem__ = launch
    torch.cuda.device_of = Guard
    wanted = {job.name: job for job in aot.jobs()}
    for name, call in calls():
        compiled.clear(), guarded.clear()
        call()
        (ours,), expected = compiled, aot.build(wanted[name])
        products = re.findall(r"arith.muli .* : i(\d+)", ours.asm["ttir"])
        print(
            json.dumps(
                {
                    "name": name,
                    "same": ours.asm["cubin"] == expected.asm["cubin"],
                    "guarded": len(guarded) == 1,
                    "32-bit products": products.count("32"),
                    "tf32": "tf32" in ours.asm["ptx"],
                }
            ),
            flush=True,
        )
