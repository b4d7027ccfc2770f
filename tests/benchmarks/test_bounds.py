"""Which versions `make newest` and `make oldest` install, and what their page says."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = ["torch>=2.10", "diffusers>=0.42.1,<0.44", "transformers[x]>=5", "numpy>=2; sys_platform"]
XML = """<testsuites><testsuite tests="4" skipped="1" time="2.5">
<testcase classname="tests.a" name="test_one"/>
<testcase classname="tests.a" name="test_two">
<failure message="  ValueError: no&#10;more"/></testcase>
<testcase classname="tests.b" name="test_three"><error/></testcase>
<testcase classname="tests.b" name="test_four"><skipped/></testcase>
</testsuite></testsuites>"""


@pytest.fixture(scope="module")
def bounds(benchmark_module):
    return benchmark_module("bounds")


def test_the_newest_have_no_ceiling(bounds):
    assert bounds.requirements(LINES, "newest") == [
        "torch>=2.10",
        "diffusers>=0.42.1",
        "transformers[x]>=5",
        "numpy>=2; sys_platform",
    ]


def test_the_oldest_are_the_floors(bounds):
    assert bounds.requirements(LINES, "oldest") == [
        "torch>=2.10,==2.10.*",
        "diffusers>=0.42.1,==0.42.*",
        "transformers[x]>=5,==5.0.*",
        "numpy>=2; sys_platform",
    ]


@pytest.mark.parametrize("end", ["newest", "oldest"])
def test_every_declared_line_can_be_read(bounds, end):
    lines = bounds.declared(ROOT / "pyproject.toml")
    asked = bounds.requirements(lines, end)
    assert len(asked) == len(lines) > 20
    followed = [line for line in asked if line.startswith(bounds.FOLLOWED) and "<" not in line]
    assert len(followed) >= len(bounds.FOLLOWED)


def test_the_page_counts_and_names_failures(bounds, tmp_path):
    report = tmp_path / "newest.xml"
    report.write_text(XML)
    result = bounds.outcome(report)
    assert (result.passed, result.skipped, result.seconds) == (1, 1, 2.5)
    assert result.failures == {
        "tests.a::test_two": "ValueError: no",
        "tests.b::test_three": "error",
    }
    page = bounds.summary("newest", {"torch": "2.15.0", "rich": "15"}, result)
    assert "| torch | 2.15.0 |" in page
    assert "rich" not in page
    assert "1 passed, 2 failed, 1 skipped" in page
    assert page.endswith("- `tests.b::test_three`: error\n")
