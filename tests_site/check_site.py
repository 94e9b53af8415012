"""Looks at the built site in a real browser: no sideways scrolling, no error in the console, no request to another host.

    make check-site                                       # every page, on a phone's and a desk's screen, light and dark
    python tests_site/check_site.py site --shots shots    # the same, and pictures of some pages

Needs Chromium (CHROMIUM names it if it is elsewhere) and the standard library.
"""

from __future__ import annotations

import argparse
import base64
import functools
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WIDTHS = (390, 1280)
SCHEMES = {"light": "default", "dark": "slate"}  # what a person prefers, and what the theme calls it
SHOWN = ("", "guides/ask/", "methods/keepkv/", "theory/", "reference/cache/", "errors/", "results/", "notes/long-texts/")
PATIENCE = 60.0  # seconds that the browser may take for one answer
LOOK = """new Promise(done => setTimeout(() => done({
    width: document.documentElement.scrollWidth,
    scheme: document.body.getAttribute("data-md-color-scheme"),
}), 100))"""
SEARCH = """new Promise(done => {
    const field = document.querySelector("[data-md-component=search-query]");
    field.focus(); field.value = "vote"; field.dispatchEvent(new Event("input", {bubbles: true}));
    field.dispatchEvent(new KeyboardEvent("keyup", {key: "e", bubbles: true}));
    const begin = Date.now();
    const look = () => {
        const found = document.querySelectorAll(".md-search-result__item").length;
        found || Date.now() - begin > 8000 ? done(found) : setTimeout(look, 100);
    };
    look();
})"""


class Browser:
    """Chromium without a window, spoken to in its DevTools protocol over a pair of pipes."""

    def __init__(self, program: str, profile: str) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        options = ["--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run",
                   "--disable-background-networking", f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
        script = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, program, *options], pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        self._numbers, self._rest, self.events, self._session = itertools.count(1), b"", [], None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> Any:
        """A command's result. Events that come before it are kept in `events`."""
        number = next(self._numbers)
        told = {"id": number, "method": method, "params": params, **({"sessionId": self._session} if self._session else {})}
        os.write(self._out, json.dumps(told).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self.events.append(message)

    def wait_for(self, event: str) -> None:
        while not any(message.get("method") == event for message in self.events):
            self.events.append(self._next())

    def evaluate(self, code: str) -> Any:
        result = self.ask("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["text"])
        return result["result"]["value"]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            piece = os.read(self._in, 1 << 20) if ready else b""
            if not piece:
                raise RuntimeError("the browser does not answer")
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


def opened(browser: Browser, url: str) -> None:
    browser.events.clear()
    browser.ask("Page.navigate", url=url)
    browser.wait_for("Page.loadEventFired")


def looks(browser: Browser, width: int, scheme: str) -> list[str]:
    """What is wrong with a page that is open, at a width."""
    browser.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    seen = browser.evaluate(LOOK)
    found = [] if seen["width"] <= width else [f"is {seen['width']} pixels wide"]
    return found if seen["scheme"] == SCHEMES[scheme] else [*found, f"has the colors of {seen['scheme']}"]


def reports(browser: Browser, host: str) -> list[str]:
    """What the page that is open asked for and should not, and what it complained of."""
    found = []
    for event in browser.events:
        params = event.get("params", {})
        match event["method"]:
            case "Network.requestWillBeSent":
                if not params["request"]["url"].startswith((host, "data:", "blob:")):
                    found.append(f"asks for {params['request']['url']}")
            case "Network.responseReceived":
                if params["response"]["status"] >= 400:
                    found.append(f"{params['response']['url']}: status {params['response']['status']}")
            case "Runtime.exceptionThrown":
                found.append(params["exceptionDetails"]["text"])
            case "Runtime.consoleAPICalled":
                if params["type"] in ("error", "warning", "assert"):
                    found.append(f"console: {params['args']}")
            case "Log.entryAdded":
                if params["entry"]["level"] in ("error", "warning"):
                    found.append(f"log: {params['entry']['text']}")
    return found


def picture(browser: Browser, file: Path) -> None:
    file.write_bytes(base64.b64decode(browser.ask("Page.captureScreenshot", format="png")["data"]))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, nargs="?", default=Path("site"))
    parser.add_argument("--shots", type=Path, help="a folder for pictures")
    args = parser.parse_args()
    program = (
        os.environ.get("CHROMIUM")
        or shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if not program or not (args.site / "index.html").exists():
        sys.exit("needs Chromium, and the site: make site")
    pages = sorted(str(path.parent.relative_to(args.site)) for path in args.site.rglob("index.html"))
    urls = ["" if page == "." else f"{page}/" for page in pages] + ["404.html"]
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(args.site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host, bad = f"http://127.0.0.1:{server.server_port}/", 0
    if args.shots:
        args.shots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(program, profile)
        try:
            for page, scheme in itertools.product(urls, SCHEMES):
                browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
                opened(browser, host + page)
                for width in WIDTHS:
                    found = [f"at {width} pixels {trouble}" for trouble in looks(browser, width, scheme)]
                    if args.shots and page in SHOWN:
                        name = page.strip("/").replace("/", "-") or "index"
                        picture(browser, args.shots / f"{name}-{width}-{scheme}.png")
                    bad += len(found)
                    print(*(f"{page or 'index'}, {scheme}, {trouble}\n" for trouble in found), sep="", end="")
                found = reports(browser, host)
                bad += len(found)
                print(*(f"{page or 'index'}, {scheme}: {trouble}\n" for trouble in found), sep="", end="")
            opened(browser, host)
            hits = browser.evaluate(SEARCH)
            if not hits:
                bad += 1
                print("the search for `vote` finds nothing")
        finally:
            browser.close()
    print(f"{len(urls)} pages, {bad} troubles; the search for `vote` finds {hits} pages")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
