"""`adiff app` in headless Chromium: uploads, sliders, the keyboard, hostile names, large files, and what it may read."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64decode
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
import pytest
import soundfile
from PIL import Image

from adiff import fit
from adiff.data.demo_images import make_demo_data
from adiff.data.demo_sounds import make_demo_sounds

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("gradio"), reason="needs gradio: pip install 'adiff[app]'"),
    pytest.mark.skipif(not CHROMIUM, reason="needs the browser chromium"),
    pytest.mark.skipif(not find_spec("websocket"), reason="needs websocket-client, which comes with jupyterlab"),
]
PATIENCE = 120  # seconds: other tests run beside


class Browser:
    "A page in headless Chromium, driven by its DevTools protocol; `requests` are the addresses that it asked for."

    def __init__(self, port, tab=None):
        import websocket

        self.port, pages = port, json.loads(get(f"http://127.0.0.1:{port}/json"))
        address = next(page["webSocketDebuggerUrl"] for page in pages
                       if page["type"] == "page" and tab in (None, page["id"]))
        self.socket = websocket.create_connection(address, timeout=PATIENCE, suppress_origin=True)
        self.number, self.requests = 0, []
        for domain in ("Page", "Network", "DOM", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]

    def value(self, expression):
        "What a JavaScript `expression` gives."
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression, unlike=None):
        "The value of `expression` as soon as it is true, and another than `unlike`."
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            found = self.value(expression)
            if found and found != unlike:
                return found
            time.sleep(0.1)
        raise AssertionError(f"{expression}: still {found!r}; the page says {self.value('document.body.innerText')}")

    def open(self, address):
        self.call("Page.navigate", url=address)
        self.wait("!!document.querySelector('#file input[type=file]')")

    def upload(self, file):
        self.wait("!!document.querySelector('#file input[type=file]')")
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="#file input[type=file]")["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def remove_file(self):
        "Presses the button that removes the uploaded file."
        self.value("document.querySelector('#file button[aria-label^=Remove], #file button[aria-label=Clear]').click()")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode={"ArrowLeft": 37, "ArrowRight": 39, "Tab": 9}[key])

    def screenshot(self, path):
        path.write_bytes(b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def picture(name):
    "Expression: the address of the picture in the component `name`, once it is loaded."
    return (f"(image => image && image.complete && image.naturalWidth > 1 && image.src)"
            f"(document.querySelector('#{name} img'))")


MESSAGE = "(document.querySelector('.toast-body, [data-testid=toast-body]') || {}).innerText"
VERDICT = "(text => /score/.test(text) && text)(document.querySelector('#verdict').innerText)"


@contextmanager
def browser_page(folder):
    "A `Browser` with a profile in `folder`."
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
               f"--user-data-dir={folder}", "--remote-debugging-port=0", "--window-size=1280,1600", "about:blank"]
    process = subprocess.Popen([CHROMIUM, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + PATIENCE
        while not (folder / "DevToolsActivePort").is_file() and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(0.2)
        yield Browser((folder / "DevToolsActivePort").read_text().split()[0])
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a model for pictures of a cup, and one for sounds."
    place = tmp_path_factory.mktemp("app")
    cup = make_demo_data(place / "cup", categories=("cup",), train=12, good=1, per_defect=1)
    fit("deco", cup, place / "pictures", device="cpu",
        overrides={"data": {"image_size": 64}, "training": {"length": 10},
                   "correction": {"num_inference_steps": 5, "starting_step": None}})
    fit("deco", make_demo_sounds(place / "pump", train=6, good=1, per_fault=1), place / "sounds", preset="instant",
        device="cpu")
    return place


@pytest.fixture(scope="module")
def address(place):
    "Where `adiff app` answers, as a user starts it."
    command = [sys.executable, "-c", "from adiff.runs.command_line import main; main()", "app", "--json", "--port",
               "7893", str(place / "pictures/model"), str(place / "sounds/model")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=place)
    lines = [process.stdout.readline() for _ in range(3)]
    yield json.loads("".join(lines))["address"]
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130


@pytest.fixture(scope="module")
def browser(address, tmp_path_factory):
    with browser_page(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser, address):
    "The page as it is when somebody opens it."
    browser.requests.clear()
    browser.open(address)
    return browser


def test_nothing_is_loaded_from_elsewhere(page, address):
    time.sleep(2)
    page.value("1")  # takes in what has been asked for meanwhile
    foreign = [url for url in page.requests if not url.startswith((address, "data:", "blob:"))]
    assert page.requests and foreign == []


def test_an_upload_is_judged_and_sliders_change_the_pictures(page, place):
    page.upload(place / "cup/cup/test/hole/000.png")
    verdict, whole = page.wait(VERDICT), page.wait(picture("overlay"))
    assert "threshold" in verdict and "visits t = 8, 6, 4, 2, 0 (of 10 timesteps)" in verdict
    size = page.value("[document.querySelector('#overlay img').naturalWidth, "
                      "document.querySelector('#overlay img').naturalHeight]")
    assert tuple(size) == Image.open(place / "cup/cup/test/hole/000.png").size
    page.wait(picture("levels"))
    frame = page.wait(picture("film"))
    page.value("document.querySelector('#film_step input[type=range]').focus()")
    page.press("ArrowLeft")  # by keyboard
    page.wait(picture("film"), unlike=frame)
    page.value("document.querySelector('#share input[type=range]').focus()")
    for _ in range(5):
        page.press("ArrowLeft")
    page.wait("/No verdict/.test(document.querySelector('#verdict').innerText)")  # the threshold is not for this t*
    page.wait(picture("overlay"), unlike=whole)


def test_what_the_network_sees(page, place):
    page.upload(place / "cup/cup/test/good/000.png")
    page.wait(VERDICT)
    page.value("document.querySelectorAll('button[role=tab]')[1].click()")
    seen = page.wait(picture("corrupted"))
    page.value("document.querySelector('#mask_ratio input[type=range]').focus()")
    page.press("ArrowRight")
    page.wait(picture("corrupted"), unlike=seen)


def test_two_tabs_keep_their_own_answers(page, place, address):
    tab = page.call("Target.createTarget", url=address)["targetId"]
    other = Browser(page.port, tab)
    page.upload(place / "cup/cup/test/hole/000.png")
    other.upload(place / "pump/pump/test/knock/000.wav")
    assert "cup" in page.wait(VERDICT) and "pump" in other.wait(VERDICT)
    page.call("Target.closeTarget", targetId=tab)
    page.call("Page.bringToFront")  # a hidden page loads no pictures


def test_a_sound_goes_to_the_model_of_sounds(page, place):
    page.upload(place / "pump/pump/test/knock/000.wav")
    assert "pump" in page.wait(VERDICT)
    page.wait(picture("overlay"))


def test_an_example_can_be_chosen(page):
    page.wait("document.querySelectorAll('#examples button').length > 6")
    page.value("document.querySelectorAll('#examples button')[2].click()")
    assert "cup" in page.wait(VERDICT)


def test_bad_files_get_one_line(page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.upload(tmp_path / "broken.png")
    message = page.wait(MESSAGE)
    assert "broken.png: not an image" in message and str(tmp_path) not in message and "/tmp" not in message
    page.wait("/No answer/.test(document.querySelector('#verdict').innerText)")  # it stays when the message has gone
    assert "broken.png: not an image" in page.value("document.querySelector('#verdict').innerText")
    assert not page.value(picture("overlay"))


def test_a_hostile_name_is_text(page, place, tmp_path):
    name = "<img src=x onerror=window.hacked=1>..;$(touch hacked).png"
    (tmp_path / name).write_bytes(b"no picture")
    page.upload(tmp_path / name)
    page.wait(MESSAGE)
    shutil.copy(place / "cup/cup/test/hole/000.png", tmp_path / name)
    page.open(page.value("location.href"))
    page.upload(tmp_path / name)
    assert "score" in page.wait(VERDICT)
    assert page.value("window.hacked") is None and not (place / "hacked").exists()


def test_a_file_of_100_mb_is_refused(page, tmp_path):
    with (tmp_path / "large.wav").open("wb") as file:
        file.truncate(100 * 2**20)
    page.upload(tmp_path / "large.wav")
    assert "size" in page.wait(MESSAGE).lower()
    assert not page.value(VERDICT)


def get(address, **data):
    "The answer to a request, as text."
    with urllib.request.urlopen(urllib.request.Request(address, **data)) as response:  # noqa: S310, our own server
        return response.read().decode()


def test_no_file_of_the_machine_can_be_read(address, place):
    (place / "secret.txt").write_text("secret")
    (place / "link.txt").symlink_to("secret.txt")
    for path in (place / "secret.txt", "secret.txt", place / "link.txt", "/etc/hostname", place / "pictures/config.json",
                 place / "cup/cup/test/hole/000.png", "..%2f..%2fetc/hostname"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(f"{address}/gradio_api/file={path}")
        assert refused.value.code in (403, 404), path
    body = {"data": [{"path": str(place / "secret.txt"), "meta": {"_type": "gradio.FileData"}}, 0]}
    event = json.loads(get(f"{address}/gradio_api/call/take", data=json.dumps(body).encode(),
                           headers={"Content-Type": "application/json"}))["event_id"]
    answer = get(f"{address}/gradio_api/call/take/{event}")
    assert "event: error" in answer and "secret.txt" not in answer.replace(str(place), "")


def test_the_command_says_what_is_missing(tmp_path):
    command = [sys.executable, "-c", "from adiff.runs.command_line import main; main()", "app"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "run adiff demo, or give the model folder" in done.stderr


def test_a_long_sound_is_windows(place, tmp_path):
    from adiff.lab.app import look, open_models

    (sounds,) = open_models([place / "sounds/model"], "cpu")
    noise = np.random.default_rng(0).normal(0, 0.02, 16000 * 9)
    noise[16000 * 5:16000 * 5 + 4000] += 0.5
    soundfile.write(tmp_path / "long.wav", noise, 16000)
    answer = look(sounds.detector, tmp_path / "long.wav")
    assert " s" in answer.text and answer.overlay.size[0] > 500
    assert os.listdir(tmp_path) == ["long.wav"]
