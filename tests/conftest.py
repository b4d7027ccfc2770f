"""What every test gets: one thread, no network, and no skip that nobody would notice."""

import importlib.util
import os
import shutil
import socket
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

SKIPPED = {
    "gpu": "needs an accelerator",
    "hub": "needs the network; set DIFFALIGN_HUB=1",
    "browser": "needs Chromium (Debian: apt-get install chromium) and playwright",
}
# a machine that tests for everybody has a browser
ALLOWED = ("gpu", "hub") if os.environ.get("CI") == "true" else tuple(SKIPPED)
_unmarked: list[str] = []


def pytest_addoption(parser):
    parser.addoption(
        "--fail-on-skip",
        action="store_true",
        help="fail when a test was skipped that is not marked gpu, hub or, outside CI, browser",
    )


def pytest_configure():
    _unmarked.clear()


def _mark_all_but_few(items):
    """Of a test with ``few(n)``, n sets of parameters evenly apart stay; the others are slow."""
    groups = {}
    for item in items:
        if item.get_closest_marker("few"):
            groups.setdefault((item.path, item.originalname), []).append(item)
    for group in groups.values():
        count = group[0].get_closest_marker("few").args[0]
        stays = {round(i * (len(group) - 1) / max(1, count - 1)) for i in range(count)}
        for i, item in enumerate(group):
            if i not in stays:
                item.add_marker("slow")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    # Here and not above: the process that only hands out tests never collects, and starts without.
    import torch

    torch.set_num_threads(1)
    _mark_all_but_few(items)
    if "exhaustive" not in config.getoption("markexpr"):
        hours = [item for item in items if item.get_closest_marker("exhaustive")]
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=hours)
    there = {
        "gpu": torch.cuda.is_available(),
        "hub": os.environ.get("DIFFALIGN_HUB") == "1",
        "browser": bool(shutil.which("chromium") and importlib.util.find_spec("playwright")),
    }
    for item in items:
        for name, reason in SKIPPED.items():
            if item.get_closest_marker(name) and not there[name]:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def chromium():
    """Debian's Chromium without a window, driven by Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def artefacts():
    """The folder of screenshots, kept for people to look at."""
    folder = Path(__file__).parents[1] / "outputs" / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def benchmark_module():
    """``load(name)``: benchmarks/NAME.py as a module, with its neighbours importable."""
    folder = Path(__file__).parents[1] / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))

        def load(name):
            spec = importlib.util.spec_from_file_location(
                f"benchmark_{name}", folder / f"{name}.py"
            )
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, spec.name, module)
            spec.loader.exec_module(module)
            return module

        yield load


@pytest.fixture(autouse=True)
def _same_attention_backend():
    """``model.set_attention_backend`` changes a setting of the whole process; the next test starts
    from the usual one."""
    yield
    if dispatch := sys.modules.get("diffusers.models.attention_dispatch"):
        usual = dispatch.AttentionBackendName(dispatch.DIFFUSERS_ATTN_BACKEND)
        dispatch._AttentionBackendRegistry.set_active_backend(usual)


@pytest.fixture(autouse=True)
def _no_network(request, monkeypatch):
    """Connecting anywhere but to this machine is an error, except in tests marked hub."""
    if request.node.get_closest_marker("hub"):
        return
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
            "127.0.0.1",
            "::1",
            "localhost",
        ):
            raise OSError(f"A test tried to reach {address[0]!r}; tests run without a network.")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


def pytest_runtest_logreport(report):
    """Called in the controlling process too when tests run in several, where the exit code is
    decided."""
    if (
        report.skipped
        and not hasattr(report, "wasxfail")
        and not any(name in report.keywords for name in ALLOWED)
    ):
        place = report.longrepr
        reason = place[2] if isinstance(place, tuple) else place
        _unmarked.append(f"{report.nodeid}: {reason}")


def pytest_collectreport(report):
    if report.skipped:
        _unmarked.append(f"{report.nodeid}: skipped while collecting")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    if _unmarked and exitstatus == 0 and session.config.getoption("--fail-on-skip"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if _unmarked and config.getoption("--fail-on-skip"):
        terminalreporter.section("skipped, and that counts as a failure")
        for line in _unmarked:
            terminalreporter.write_line(line)
