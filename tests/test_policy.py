"""The rules of ``conftest.py`` themselves: what a skip costs, no test reaches the network."""

import shutil
from pathlib import Path

import pytest
import torch

pytest_plugins = ["pytester"]


@pytest.fixture
def suite(pytester):
    """Run a test file under the project's conftest: exit code and output."""
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text(encoding="utf-8"))
    marks = "".join(f"  {name}: of this project\n" for name in ("gpu", "hub", "browser"))
    pytester.makeini(f"[pytest]\nmarkers =\n{marks}")

    def run(code, *options):
        pytester.makepyfile(test_it=code)
        result = pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)
        return int(result.ret), result.stdout.str()

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


MARKED = "def test_runs(): pass\n\n@pytest.mark.MARK\ndef test_marked(): assert False\n"
SKIP = "import pytest\n\ndef test_runs(): pass\n\ndef test_skips(): pytest.skip('no reason')\n"


def test_a_skip_fails_when_asked(suite):
    code, out = suite(SKIP, "--fail-on-skip")
    assert code == 1
    assert "test_it.py::test_skips: Skipped: no reason" in out
    assert suite(SKIP)[0] == 0


def test_a_module_that_skips_itself_fails_too(suite, pytester):
    pytester.makepyfile(test_other="def test_runs(): pass\n")
    code, out = suite("import pytest\n\npytest.importorskip('no_such_module')\n", "--fail-on-skip")
    assert code == 1
    assert "test_it.py: skipped while collecting" in out


@pytest.mark.parametrize("mark", ["gpu", "hub"])
def test_marked_tests_may_skip(suite, mark, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DIFFALIGN_HUB", raising=False)
    code, out = suite(
        f"import pytest\n\ndef test_runs(): pass\n\n@pytest.mark.{mark}\ndef test_marked(): "
        "assert False\n",
        "--fail-on-skip",
    )
    assert code == 0
    assert "1 passed, 1 skipped" in out


@pytest.mark.parametrize(("ci", "code"), [("true", 1), ("", 0)])
def test_a_browser_may_be_missing_but_not_in_ci(suite, monkeypatch, ci, code):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    result, out = suite(
        f"import pytest\n\n{MARKED.replace('MARK', 'browser')}", "--fail-on-skip", "-rs"
    )
    assert result == code
    assert "needs Chromium" in out


def test_expected_failures_are_no_skips(suite):
    assert (
        suite(
            "import pytest\n\n@pytest.mark.xfail\ndef test_known(): assert False\n\ndef "
            "test_runs(): pass\n",
            "--fail-on-skip",
        )[0]
        == 0
    )


def test_a_failure_stays_a_failure_and_no_test_is_exit_five(suite):
    assert suite("def test_fails(): assert False\n", "--fail-on-skip")[0] == 1
    assert suite("", "--fail-on-skip")[0] == 5


def test_no_test_reaches_the_network(suite):
    code = (
        "import socket\n\ndef test_out():\n    socket.create_connection(('192.0.2.1', 80), "
        "timeout=1)\n"
    )
    ret, out = suite(code)
    assert ret == 1
    assert "tests run without a network" in out


def test_this_machine_can_be_reached(suite):
    code = """
        import socket

        def test_local():
            with socket.create_server(("127.0.0.1", 0)) as server:
                with socket.create_connection(server.getsockname(), timeout=5):
                    pass
    """
    assert suite(code)[0] == 0
