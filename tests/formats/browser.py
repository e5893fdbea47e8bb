"""Chromium without a window, told what to do through DevTools' protocol over a pipe: no package is needed."""

import base64
import json
import os
import select
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    *("--disable-dev-shm-usage", "--remote-debugging-pipe"),
)
SECONDS = 120


def chromium() -> str | None:
    """The browser at hand."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page. `events` are all that it reported: what it logged, what it asked for, what went wrong."""

    def __enter__(self) -> Self:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (its_input, self._output), (self._input, its_output) = os.pipe(), os.pipe()
        name = chromium()
        assert name is not None, "no Chromium; install one, such as: apt-get install chromium"
        command = [name, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        command += ["--no-sandbox"] * (os.geteuid() == 0)  # which Chromium wants of root
        script = f"exec {shlex.join(command)} 3<&{its_input} 4>&{its_output}"  # where it looks for its pipe
        self._process = subprocess.Popen(
            ["bash", "-c", script], pass_fds=(its_input, its_output), stderr=subprocess.DEVNULL
        )
        os.close(its_input), os.close(its_output)
        self._buffer, self._number, self._session, self.events = b"", 0, None, []
        page = next(target for target in self.call("Target.getTargets")["targetInfos"] if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._output)  # it ends with its pipe
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._input)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._output, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._input], [], [], SECONDS)[0], "the browser does not answer"
            read = os.read(self._input, 1 << 16)
            assert read, "the browser has ended"
            self._buffer += read
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, path: Path) -> None:
        """Loads a file; its scripts have run when this returns."""
        self.value("window.isEarlier = true")
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        self.wait("!window.isEarlier && document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """Of JavaScript in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression is true."""
        end = time.monotonic() + SECONDS
        while not self.value(condition):
            assert time.monotonic() < end, (condition, self.value("document.body.innerText"))
            time.sleep(0.02)

    def settle(self) -> None:
        """Until what the page has scrolled to is drawn, and said to it: a scroll hides what floats."""
        self.value("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")

    def press(self, key: str, text: str = "") -> None:
        """A key, such as Tab; `text` is what it writes."""
        code = {"Tab": 9, "Enter": 13, " ": 32, "ArrowRight": 39, "ArrowLeft": 37, "Escape": 27}.get(key, 0)
        shared = dict(key=key, code="Space" if key == " " else key, windowsVirtualKeyCode=code)
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **shared)
        self.call("Input.dispatchKeyEvent", type="keyUp", **shared)

    def screenshot(self, path: Path, width: int, theme: str) -> None:
        """A picture of the whole page at a width in pixels, as PNG; `theme` is light or dark."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
        self.call("Emulation.clearDeviceMetricsOverride")
        self.call("Emulation.setEmulatedMedia", features=[])
