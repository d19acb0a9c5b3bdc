"""Headless Chromium, driven over a pipe with its own DevTools protocol: no driver, no port, no download.

with Browser(tmp_path) as browser:
    browser.open(path)                                   # file://, waits for the page
    browser.evaluate("document.title")                   # a JSON value
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions")
LONGEST = 60.0  # seconds to wait for an answer


def executable() -> str | None:
    """Where a Chromium is, if one is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One headless browser with one tab; `requests` are the URLs that pages asked for, `errors` what they logged."""

    def __init__(self, folder: Path, scheme: str = "light") -> None:
        self.folder, self.scheme = folder, scheme
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._number, self._session, self._buffer = 0, "", b""

    def __enter__(self) -> Browser:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()

        def place() -> None:  # Chromium reads commands from descriptor 3 and writes answers to 4
            held = os.dup(to_browser), os.dup(from_browser)
            os.dup2(held[0], 3)
            os.dup2(held[1], 4)

        command = [str(executable()), *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={self.folder / 'profile'}"]
        self._process = subprocess.Popen(
            [*command, "about:blank"],
            preexec_fn=place,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        features = [{"name": "prefers-color-scheme", "value": self.scheme}]
        self.send("Emulation.setEmulatedMedia", features=features)
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._write)
        os.close(self._read)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        return self._wait(lambda answer: answer.get("id") == message["id"])

    def open(self, path: Path, size: tuple[int, int] = (1300, 1000)) -> None:
        """Show a file and wait until its `load` event is over."""
        width, height = size
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Page.navigate", url=path.resolve().as_uri())
        ready = "document.readyState === 'complete' && location.protocol === 'file:'"
        end = time.monotonic() + LONGEST
        while not self.evaluate(ready):
            assert time.monotonic() < end, "the page does not load"
            time.sleep(0.02)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression on the page; a promise is waited for."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def screenshot(self, path: Path) -> Path:
        """What the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
        return path

    def _wait(self, wanted: Any) -> dict[str, Any]:
        while True:
            while b"\0" not in self._buffer:
                part = os.read(self._read, 1 << 20)
                assert part, "Chromium has ended"
                self._buffer += part
            line, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(line)
            self._note(answer)
            if wanted(answer):
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])

    def _note(self, answer: dict[str, Any]) -> None:
        parameters = answer.get("params", {})
        if answer.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        if answer.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"]))
        if answer.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])
