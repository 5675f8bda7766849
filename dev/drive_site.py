"""Use the site as a reader would, by keys and mouse: python dev/drive_site.py site

Prints, as JSON, what the lesson's figure shows after each action, the pages that a search finds and
the text that a copy button copies. Needs what dev/check_site.py needs.
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


def use_figure(page):
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


def search(page, words):
    """Links to what is found."""
    page.fill('[data-md-component="search-query"]', words)
    page.wait_for_selector(".md-search-result__link")
    links = page.query_selector_all(".md-search-result__link")
    return [link.get_attribute("href") for link in links]


def copy_first_command(page):
    """What is in the clipboard then."""
    page.click(".language-bash button >> nth=0")
    page.wait_for_timeout(200)
    return page.evaluate("navigator.clipboard.readText()")


def main():
    site = Path(sys.argv[1]).resolve()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.goto((site / "lesson/figure.html").as_uri())
        figure = use_figure(page)
        page.goto((site / "index.html").as_uri())
        copied = copy_first_command(page)
        found = search(page, "lean adjoint")
        print(json.dumps({"figure": figure, "copied": copied, "found": found}))
        browser.close()


if __name__ == "__main__":
    main()
