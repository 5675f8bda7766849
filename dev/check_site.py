"""Look at every page of the built site in a browser: python dev/check_site.py site [--pictures P]

Prints what is wrong, a line each, and exits with 1. A page is loaded from the file system, at the
width of a screen and of a phone. (That links hold, `mkdocs build --strict` sees to.)
--pictures FOLDER keeps a screenshot of each. Needs playwright, and Chromium at /usr/bin/chromium.
"""

import argparse
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-background-networking"]
SIZES = {1280: 900, 400: 844}  # a screen, a phone: {width: height}
# What moves to its place when the width changes is there at once (the search field is too wide on
# its way, and on a busy machine that takes a while).
AT_ONCE = "* { transition: none !important; animation: none !important }"

# Elements that are wider than the space they have: the page, equations, a script's metrics.
TOO_WIDE = """
() => ["html", "div.arithmatex", "#what-it-logs ~ .md-typeset__scrollwrap"]
    .flatMap(selector => [...document.querySelectorAll(selector)])
    .filter(element => element.scrollWidth > element.clientWidth)
    .map(element => `${element.localName} is ${element.scrollWidth} pixels wide`)
"""
# Of a command a screen shows all.
CUT_COMMANDS = """
() => [...document.querySelectorAll(".language-bash code")]
    .filter(element => innerWidth > 1200 && element.scrollWidth > element.clientWidth)
    .map(element => `command is cut: ${element.textContent}`)
"""
CUT_EQUATIONS = """
() => [...document.querySelectorAll("span.arithmatex .base")]
    .filter(element => element.getBoundingClientRect().right > innerWidth)
    .map(element => `equation is cut: ${element.closest("span.arithmatex").textContent}`)
"""
# Markdown's asterisks that were meant as asterisks, as in P*(x) and P*.
SPLIT_WORDS = r"""
() => [...document.querySelectorAll("article em, article strong")]
    .filter(({ previousSibling, nextSibling }) =>
        /\w$/.test(previousSibling?.data ?? "") || /^\w/.test(nextSibling?.data ?? ""))
    .map(element => `emphasis within a word: ${element.textContent}`)
"""
# Files side by side: 80 characters are one line, and only a phone has to scroll.
NARROW_COLUMNS = """
() => [...document.querySelectorAll(".beside")].flatMap(difference => {
    const range = document.createRange();
    const cell = difference.querySelector("td:nth-child(3)");
    cell.textContent = "m".repeat(80);
    range.selectNodeContents(cell);
    const scrolls = difference.scrollWidth > difference.clientWidth;
    return [
        ...range.getClientRects().length > 1 ? ["a column shows fewer than 80 characters"] : [],
        ...scrolls && innerWidth > 1200 ? ["columns have to be scrolled on a screen"] : [],
    ];
})
"""
CHECKS = (TOO_WIDE, CUT_COMMANDS, CUT_EQUATIONS, SPLIT_WORDS, NARROW_COLUMNS)


def watch(page):
    """A list that holds what goes wrong on a page, whatever it loads."""
    faults = []

    def on_console(message):
        if message.type == "error":
            faults.append(f"console: {message.text}")

    def on_request(request):
        if not request.url.startswith(("file:", "data:")):
            faults.append(f"asks for {request.url}")

    page.on("console", on_console)
    page.on("pageerror", lambda error: faults.append(f"script: {error}"))
    page.on("request", on_request)
    return faults


def check(site, pictures):
    """Every fault found, each a line."""
    found = []
    paths = sorted(site.rglob("*.html"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        faults = watch(page)
        for path in paths:
            name = path.relative_to(site)
            page.goto(path.as_uri())
            page.add_style_tag(content=AT_ONCE)
            for width, height in SIZES.items():
                page.set_viewport_size({"width": width, "height": height})
                page.wait_for_timeout(0)
                if pictures:
                    picture = str(name).replace("/", "_").removesuffix(".html")
                    page.screenshot(path=pictures / f"{picture}_{width}.png")
                for script in CHECKS:
                    faults += page.evaluate(script)
                found += [f"{name} at {width}: {fault}" for fault in faults]
                faults.clear()
        browser.close()
    print(f"{len(paths)} pages, {len(found)} faults")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path)
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
    found = check(options.site.resolve(), options.pictures)
    for fault in found:
        print(fault)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
