"""The page as people use it, in Debian's Chromium; screenshots lie in outputs/browser."""

import re
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]

WAIT_MS = 90_000
PASSWORDS = "etc/passwd"


@pytest.fixture(scope="module")
def server():
    from diffalign.app.start import Server, Start

    server = Server(Start())
    yield server
    server.close()


@pytest.fixture(scope="module")
def visitor(chromium, server):
    """``visitor(query, width)``: a page of its own, as a new visitor sees it."""

    @contextmanager
    def visit(query="", width=1400):
        context = chromium.new_context(viewport={"width": width, "height": 1000})
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        page.foreign = []
        page.on("request", lambda request: page.foreign.append(request.url))
        page.goto(server.url + query)
        page.get_by_role("tab", name="Compare").wait_for()
        if steps := re.search(r"steps=(\d+)", query):  # the address has been read
            field = page.get_by_label("number input for Steps").locator("visible=true")
            expect(field).to_have_value(steps[1])
        yield page
        context.close()

    return visit


def press(page, name):
    page.get_by_role("button", name=name).locator("visible=true").first.click()


def expect(page):
    from playwright.sync_api import expect

    expect.set_options(timeout=WAIT_MS)
    return expect(page)


def message(page):
    """The text of the error that the page shows, which is then closed."""
    toast = page.locator(".toast-body")
    toast.first.wait_for()
    text, count = toast.first.inner_text(), toast.count()
    toast.first.locator("button").evaluate("(button) => button.click()")
    expect(toast).to_have_count(count - 1)
    return " ".join(text.split())


def images(page):
    return page.locator(".columns:visible img")


def shot(page, artefacts, name):
    """A screenshot, once every picture has its place."""
    small = "(e) => e.offsetParent && e.offsetHeight < 99"
    page.wait_for_function(f"![...document.querySelectorAll('.pixels')].some({small})")
    page.screenshot(path=artefacts / f"{name}.png", full_page=True)


def test_compare(visitor, artefacts):
    query = '?tab=compare&techniques=["adaptive-guidance","apg"]&scale=3&steps=8'
    query += "&prompt=a photo of a dog"
    with visitor(query) as page:
        expect(page.get_by_label("Prompt", exact=True).locator("visible=true")).to_have_value(
            "a photo of a dog"
        )
        press(page, "Options of apg")
        page.get_by_label("eta").locator("visible=true").first.fill("0.5")
        press(page, "Draw")
        expect(images(page)).to_have_count(3)
        expect(page.locator(".image-frame:visible img")).to_be_visible()
        press(page, "Copy as Python or as command line")
        expect(page.locator(".cm-content:visible").first).to_contain_text("da.load('emoji')")
        expect(page.locator(".cm-content:visible").last).to_have_text(
            re.compile("--technique apg:eta=0.5 ")
        )
        assert "eta=0.5" in page.url
        images(page).nth(1).click()
        shot(page, artefacts, "compare")
        assert all(url.startswith(("http://127.0.0.1", "data:", "blob:")) for url in page.foreign)


def test_align(visitor, artefacts):
    with visitor("?tab=align&method=dts-star&kernel=eta&steps=4&nfe=100") as page:
        press(page, "Search")
        expect(page.get_by_label("Where it stands")).to_have_value(
            re.compile("after [0-9]+ images")
        )
        expect(images(page).nth(1)).to_be_visible()
        expect(page.locator(".image-frame:visible img")).to_have_count(2)  # curve and tree
        shot(page, artefacts, "align")


def test_negative_prompt(visitor, artefacts):
    with visitor("?tab=negative&steps=8&scale=3&negative=a photo of a cat") as page:
        press(page, "Draw")
        expect(images(page)).to_have_count(4)
        shot(page, artefacts, "negative")


def test_evaluate(visitor, artefacts):
    with visitor("?tab=evaluate&steps=2&prompts=2&images=1&techniques=apg") as page:
        press(page, "Evaluate")
        report = page.frame_locator("iframe.report")
        expect(report.locator("article")).to_have_count(2)
        expect(page.locator(".table-wrap:visible").first).to_contain_text("emoji: apg")
        expect(report.locator("#count")).to_have_text("2 of 2 prompts")  # its script runs
        expect(
            page.get_by_role("link", name="Download the report").or_(
                page.get_by_text("Download the report")
            )
        ).to_be_visible()
        with page.expect_download() as download:
            page.get_by_text("Download the report").click()
        assert "<!doctype html>" in download.value.path().read_text()[:200]
        shot(page, artefacts, "evaluate")


def test_models(visitor, artefacts):
    with visitor("?tab=models") as page:
        press(page, "Show")
        expect(page.get_by_label("What it is")).to_have_value(re.compile("StableDiffusionPipeline"))
        shot(page, artefacts, "models")
        name = page.get_by_label("Model, folder, hub id or pipeline class")
        for text, words in (
            ("../../" + PASSWORDS, "not on the list"),
            ("stabilityai/sdxl-turbo", "not on the list"),
            ("NoSuchPipeline", "NoSuchPipeline"),
        ):
            name.fill(text)
            name.press("Tab")
            press(page, "Show")
            assert words in message(page)


def test_hostile_input_is_refused_with_a_message(visitor):
    attack = '<img src=x onerror="document.title=1">'
    with visitor("?tab=compare&steps=1&techniques=[]&scale=1e9&seed=nan&model=" + "x" * 99) as page:
        assert "cannot be used: model, scale, seed" in message(page)
        press(page, "Negative prompt, further columns")
        lines = page.get_by_label("Further columns in the command line's form, one a line")
        for prompt, text, words in (
            ("a dog", attack, "Unknown technique"),
            ("a" * 501, "apg", "may have 500 letters; got 501"),
            ("a dog", "apg:eta=1e400", "eta"),
            ("a dog", "cfg\n" * 5, "one to 4 techniques"),
        ):
            field = page.get_by_label("Prompt", exact=True).locator("visible=true")
            field.evaluate("(field) => field.removeAttribute('maxlength')")
            field.fill(prompt)
            lines.fill(text)
            press(page, "Draw")
            assert words in message(page)
        field.fill(attack)
        lines.fill("cfg")
        press(page, "Draw")
        expect(images(page)).to_have_count(2)
        assert page.title() == "diffalign"


@pytest.mark.parametrize("path", ["../../../" + PASSWORDS, "/" + PASSWORDS, __file__])
def test_no_file_of_the_machine_is_served(server, path):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{server.url}gradio_api/file={path}")
    assert caught.value.code in (403, 404)


def test_a_reload_brings_the_settings_back(visitor):
    with visitor() as page:
        prompt = page.get_by_label("Prompt", exact=True).locator("visible=true")
        prompt.fill("two cats & a <dog>")
        steps = page.get_by_label("number input for Steps").locator("visible=true")
        steps.fill("7")
        steps.press("Tab")
        page.wait_for_function("location.search.includes('steps=7')")
        page.reload()
        expect(prompt).to_have_value("two cats & a <dog>")
        expect(steps).to_have_value("7")
        page.get_by_role("tab", name="Align").click()
        page.wait_for_function("location.search.includes('tab=align')")


# messages go by themselves, perhaps before anybody reads them
LISTEN = """() => {
    window.said = [];
    const toasts = document.getElementsByClassName("toast-body");
    const note = () => said.push(...[...toasts].map(toast => toast.innerText));
    new MutationObserver(note).observe(document.body, {childList: true, subtree: true});
}"""
CLICK = """text => [...document.querySelectorAll("button")]
    .find(button => button.innerText.trim() === text && button.offsetParent).click()"""


def test_two_visitors_see_their_own_and_a_stop_frees_the_line(visitor, monkeypatch):
    from diffalign.app.desk import Run

    check = Run.check

    def slow(run):
        run.stopped.wait(0.3)
        check(run)

    # no machine is so fast that the long run ends before it is stopped
    monkeypatch.setattr(Run, "check", slow)
    long = '?tab=compare&steps=100&techniques=["s2-guidance","pag","seg","apg"]&prompt=mine'
    with visitor(long) as mine, visitor("?tab=compare&steps=1&prompt=yours") as yours:
        press(mine, "Draw")
        mine.get_by_text(re.compile(r"[1-9]\d*/500")).first.wait_for()
        press(yours, "Draw")
        yours.get_by_text("1 run is ahead").first.wait_for()
        # at once: a page behind another one is drawn too rarely for a person's click, or to wait
        mine.evaluate(LISTEN)
        mine.evaluate(CLICK, "Stop")
        mine.wait_for_function("said.some(text => text.includes('Stopped'))", polling=200)
        expect(images(yours)).to_have_count(2)
        press(yours, "Copy as Python or as command line")
        expect(yours.locator(".cm-content:visible").first).to_contain_text("prompt = 'yours'")
        assert images(mine).count() < 5  # what was finished before the stop, and nothing of yours


def test_a_phone(visitor, artefacts):
    with visitor("?tab=compare&steps=2", width=390) as page:
        press(page, "Draw")
        expect(images(page)).to_have_count(2)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        shot(page, artefacts, "phone")


def test_what_the_page_wrote_is_removed_when_it_ends():
    import os

    from diffalign.app.start import Server, Start

    before = os.environ.get("GRADIO_TEMP_DIR")
    server = Server(Start())
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert folder.is_dir()
    server.close()
    assert not folder.exists()
    assert os.environ.get("GRADIO_TEMP_DIR") == before


def test_a_port_that_is_taken_leaves_nothing_behind(server):
    import os

    from diffalign.app.start import Server, Start

    before, port = os.environ["GRADIO_TEMP_DIR"], int(server.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(OSError, match="port"):
        Server(Start(port=port))
    assert os.environ["GRADIO_TEMP_DIR"] == before
