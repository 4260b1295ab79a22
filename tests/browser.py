"""A real browser, headless, driven over a pipe: Chromium's own DevTools protocol, without a driver or a package.

    with Browser() as browser:
        page = browser.open(path, width=360, height=800)
        page.run("document.title")              # the value of a JavaScript expression
        page.press("ArrowRight")
        page.screenshot(tmp_path / "page.png")
        page.errors, page.requests              # console errors and exceptions; what the page asked the network for

Input goes the way of a real mouse and keyboard. Each page has a context of its own.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["Browser", "BrowserFailed", "Page", "find_browser"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT = 30.0  # seconds for one answer


class BrowserFailed(AssertionError):
    """The browser did not start, did not answer in time, or refused a command."""


def find_browser() -> str | None:
    """The path of a Chromium or Chrome; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A headless browser process; a context manager."""

    def __init__(self) -> None:
        path = find_browser()
        if path is None:
            raise BrowserFailed("there is no Chromium here")
        self._folder = tempfile.TemporaryDirectory(prefix="browser", ignore_cleanup_errors=True)
        self._to, self._from = _pipes()
        arguments = [
            path, "--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--no-sandbox",
            "--disable-dev-shm-usage", "--disable-background-networking", "--disable-extensions", "--hide-scrollbars",
            "--force-color-profile=srgb", f"--user-data-dir={self._folder.name}",
        ]  # fmt: skip
        # The protocol wants descriptors 3 and 4; a shell puts them there, whatever their numbers are here.
        shell = f'exec 3<&{self._to[0]} 4>&{self._from[1]}; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "browser", *arguments],
            pass_fds=(self._to[0], self._from[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(self._to[0])
        os.close(self._from[1])
        self._count = 0
        self._rest = b""
        self.pages: dict[str, Page] = {}

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.send("Browser.close")
            self._process.wait(5)
        except (BrowserFailed, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._to[1])
        os.close(self._from[0])
        self._folder.cleanup()

    def open(
        self, path: Path, *, width: int = 1200, height: int = 900, dark: bool = False, script: bool = True
    ) -> Page:
        """Show a file in a window of this size, in CSS pixels."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session, context)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.resize(width, height)
        page.send("Emulation.setScriptExecutionDisabled", value=not script)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.send("Emulation.setEmulatedMedia", features=[scheme])
        page.send("Page.navigate", url=path.resolve().as_uri())
        page.wait_for_load()
        return page

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command, and its answer."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to[1], json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise BrowserFailed(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])

    def receive(self) -> dict[str, Any]:
        """The next message; an event is noted by its page."""
        deadline = time.monotonic() + TIMEOUT
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from[0]], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._from[0], 1 << 20) if ready else b""
            if not part:
                raise BrowserFailed("the browser gave no answer")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if page := self.pages.get(message.get("sessionId", "")):
            page.note(message)
        return message


class Page:
    """One open page."""

    def __init__(self, browser: Browser, session: str, context: str) -> None:
        self._browser, self._session, self._context = browser, session, context
        self.errors: list[str] = []  # of the console, and exceptions
        self.requests: list[str] = []  # addresses that were asked for, the page's own apart
        self._loaded = False

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.send(method, self._session, **parameters)

    def close(self) -> None:
        """Close it with its context."""
        self._browser.send("Target.disposeBrowserContext", browserContextId=self._context)

    def note(self, message: dict[str, Any]) -> None:
        method, values = message.get("method", ""), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            details = values["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(each.get("value", each.get("description"))) for each in values["args"]))
        elif method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.errors.append(values["entry"]["text"])
        elif method == "Network.requestWillBeSent" and values["type"] != "Document":
            self.requests.append(values["request"]["url"])

    def wait_for_load(self) -> None:
        while not self._loaded:
            self._browser.receive()

    def run(self, expression: str) -> Any:
        """The value of an expression, awaited."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True,
            userGesture=True)  # fmt: skip
        if "exceptionDetails" in answer:
            raise BrowserFailed(f"{expression}: {answer['exceptionDetails']['exception'].get('description')}")
        return answer["result"].get("value")

    def resize(self, width: int, height: int) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
            mobile=width < 600)  # fmt: skip

    def move(self, x: float, y: float) -> None:
        """The mouse to a place in the window."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        """A click in the middle of the first element that a selector finds."""
        x, y = self.middle(selector)
        self.move(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def middle(self, selector: str) -> tuple[float, float]:
        """The middle of an element, which is scrolled into view."""
        found = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); if (!e) return null;"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        if found is None:
            raise BrowserFailed(f"the page has no {selector}")
        return found[0], found[1]

    def press(self, key: str) -> None:
        """A key, by the name that JavaScript gives it."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38,
            "ArrowRight": 39, "ArrowDown": 40}  # fmt: skip
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def screenshot(self, path: Path, *, whole: bool = True) -> Path:
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.send("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])


def _pipes() -> list[list[int]]:
    """Two pipes, out of the way of the descriptors that the shell sets."""
    found = []
    for pair in (os.pipe(), os.pipe()):
        found.append([fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10) for descriptor in pair])
        for descriptor in pair:
            os.close(descriptor)
    return found
