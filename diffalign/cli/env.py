"""``diffalign env``: what a bug report needs to say."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from diffalign.cli import show
from diffalign.cli.arguments import Json
from diffalign.cli.problem import command

PACKAGES = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "open-clip-torch",
    "pillow",
    "numpy",
    "typer",
)
EXTRAS = {
    "app": ("gradio",),
    "eval": ("pyarrow", "scipy"),
    "ocr": ("rapidocr", "onnxruntime"),
    "ray": ("ray",),
    "video": ("av",),
    "triton": ("triton",),
    "xformers": ("xformers",),
}


def version_of(package: str) -> str | None:
    """The installed version, None when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def devices() -> list[str]:
    """Where a pipeline can run, the first choice first."""
    import torch

    names = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(i)
        names.append(
            f"cuda:{i} {facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute capability "
            f"{facts.major}.{facts.minor}"
        )
    return [
        *names,
        *(["mps"] if torch.backends.mps.is_available() else []),
        f"cpu {platform.processor() or platform.machine()}",
    ]


def kernels() -> dict[str, str]:
    """Fused kernels: "usable", or why not."""
    import torch

    from diffalign.kernels.choice import why_not_triton

    if not torch.cuda.is_available():
        return {"triton": "not usable: no CUDA device", "xformers": "not usable: no CUDA device"}
    reason = why_not_triton(torch.device("cuda"))
    missing = find_spec("xformers") is None
    return {
        "triton": "usable" if reason is None else f"not usable: {reason}",
        "xformers": "not usable: xformers is not installed" if missing else "usable",
    }


def facts() -> dict[str, Any]:
    """Everything, as data."""
    import torch

    from diffalign import __version__

    return {
        "diffalign": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "devices": devices(),
        "threads": {
            "torch": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "extras": {
            extra: all(version_of(name) for name in names) for extra, names in EXTRAS.items()
        },
        "kernels": kernels(),
        "executable": sys.executable,
    }


@command
def env(json: Json = False) -> None:
    """Versions, devices, threads, extras, and whether the fused kernels can be used."""
    known = facts()
    if json:
        show.text(show.to_json(known))
        return
    threads = known["threads"]
    rows = [
        ("diffalign", known["diffalign"]),
        ("python", f"{known['python']}, {known['platform']}"),
        *((name, version or "not installed") for name, version in known["packages"].items()),
        ("devices", "\n".join(known["devices"])),
        (
            "threads",
            f"{threads['torch']} of {threads['cpus']} CPUs (OMP_NUM_THREADS: "
            f"{threads['OMP_NUM_THREADS'] or 'not set'})",
        ),
    ]
    for name, installed in known["extras"].items():
        state = "installed" if installed else f"not installed: pip install 'diffalign[{name}]'"
        rows.append((f"extra {name}", state))
    rows += [(f"kernels {name}", state) for name, state in known["kernels"].items()]
    show.table(["what", "value"], rows)
