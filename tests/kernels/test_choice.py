"""Why a form was picked, and that it is said once."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffalign.kernels import choice, nag, pladis
from diffalign.kernels.layout import aligned
from diffalign.kernels.nag import triton as nag_triton
from diffalign.kernels.pladis import tiles
from diffalign.kernels.pladis import triton as pladis_triton


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where Triton runs, with the shared memory of compute capability 9.0; tensors stay
    on the CPU."""
    for module in (nag, pladis):
        monkeypatch.setattr(module, "why_not_triton", lambda device: None)
    properties = type("Properties", (), {"shared_memory_per_block_optin": 227 << 10})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_reasons_without_triton(monkeypatch):
    assert choice.why_not_triton(torch.device("cpu")) == "cpu tensors"
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choice.why_not_triton(cuda) == "compute capability 7.5 is below 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choice.why_not_triton(cuda) is None
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    assert choice.why_not_triton(cuda) == "triton is not installed"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in str(choice.why_not_triton(cuda))


def test_fallback_is_logged_once(caplog):
    choice.note_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="diffalign.kernels"):
        for _ in range(3):
            nag.choose(torch.zeros(1, 1, 16))
        nag.choose(torch.zeros(1, 1, 24))
    assert [r.getMessage() for r in caplog.records] == [
        "nag: torch: cpu tensors (float32 rows of 16 channels)",
        "nag: torch: cpu tensors (float32 rows of 24 channels)",
    ]


def test_demanded_backends():
    z = torch.zeros(1, 1, 16)
    with pytest.raises(
        ValueError, match="backend='triton' cannot run for float32 rows of 16 channels: cpu tensors"
    ):
        nag.choose(z, backend="triton")
    with pytest.raises(ValueError, match="'auto', 'torch' or 'triton'; got 'fast'"):
        nag.choose(z, backend="fast")


@pytest.mark.usefixtures("h100")
def test_fused_forms_are_picked_where_they_fit():
    z = torch.zeros(1, 1, 640, dtype=torch.bfloat16)
    assert nag.choose(z) == (nag_triton.nag, "triton: bfloat16 rows of 640 channels")
    assert (
        nag.choose(z, backend="torch").reason == "torch: asked for (bfloat16 rows of 640 channels)"
    )
    assert nag.choose(z[..., :36]).call is nag.nag
    q, k = (
        torch.zeros(2, 10, 64, 64, dtype=torch.float16),
        torch.zeros(2, 10, 77, 64, dtype=torch.float16),
    )
    assert pladis.choose(q, k) == (pladis_triton.pladis, "triton: float16, head size 64, 77 keys")
    assert (
        pladis.choose(q, k, torch.ones(2, 1, 1, 77, dtype=torch.bool)).call is pladis_triton.pladis
    )


@pytest.mark.usefixtures("h100")
def test_pladis_refusals():
    def reason(
        size: int, keys: int, dtype: torch.dtype = torch.float16, mask: torch.Tensor | None = None
    ) -> str:
        q, k = torch.zeros(1, 2, 4, size, dtype=dtype), torch.zeros(1, 2, keys, size, dtype=dtype)
        picked = pladis.choose(q, k, mask)
        assert picked.call is pladis.pladis
        return picked.reason

    assert "float32 is not a 16-bit dtype" in reason(64, 77, torch.float32)
    assert "no tile for head size 36 with 77 keys" in reason(36, 77)
    assert "no tile for head size 64 with 513 keys" in reason(64, 513)
    assert "no tile for head size 160 with 300 keys" in reason(160, 300)
    assert "not one row of keys per batch entry" in reason(
        64, 77, mask=torch.ones(4, 77, dtype=torch.bool)
    )
    assert "not one row of keys per batch entry" in reason(
        64, 77, mask=torch.ones(1, 2, 1, 77, dtype=torch.bool)
    )


def test_shared_memory_decides(monkeypatch):
    assert tiles.refusal(torch.float16, 128, 512, 163) is None
    assert "needs 148 KB of shared memory, the device has 99" in str(
        tiles.refusal(torch.float16, 128, 512, 99)
    )
    assert tiles.refusal(torch.float16, 128, 256, 99) is None
    monkeypatch.setattr(pladis, "why_not_triton", lambda device: None)
    q, k = (
        torch.zeros(1, 1, 4, 128, dtype=torch.float16),
        torch.zeros(1, 1, 512, 128, dtype=torch.float16),
    )
    for limit, form in (
        (148 << 10, pladis_triton.pladis),
        ((148 << 10) - 1024, pladis.pladis),
        (99 << 10, pladis.pladis),
    ):
        properties = type("Properties", (), {"shared_memory_per_block_optin": limit})
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device, found=properties: found
        )
        assert pladis.choose(q, k).call is form


@pytest.mark.parametrize(
    ("view", "copied"),
    [
        (lambda t: t, False),
        (lambda t: t[:, 1:, :16], False),
        (lambda t: t[:, :, 8:24], False),
        (lambda t: t[:, :, 3:19], True),  # starts off a 16-byte boundary
        (lambda t: t.as_strided((2, 5, 16), (160, 32, 2)), True),  # elements apart
        (lambda t: t.as_strided((2, 5, 16), (160, 20, 1)), True),  # rows at odd distances
        (lambda t: t.as_strided((2, 2, 16), (100, 32, 1)), True),  # batch entries at odd distances
    ],
)
def test_rows_are_copied_exactly_where_16_byte_loads_need_it(view, copied):
    t = view(torch.arange(320.0).view(2, 5, 32))
    got = aligned(t)
    assert (got is t) is not copied
    assert torch.equal(got, t)


def test_nothing_imports_triton_before_a_launch():
    code = (
        "import sys, torch, diffalign.kernels.nag as nag, diffalign.kernels.pladis as pladis\n"
        "z = torch.zeros(1, 2, 4, 8); nag.choose(z[0]); pladis.choose(z, z)\n"
        "import diffalign.kernels.nag.triton, diffalign.kernels.pladis.triton\n"
        "assert 'triton' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
