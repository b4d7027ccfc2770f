"""Compile every kernel configuration that the heuristics can choose, without a GPU, and read its
resources off the binary.

``python tests/kernels/aot.py --write`` renews the checked-in tables; ``--only TEXT`` compiles the
entries whose name contains it. Run without TRITON_INTERPRET. One line of JSON per configuration
goes to standard output.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffalign.kernels.entmax.newton import iterations
from diffalign.kernels.layout import row_plan
from diffalign.kernels.nag import triton as nag
from diffalign.kernels.pladis import tiles
from diffalign.kernels.pladis import triton as pladis
from diffalign.kernels.selection import program as selection
from diffalign.kernels.selection import triton as selecting
from diffalign.kernels.tokens import triton as tokens
from diffalign.kernels.tokens.program import write_rows

TABLE = Path(__file__).with_name("resources.json")
PAGE = Path(__file__).with_name("resources.md")
SHARED_KB = {80: 163, 90: 227}  # per block, CUDA programming guide, table of compute capabilities
FIELDS = ("registers", "spilled_bytes", "shared_bytes", "wide_loads")
NAG_CHANNELS = (
    320,
    640,
    768,
    1152,
    1280,
    1536,
    2048,
    2240,
    2432,
    3072,
    3840,
    4096,
    5120,
)  # widths of the known models
# heads and their size of the models that leave tokens out: PixArt, SD3 medium, SD3.5 large, and
# Flux, Chroma and Qwen-Image
TOKEN_HEADS = ((16, 72), (24, 64), (38, 64), (24, 128))


class Job(NamedTuple):
    """One binary: a kernel, its compile-time constants and the target."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    arch: int


def jobs() -> Iterator[Job]:
    """Every (kernel, configuration, dtype, architecture) that ``choose`` can lead to, for the
    channel widths of the known models."""
    for arch in SHARED_KB:
        for dtype in ("fp16", "bf16", "fp32"):
            for channels in NAG_CHANNELS:
                block, warps = nag.plan(channels)
                for l1 in (True, False):
                    constants = {"E": channels, "BLOCK": block, "L1": l1}
                    types = dict.fromkeys(("POS", "NEG", "OUT"), f"*{dtype}") | dict.fromkeys(
                        ("scale", "tau", "alpha"), "fp32"
                    )
                    yield Job(
                        f"nag E{channels} {'l1' if l1 else 'l2'} {dtype} sm_{arch}",
                        nag.kernel(),
                        types,
                        constants,
                        warps,
                        arch,
                    )
        for dtype in ("fp16", "bf16"):
            for size in tiles.HEAD_DIMS:
                for tile in tiles.KEY_TILES:
                    plan = tiles.plan(size, tile)
                    if plan is not None and plan.shared_kb <= SHARED_KB[arch]:
                        yield from _pladis(size, tile, plan, dtype, arch)
        yield from _tokens(arch)
        yield from _selection(arch)


def _selection(arch: int) -> Iterator[Job]:
    tiles = {"ROWS": selecting.ROWS, "TILE": selecting.TILE}
    types = {"VALUES": "*fp32", "LABELS": "*i64", "OUT": "*i64"}
    yield Job(f"selection ranks i64 sm_{arch}", selection.rank_tokens, types, tiles, 4, arch)
    size = 1
    while size <= selecting.MAX_TOKENS:
        block, warps = row_plan(size)
        types = {"KEYS": "*i64", "OUT": "*i64"}
        name = f"selection N{block} i64 sm_{arch}"
        yield Job(name, selection.smallest_of_row, types, {"BLOCK": block}, warps, arch)
        size = 2 * block


def _tokens(arch: int) -> Iterator[Job]:
    dtypes = (torch.bfloat16, torch.float32)
    sizes = {tokens.words(dtype, *heads) for heads in TOKEN_HEADS for dtype in dtypes}
    for whole, each in sorted(sizes):
        block, warps = row_plan(whole)
        for text_first in (True, False):
            constants = {"E": whole, "D": each, "BLOCK": block, "TEXT_FIRST": text_first}
            types = dict.fromkeys(("K", "V", "KEYS", "VALUES"), "*i32") | {"INDEX": "*i64"}
            place = "first" if text_first else "last"
            name = f"tokens E{whole} D{each} text-{place} i32 sm_{arch}"
            yield Job(name, write_rows, types, constants, warps, arch)


def _pladis(size: int, tile: int, plan: tiles.Plan, dtype: str, arch: int) -> Iterator[Job]:
    for sparsemax in (False, True):
        for bias in (False, True):
            for anchored in (False, True):
                constants = {
                    "D": size,
                    "HEAD_TILE": plan.head_tile,
                    "KEY_TILE": plan.key_tile,
                    "ROWS": plan.rows,
                    "STEPS": iterations(tile),
                    "SPARSEMAX": sparsemax,
                    "HAS_BIAS": bias,
                    "ANCHORED": anchored,
                }
                types = dict.fromkeys(("Q", "K", "V", "OUT"), f"*{dtype}") | {
                    "scale": "fp32",
                    "strength": "fp32",
                }
                for name, used, kind in (
                    ("BIAS", bias, "*fp32"),
                    ("BASE", anchored, f"*{dtype}"),
                    ("MASS", anchored, f"*{dtype}"),
                ):
                    if used:
                        types[name] = kind
                    else:
                        constants[name] = None
                form = "sparsemax" if sparsemax else "entmax"
                form += " bias" * bool(bias) + " joint" * bool(anchored)
                name = f"pladis D{size} K{tile} {form} {dtype} sm_{arch}"
                yield Job(name, pladis.kernel(), types, constants, plan.warps, arch)


def build(job: Job) -> Any:
    """The binary of one job."""
    names = job.kernel.arg_names
    signature = {n: "constexpr" if n in job.constants else job.types.get(n, "i32") for n in names}
    attrs = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")
    }
    source = ASTSource(fn=job.kernel, signature=signature, constexprs=job.constants, attrs=attrs)
    return triton.compile(
        source,
        target=GPUTarget("cuda", job.arch, 32),
        options={"num_warps": job.warps, "num_stages": 1},
    )


def compiled(job: Job) -> dict[str, int]:
    """Registers, spilled and shared bytes of one binary, and its PTX's widest global loads."""
    binary = build(job)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{job.name}: cuobjdump printed no resource line: {usage}")
    registers, stack, _, local = map(int, found.groups())
    ptx = binary.asm["ptx"]
    wide = len(
        re.findall(r"ld\.global[\w.:]*\.v4\.b32|cp\.async\.c[ag]\.shared\.global .*, 0x10,", ptx)
    )
    return dict(zip(FIELDS, (registers, stack + local, binary.metadata.shared, wide)))


def page(table: dict[str, Any]) -> str:
    """The table as Markdown: the worst binary of each (kernel, size, key tile, architecture) over
    dtypes and forms."""
    worst: dict[tuple[str, ...], list[int]] = {}
    for name, values in table["configurations"].items():
        kernel, *rest, arch = name.split()
        sizes = rest[:1] if kernel in ("nag", "selection") else rest[:2]
        row = worst.setdefault((kernel, " ".join(sizes), arch), [0, 0, 0, 0, 1 << 30])
        row[:] = [row[0] + 1, *map(max, row[1:4], values[:3]), min(row[4], values[3])]
    lines = [
        "# Resources of the Triton kernels",
        "",
        f"Compiled ahead of time by `tests/kernels/aot.py --write` with Triton {table['triton']}; "
        "nothing here was run on a GPU. One line",
        "holds the worst of its binaries (dtypes; with and without bias, cross and joint form, "
        "entmax and sparsemax; for NAG both norms; for tokens both orders).",
        "E channels, D head size (of tokens in words of 4 bytes), K keys of the tile, N tokens of "
        "a row. Wide loads are 16-byte loads from global memory in the PTX.",
        "",
        "| kernel | size | target | binaries | registers | spilled bytes | shared KB | wide loads "
        "|",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (kernel, size, arch), (count, registers, spilled, shared, wide) in worst.items():
        lines.append(
            f"| {kernel} | {size} | {arch} | {count} | {registers} | {spilled} | "
            f"{shared / 1024:.1f} | {wide} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        help="compile the entry of this name (may be repeated); default all",
    )
    parser.add_argument("--write", action="store_true", help="write the tables beside this file")
    options = parser.parse_args()
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    results = {}
    for job in jobs():
        if not options.only or job.name in options.only:
            results[job.name] = list(compiled(job).values())
            print(json.dumps({"name": job.name, "values": results[job.name]}), flush=True)
    if options.write:
        table = {"triton": triton.__version__, "fields": FIELDS, "configurations": results}
        TABLE.write_text(
            re.sub(
                r"\[\s+([^\]]*?)\s+\]",
                lambda m: "[" + " ".join(m[1].split()) + "]",
                json.dumps(table, indent=1),
            )
            + "\n"
        )
        PAGE.write_text(page(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
