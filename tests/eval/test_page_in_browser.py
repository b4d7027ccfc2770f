"""The page of a report in a browser: from a file, without a network, with nothing but its own
script."""

from dataclasses import replace

import pytest

from diffalign import APG
from diffalign.eval.report import report
from diffalign.eval.results import columns

pytestmark = [pytest.mark.browser, pytest.mark.slow]
ATTACK = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"


@pytest.fixture
def page(chromium, evaluated, plan, tmp_path):
    """The report of two runs of five prompts, one of which is HTML that would run."""
    items = [replace(item) for item in plan.benchmark.items]
    items[1] = replace(items[1], prompt=ATTACK)
    plan = replace(plan, benchmark=replace(plan.benchmark, items=tuple(items)))
    evaluated("one", plan)
    evaluated("two", replace(plan, techniques=(APG(),)))
    report(columns([tmp_path / "one", tmp_path / "two"]), tmp_path / "report")
    context = chromium.new_context()
    page = context.new_page()
    page.requests, page.problems = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda told: page.problems.append(told.text))
    page.goto((tmp_path / "report" / "index.html").as_uri())
    yield page
    context.close()


def cards(page):
    return page.locator("article:visible")


def test_a_report_opens_from_a_file_and_its_filters_work(page, artefacts):
    (address, *others) = page.requests
    assert address.startswith("file://")
    assert all(url.startswith("data:") for url in others)
    assert cards(page).count() == 5
    assert page.locator("h3", has_text="<script>").count() == 1
    assert "hacked" not in page.title()
    page.locator("#tag").select_option("first")
    assert cards(page).count() == 2
    assert page.locator("#count").inner_text() == "2 of 5 prompts"
    page.locator("#tag").select_option("")
    page.locator("#words").fill("TWO dogs")
    assert cards(page).locator("h3").all_inner_texts() == ["a photo of two dogs"]
    page.locator("#words").fill("")
    wrong = page.locator("article i.wrong").count()
    page.locator("#verdict").select_option("full")
    assert cards(page).locator("i.wrong").count() < max(wrong, 1)
    page.goto(address + "#tag=second")
    page.reload()
    assert cards(page).count() == 3
    assert not page.problems
    page.screenshot(path=artefacts / "report.png", full_page=True)
