"""Open every page of the built site as a reader would: python dev/check_site.py site

In headless Chromium, from the file system, 1280 and 390 pixels wide. Every page has to come without
an error in the console, ask no other host, need no scrolling sideways, and have links that hold.
--pictures FOLDER keeps a screenshot of each. Needs playwright, and Chromium at /usr/bin/chromium.
"""

import argparse
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from playwright.sync_api import sync_playwright

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-background-networking"]
SIZES = {1280: 900, 390: 844}  # a screen, a phone: {width: height}


def load(browser, path, width):
    """(the page, loaded; what was wrong with it so far)"""
    page = browser.new_page(viewport={"width": width, "height": SIZES[width]})
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
    page.goto(path.as_uri())
    page.wait_for_timeout(200)
    return page, faults


def links_of(page):
    return page.eval_on_selector_all("a[href]", "links => links.map(link => link.href)")


def broken_links(targets, anchors):
    """`anchors`: {path of a page: the ids on it}."""
    broken = []
    for target in sorted(targets):
        url = urlsplit(target)
        if url.scheme != "file":
            continue
        path = Path(unquote(url.path))
        if not path.is_file():
            broken.append(f"{target} is not there")
        elif url.fragment and unquote(url.fragment) not in anchors.get(path, ()):
            broken.append(f"{target} has no such place")
    return broken


def check(site, pictures):
    """Every fault found, each a line."""
    found = []
    links = {}
    anchors = {}
    paths = sorted(site.rglob("*.html"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for width in SIZES:
            for path in paths:
                page, faults = load(browser, path, width)
                name = path.relative_to(site)
                content = page.evaluate("document.documentElement.scrollWidth")
                if content > width:
                    faults.append(f"is {content} pixels wide")
                found += [f"{name} at {width}: {fault}" for fault in faults]
                links[name] = links_of(page)
                ids = "elements => elements.map(element => element.id)"
                anchors[path] = set(page.eval_on_selector_all("[id]", ids))
                if pictures:
                    picture = str(name).replace("/", "_").removesuffix(".html")
                    page.screenshot(path=pictures / f"{picture}_{width}.png")
                page.close()
        browser.close()
    for name, targets in links.items():
        found += [f"{name}: {fault}" for fault in broken_links(set(targets), anchors)]
    print(f"{len(paths)} pages, {sum(map(len, links.values()))} links, {len(found)} faults")
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
