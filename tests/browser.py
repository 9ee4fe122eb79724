"""A page in a headless Chromium, driven over a pipe by its DevTools protocol."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

KEYS = {"Tab": 9, "Enter": 13, "ArrowRight": 39, "ArrowDown": 40}
PATIENCE = 30


class Page:
    """A page that is open; `events` are what the browser reported of it, such as requests and messages."""

    def __init__(self, path: Path, profile: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        program = shutil.which("chromium")
        assert program
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        theirs, self.commands = os.pipe()
        answers, ours = os.pipe()
        redirected = f'exec "$@" 3<&{theirs} 4>&{ours}'
        self.process = subprocess.Popen(
            ["bash", "-c", redirected, "bash", program, *options, "about:blank"],
            pass_fds=(theirs, ours),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(ours)
        self.answers, self.received, self.events, self.number, self.session = answers, b"", [], 0, None
        os.set_blocking(answers, False)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.call("Page.navigate", url=path.absolute().as_uri())
        self.wait_for("Page.loadEventFired")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.session = None
        try:
            self.call("Browser.close")
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()
        os.close(self.commands)
        os.close(self.answers)

    def call(self, method: str, **parameters: Any) -> Any:
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self.next()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def next(self) -> Any:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self.received:
            assert time.monotonic() < deadline, "the browser does not answer"
            try:
                self.received += os.read(self.answers, 2**20)
            except BlockingIOError:
                time.sleep(0.01)
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def wait_for(self, method: str) -> None:
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self.next())

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({json.dumps(selector)}).textContent")

    def press(self, *keys: str) -> None:
        for key in keys:
            names = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
            self.call("Input.dispatchKeyEvent", type="keyDown", text="\r" if key == "Enter" else "", **names)
            self.call("Input.dispatchKeyEvent", type="keyUp", **names)

    def tab_to(self, condition: str) -> None:
        """Press the Tab key until the element that has the focus, `it`, meets a JavaScript condition."""
        for _ in range(100):
            if self.run(f"((it) => {condition})(document.activeElement)"):
                return
            self.press("Tab")
        raise AssertionError(f"the Tab key does not lead to {condition}")

    def move(self, selector: str) -> None:
        """Move the pointer to the centre of an element."""
        self.run(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        box = self.run(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[Any]:
        """Errors and warnings, and requests for anything but the page itself and what is inside it."""
        asked = [event["params"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        urls = [parameters["request"]["url"] for parameters in asked]
        told = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled", "Page.javascriptDialogOpening")
        return [url for url in urls[1:] if not url.startswith("data:")] + [
            event for event in self.events if event.get("method") in told
        ]
