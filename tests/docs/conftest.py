"""The modules in ``docs/`` that make pages, and models that are loaded once."""

import functools
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def docs_module():
    """``load(name)``: docs/NAME.py as a module, its neighbours and the benchmarks importable."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("benchmarks", "docs"):
            patch.syspath_prepend(str(ROOT / folder))
        before = set(sys.modules)
        yield importlib.import_module
        for name in set(sys.modules) - before:
            place = getattr(sys.modules[name], "__file__", None) or ""
            if Path(place).parent in (ROOT / "docs", ROOT / "benchmarks"):
                del sys.modules[name]


@pytest.fixture(scope="session")
def loaded():
    """``da.load`` that keeps what it loaded: pages load the same models again and again."""
    import diffalign as da

    return functools.cache(da.load)
