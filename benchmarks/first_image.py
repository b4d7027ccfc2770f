"""How long does a visitor of the page wait? Seconds from the start of ``diffalign app`` until its
address is printed and until its button can be clicked, and from a click in that instant until the
first image is there.

    python benchmarks/first_image.py [--runs 3] [--chromium /usr/bin/chromium]

Needs playwright (the extra dev) and a Chromium; on a quiet machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from time import perf_counter

from playwright.sync_api import Page, sync_playwright

PORT = 7941


def run(page: Page) -> tuple[float, float, float]:
    """Seconds to the address, to the button, and from the click to the first image."""
    start = perf_counter()
    command = [sys.executable, "-m", "diffalign", "app", "--port", str(PORT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        try:
            assert server.stdout is not None
            server.stdout.readline()
            address = perf_counter() - start
            page.goto(f"http://127.0.0.1:{PORT}/")
            button = page.get_by_role("button", name="Draw").locator("visible=true").first
            button.wait_for()
            usable = perf_counter()
            button.click()
            page.locator(".columns:visible img").first.wait_for()
            return address, usable - start, perf_counter() - usable
        finally:
            server.terminate()


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(
            executable_path=options.chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        for _ in range(options.runs):
            address, usable, image = run(browser.new_page())
            print(f"address {address:.1f} s, usable {usable:.1f} s, first image {image:.1f} s")


if __name__ == "__main__":
    main()
