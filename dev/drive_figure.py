"""Use the lesson's figure as a reader would, by keys and mouse: python dev/drive_figure.py site

Prints, as JSON, what it shows after each action. Needs what dev/check_site.py needs.
"""

import json
import sys
from pathlib import Path

from check_site import CHROMIUM, FLAGS
from playwright.sync_api import sync_playwright


def state_of(page):
    """What the figure shows, and what its controls say."""
    state = page.evaluate("document.querySelector('[data-figure-root]').figureState()")
    for name in ("invTemp", "T", "time"):
        state[name] = float(page.input_value(f'[data-figure="{name}"]'))
    state["numbers"] = page.inner_text('[data-figure="numbers"]')
    state["play"] = page.inner_text('[data-figure="play"]')
    state["picture"] = page.evaluate("document.querySelector('canvas').toDataURL().length")
    return state


def press(page, name, key, times):
    page.focus(f'[data-figure="{name}"]')
    for _ in range(times):
        page.keyboard.press(key)


def drive(page):
    """{action: the state after it}"""
    states = {"loaded": state_of(page)}
    press(page, "invTemp", "ArrowRight", 5)
    states["inv_temp by keys"] = state_of(page)
    press(page, "T", "ArrowLeft", 4)
    states["T by keys"] = state_of(page)
    press(page, "time", "Home", 1)
    states["time by keys"] = state_of(page)
    page.focus('[data-figure="play"]')
    page.keyboard.press("Enter")
    page.wait_for_timeout(400)
    states["playing"] = state_of(page)
    page.wait_for_timeout(2500)
    states["played"] = state_of(page)
    page.click('[data-figure="noise"]')
    states["other noise"] = state_of(page)
    page.check('[data-figure="backpropagation"]')
    states["backpropagation"] = state_of(page)
    return states


def main():
    path = Path(sys.argv[1]).resolve() / "lesson/figure.html"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.goto(path.as_uri())
        print(json.dumps(drive(page)))
        if len(sys.argv) > 2:
            page.screenshot(path=sys.argv[2], full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
