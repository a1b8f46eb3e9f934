"""The web chat in a real browser, as a person uses it: make test-browser.

``TINYMODAL_SCREENSHOTS=docs make test-browser`` also takes the pictures of docs/web-chat.md anew.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
import soundfile

from tinymodal.compose.build import load
from tinymodal.core.types import Image, Message, Sample, Text
from tinymodal.infer.engine import Engine
from tinymodal.serve.web_examples import examples_of

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 120
"""Two busy cores take their time; nothing here waits so long where all is well."""
WIDE, PHONE = (1100, 900), (390, 844)
QUESTION, SEE = "What colour is the star?", "What do you see?"


@pytest.fixture(scope="module")
def address():
    """A server as the command line starts it."""
    command = [sys.executable, "-m", "tinymodal", "serve", "starter", "--port", "0", "--web"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"chats at (http://127\.0\.0\.1:\d+)", line):
            break
    else:
        pytest.fail(f"the server ended: {''.join(said)}")
    yield found[1]
    process.terminate()
    try:
        process.wait(60)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def driver():
    """Debian's chromium without a screen, with a microphone that beeps."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="make test-browser installs it")
    browser, program = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not browser or not program:
        pytest.skip("no chromium with its chromedriver here; make test-browser installs them")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
        "--autoplay-policy=no-user-gesture-required",
    ):  # fmt: skip
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(program))
    driver.set_page_load_timeout(WAIT_S)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A drawn scene, and what the model says of it."""
    folder = tmp_path_factory.mktemp("scene")
    path = Path(examples_of(folder, sees=True, hears=False)[0].picture)
    engine = Engine(load("starter"))
    samples = [Sample((Message("user", (Image(path), Text(text))),), "test") for text in (QUESTION, SEE)]
    return path, [reply.text for reply in engine.reply(samples)]


class Page:
    """What a person does on the page."""

    def __init__(self, driver, address: str, size: tuple[int, int] = WIDE, scheme: str = "light") -> None:
        self.driver, self.address = driver, address
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        driver.get(address)
        self.wait(lambda: self.all("#question textarea"))

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str, text: str = ""):
        return self.wait(
            lambda: next((e for e in self.all(selector) if e.is_displayed() and text in e.text), None),
            selector,
        )

    def wait(self, found, what: str = "it"):
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            try:
                if value := found():
                    return value
            except Exception as error:
                # An element may be drawn anew between finding and asking it.
                if "stale" not in str(error).lower():
                    raise
            time.sleep(0.05)
        shot = Path(tempfile.gettempdir()) / "tinymodal-browser.png"
        self.driver.save_screenshot(str(shot))
        pytest.fail(f"{what} did not come in {WAIT_S} s; the page then: {shot}")

    def answers(self) -> list[str]:
        read = "return [...document.querySelectorAll('#talk .bot [data-testid=bot] .message-content')]"
        return self.driver.execute_script(f"{read}.map(e => e.innerText.trim())")

    def show(self, path: Path) -> None:
        self.all("#question input[type=file]")[0].send_keys(str(path))
        self.wait(lambda: self.all("#question .thumbnail-item, #question [class*=thumbnail]"), "a thumbnail")

    def ask(self, text: str) -> None:
        box = self.one("#question textarea")
        box.send_keys(text)
        self.driver.find_element("css selector", '#question button[aria-label="Submit"]').click()

    def finished(self) -> int:
        """Replies that the server has finished."""
        with urllib.request.urlopen(f"{self.address}/metrics") as answer:
            return int(re.search(r"^tinymodal_finished_total (\d+)", answer.read().decode(), re.M)[1])

    def answered(self, text: str, after: int = -1) -> None:
        """Wait until this is the last answer, whole, and more than ``after`` were finished."""
        self.wait(lambda: self.finished() > after, "an answer of the server")
        self.wait(lambda: self.answers()[-1:] == [text], repr(text))
        # Done means that the next question may be asked.
        self.wait(lambda: self.all('#talk button[aria-label="Retry"]'), "the end of the answer")

    def tick(self, selector: str) -> None:
        """Tick a box, for good: one that is drawn anew forgets what it was told before."""

        def ticked() -> bool:
            if (box := self.all(selector)[0]).is_selected():
                time.sleep(0.5)
                return self.all(selector)[0].is_selected()
            self.driver.execute_script("arguments[0].click()", box)
            return False

        self.wait(lambda: self.all(selector), selector)
        self.wait(ticked, f"a tick in {selector}")

    def press(self, label: str) -> None:
        button = self.wait(lambda: self.all(f'#talk button[aria-label="{label}"]'), label)[-1]
        self.driver.execute_script("arguments[0].click()", button)

    def tab(self, name: str) -> None:
        self.one("button[role=tab]", name).click()

    def picture(self, name: str) -> None:
        """For the docs, where asked: small enough to look at on a phone."""
        time.sleep(0.6)
        data = self.driver.get_screenshot_as_png()
        if folder := os.environ.get("TINYMODAL_SCREENSHOTS"):
            import PIL.Image

            image = PIL.Image.open(io.BytesIO(data)).convert("RGB").quantize(128)
            image.save(ROOT / folder / name, optimize=True)
            assert (ROOT / folder / name).stat().st_size < 200_000

    def width_overflows(self) -> int:
        return self.driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")


def test_a_picture_is_shown_and_the_answer_comes_in_pieces(driver, address, scene):
    path, (colour, seen) = scene
    page = Page(driver, address)
    page.show(path)
    page.driver.execute_script(
        "window.seen = []; new MutationObserver(() => {"
        "const all = [...document.querySelectorAll('#talk .bot [data-testid=bot] .message-content')];"
        "if (all.length) window.seen.push(all[all.length - 1].innerText.trim());"
        "}).observe(document.querySelector('#talk'), {subtree: true, childList: true, characterData: true})"
    )
    page.ask(SEE)
    page.answered(seen)
    pieces = [text for text in driver.execute_script("return window.seen") if text and seen.startswith(text)]
    assert len(set(pieces)) >= 4
    assert sorted(set(pieces), key=len)[0] != seen
    page.picture("web-chat.png")
    page.ask(QUESTION)  # the picture is still in the conversation
    page.answered(colour)


def test_the_page_reaches_nothing_but_its_server(driver, address):
    page = Page(driver, address)
    names = driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert len(names) > 10
    assert all(name.startswith((address, "data:", "blob:")) for name in names), names
    refused = [
        entry["message"] for entry in driver.get_log("browser") if "Content Security" in entry["message"]
    ]
    assert refused == []
    sent = driver.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "fetch('https://example.org/').then(() => done('sent'), () => done('refused'))"
    )
    assert sent == "refused"
    assert any("Content Security" in entry["message"] for entry in driver.get_log("browser"))
    assert not [b for b in page.all('button[aria-label="Share"]') if b.is_displayed()]


def test_an_answer_is_spoken_and_can_be_played(driver, address, scene):
    path, (colour, _) = scene
    page = Page(driver, address)
    page.one("button", "How it answers").click()
    page.tick("#aloud input")
    page.show(path)
    page.tick("#aloud input")
    page.ask(QUESTION)
    page.wait(lambda: page.all('#talk .minimal-audio-player button[aria-label="Play"]'), "the player")
    link = page.wait(
        lambda: page.all("#talk .bot-row ~ * a[download], #talk a[download$='.wav']"), "the file"
    )[-1]
    with urllib.request.urlopen(link.get_attribute("href")) as file:
        wave, rate_hz = soundfile.read(io.BytesIO(file.read()))
    assert 0.2 < len(wave) / rate_hz < 5
    assert abs(wave).max() > 0.05
    page.wait(lambda: page.all('#talk button[aria-label="Retry"]'), "the end of the answer")
    buttons = "[...document.querySelectorAll('#talk .minimal-audio-player button')]"
    labels = f"{buttons}.map(b => b.getAttribute('aria-label'))"
    driver.execute_script(
        f"window.played = []; new MutationObserver(() => window.played.push({labels}.join()))"
        ".observe(document.querySelector('#talk'), {subtree: true, childList: true, attributes: true})"
    )
    page.press("Play")
    page.wait(lambda: "Pause" in driver.execute_script("return window.played"), "that it plays")
    page.wait(lambda: driver.execute_script(f"return {labels}.join()") == "Play", "that it ends")
    assert colour in page.answers()


def test_a_question_is_asked_again_and_changed_and_all_is_cleared(driver, address, scene):
    path, (colour, seen) = scene
    page = Page(driver, address)
    page.show(path)
    page.ask(QUESTION)
    page.answered(colour)
    before = page.finished()
    page.press("Retry")
    page.answered(colour, before)
    assert page.answers() == [colour]
    page.press("Edit")
    box = page.one("#talk textarea")
    driver.execute_script("arguments[0].focus(); arguments[0].select()", box)
    box.send_keys(SEE)
    page.press("Submit")
    page.answered(seen)
    page.press("Clear")
    page.wait(lambda: page.answers() == [], "an empty page")


def test_an_example_is_asked_aloud(driver, address):
    page = Page(driver, address)
    last = page.wait(lambda: page.all("#talk button.example"), "examples")[-1]
    driver.execute_script("arguments[0].click()", last)
    page.wait(lambda: page.all("#question .thumbnail-item, #question [class*=thumbnail]"), "a thumbnail")
    page.driver.find_element("css selector", '#question button[aria-label="Submit"]').click()
    page.answered("right")  # where the purple cross is


def test_the_microphone_is_heard(driver, address):
    page = Page(driver, address)
    for label in ("Record audio", "Start recording", "Stop recording", "Attach audio"):
        button = page.wait(lambda label=label: page.all(f'#question button[aria-label="{label}"]'), label)[0]
        driver.execute_script("arguments[0].click()", button)
        time.sleep(2 if label == "Start recording" else 0.3)
    page.wait(lambda: page.all("#question .thumbnail-item, #question [class*=thumbnail]"), "the recording")
    page.driver.find_element("css selector", '#question button[aria-label="Submit"]').click()
    # It beeps: no word, but an answer.
    page.wait(lambda: page.answers() and page.answers()[-1] and page.all('#talk button[aria-label="Retry"]'))
    assert "Not answered" not in driver.page_source


def test_what_cannot_be_read_is_said_in_the_chat(driver, address, tmp_path):
    page = Page(driver, address)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + b"nothing" * 9)
    page.show(broken)
    page.ask(QUESTION)
    page.wait(lambda: "picture" in page.one("#talk").text and "Not answered" in page.one("#talk").text)
    assert tempfile.gettempdir() not in page.one("#talk").text
    page.ask("Hello!")
    page.wait(
        lambda: page.answers()[-1:] and page.answers()[-1].startswith("Hello!"), "an answer all the same"
    )


@pytest.mark.parametrize(("size", "scheme"), [(WIDE, "light"), (PHONE, "dark")], ids=["wide", "phone"])
def test_the_tab_explains_an_answer(driver, address, scene, size, scheme):
    path, (colour, _) = scene
    page = Page(driver, address, size, scheme)
    page.tab("Explain")
    page.wait(lambda: page.all("#why-picture input[type=file]"))[0].send_keys(str(path))
    page.wait(lambda: page.all("#why-picture img"), "the picture")
    page.one("#why-question textarea, #why-question input").send_keys(QUESTION)
    driver.execute_script("arguments[0].click()", page.one("#why"))
    frame = page.wait(lambda: page.all("iframe.explained"), "the explanation")[0]
    driver.execute_script("arguments[0].scrollIntoView({block: 'start'})", frame)
    driver.switch_to.frame(frame)
    try:
        assert page.one("h2").text == f"“{colour}”"
        assert len(page.all("article.p0 .map")) == 2
        overflow = driver.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert overflow <= 0
    finally:
        driver.switch_to.default_content()
    assert page.width_overflows() <= 0
    page.picture("web-explain.png" if size == WIDE else "web-explain-phone.png")


def test_on_a_phone_nothing_is_wider_than_the_screen(driver, address, scene):
    path, (_, seen) = scene
    page = Page(driver, address, PHONE, "dark")
    assert page.width_overflows() <= 0
    page.show(path)
    page.ask(SEE)
    page.answered(seen)
    assert page.width_overflows() <= 0
    assert page.one("#question textarea").rect["width"] > 150
    page.picture("web-chat-phone.png")


def test_the_api_beside_it_answers_as_ever(address):
    with urllib.request.urlopen(f"{address}/v1/models") as answer:
        assert json.load(answer)["data"][0]["id"] == "starter"
