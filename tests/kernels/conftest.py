"""One thread, and the global generator stays where it was."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state), (
        "a kernel or its test drew from the global generator"
    )


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
