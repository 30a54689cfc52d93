"""The page of `--mode=app`: in a real browser, against hostile uploads, and as a command."""

import base64
import http.client
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from command_line import SMALL, compiled_once, contents, run
from PIL import Image
from sklearn.datasets import load_digits

from flaxcls.deploy import app
from flaxcls.deploy.answers import MOST_PIXELS, Answers, ServedRun, new_folder
from flaxcls.deploy.predictor import Predictor
from flaxcls.errors import InputError
from flaxcls.evaluate import softmax

pytest.importorskip("starlette", reason="the page needs Starlette, of the extra `app`")
pytest.importorskip("uvicorn", reason="the page needs uvicorn, of the extra `app`")

from flaxcls.deploy.page import LARGEST_PICTURE, PageServer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
HELD_BACK = 0  # the digit that the run on digits does not know
MILLISECONDS = 60_000  # a browser, a server and other tests share two cores
ODD_NAME = "<b>null</b> ../∅"


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A run on grey digits, light on dark, that does not know one of them."""
    folder = tmp_path_factory.mktemp("app") / "runs" / "digits"
    known = tuple(str(digit) for digit in range(10) if digit != HELD_BACK)
    done = run(
        *SMALL,
        f"--config.data.classes={known}",
        "--config.data.max_per_class=40",
        "--config.train.epochs=6",
        f"--workdir={folder}",
    )
    assert done.code == 0, done.error
    return folder


@pytest.fixture(scope="module")
def colours(digits) -> Path:
    """A run on colour photos whose classes have parents, and names that are markup."""
    data = digits.parents[1] / "data"
    levels = {"<i>red": (210, 110, 110), "orange": (230, 170, 70), "blue": (110, 110, 210)}
    for name, level in levels.items():
        folder = data / name
        folder.mkdir(parents=True)
        for seed in range(16):
            photo(level, seed).save(folder / f"{seed}.png")
    done = run(
        "--config=lenet",
        "--config.data.source=image_folder",
        f"--config.data.path={data}",
        "--config.data.image_size=28",
        "--config.data.test_fraction=0.3",
        "--config.data.parents=('blue=cold', '.*=warm')",
        "--config.model.name=hierarchical",
        "--config.model.trunk=lenet",
        "--config.loss.name=hierarchical",
        "--config.train.batch_size=8",
        "--config.train.epochs=4",
        "--config.log.plots=False",
        "--config.log.tensorboard=False",
        f"--workdir={digits.parent / 'colours'}",
    )
    assert done.code == 0, done.error
    return digits.parent / "colours"


class Page:
    """The page on some runs, served in this process."""

    def __init__(self, *folders: Path):
        self.answers = Answers([ServedRun.load(folder, folder.name) for folder in folders])
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = PageServer(self.answers, self.listener, ("shown.example",))
        self.server.start()

    def close(self) -> None:
        self.server.stop()
        self.listener.close()
        assert not self.server.is_running

    def request(self, method: str, path: str, body=None, headers=None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            self.headers = dict(response.headers)
            return response.status, response.read()
        finally:
            connection.close()

    def ask(self, path: str, body: bytes | None = None):
        """The answer, from JSON as a browser reads it."""
        status, content = self.request("GET" if body is None else "POST", path, body)
        assert status in (200, 413), content
        return json.loads(content, parse_constant=pytest.fail)

    def refused(self, path: str, body: bytes | None = None) -> str:
        """The sentence with which something is refused."""
        answer = self.ask(path, body)
        assert answer.keys() == {"refused"}
        assert "\n" not in answer["refused"]
        return answer["refused"]

    def teach(self, **wish):
        """What comes of a lesson."""
        number = self.ask("/api/teach", json.dumps(wish).encode())["number"]
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            lesson = self.ask(f"/api/lesson?number={number}")
            if lesson["result"] or lesson["refused"]:
                return lesson
            time.sleep(0.05)
        raise AssertionError(lesson)


@pytest.fixture(scope="module")
def page(digits, colours):
    """The page on both runs; what it is taught goes beside them."""
    served = Page(digits, colours)
    yield served
    served.close()


def photo(level, seed: int = 0, size=(40, 30)) -> Image.Image:
    rng = np.random.default_rng(seed)
    noise = rng.integers(-25, 25, (size[1], size[0], 3))
    return Image.fromarray((np.array(level) + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def digit_files(digit: int) -> list[bytes]:
    """Images of a digit, PNG of 8 x 8, light on dark."""
    stored = load_digits()
    images = (stored.images[stored.target == digit] * 255 / 16).round().astype(np.uint8)
    return [encoded(Image.fromarray(image)) for image in images]


def pixels(address: str) -> np.ndarray:
    """The image that an address (data:) holds."""
    head, _, data = address.partition(",")
    assert re.fullmatch(r"data:image/(png|jpeg);base64", head)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))


# --- in a browser


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, without a window, with a camera that it makes up."""
    reason = "the page is tried in Chromium by Playwright, of the extra `test`"
    sync_api = pytest.importorskip("playwright.sync_api", reason=reason)
    if CHROMIUM is None:
        pytest.skip("there is no chromium to try the page in; apt install chromium")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--use-fake-device-for-media-stream",
                "--use-fake-ui-for-media-stream",
            ],
        )
        yield launched
        launched.close()


class Tab:
    """The page in a tab, of which all is recorded that it asks for and complains of."""

    def __init__(self, browser, url: str, **settings):
        self.context = browser.new_context(**settings)
        self.context.set_default_timeout(MILLISECONDS)
        self.url = url
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("websocket", lambda websocket: self.asked.append(websocket.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda said: self.complaints.append(said.text))

    def open(self) -> None:
        self.page.goto(self.url)
        self.page.wait_for_selector("body[data-ready]")

    def close(self) -> None:
        """Ends it, and sees that nothing was wrong, and nobody else was asked."""
        self.context.close()
        assert self.complaints == []
        elsewhere = [
            url for url in self.asked if not url.startswith((f"{self.url}/", "data:", "blob:"))
        ]
        assert elsewhere == []

    def choose(self, content: bytes, name: str = "photo.png", into: str = "#photo") -> None:
        file = {"name": name, "mimeType": "application/octet-stream", "buffer": content}
        self.page.set_input_files(into, file)

    def answered(self) -> None:
        """Waits until nothing is asked any more."""
        self.page.wait_for_selector("#results:not([aria-busy]) .answer")

    def stroke(self, points) -> None:
        """Draws a line through points, in 336ths of the canvas."""
        box = self.page.locator("#canvas").bounding_box()
        scale = box["width"] / 336
        places = [(box["x"] + x * scale, box["y"] + y * scale) for x, y in points]
        self.page.mouse.move(*places[0])
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*place)
        self.page.mouse.up()

    def source(self, selector: str) -> np.ndarray:
        return pixels(self.page.locator(selector).first.get_attribute("src"))

    def texts(self, selector: str) -> list[str]:
        texts = self.page.locator(selector).all_inner_texts()
        return [text.replace("\N{NO-BREAK SPACE}", " ") for text in texts]


@pytest.fixture
def tab(browser, page):
    opened = Tab(browser, page.url, viewport={"width": 1280, "height": 900})
    opened.open()
    yield opened
    opened.close()


def shown_share(share: float) -> str:
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def test_an_uploaded_photo_gets_bars_and_a_heat_map_of_each_run(tab, digits, colours):
    content = digit_files(7)[3]
    tab.choose(content)
    tab.answered()
    assert tab.texts(".answer .of") == ["digits", "colours"]
    for card, folder in enumerate((digits, colours), 1):
        predictor = Predictor.from_run(folder, batch_size=1)
        prediction = predictor(predictor.decode(content, invert="auto")[None])
        shares = softmax(prediction.logits)[0]
        order = np.argsort(-shares, kind="stable")[:5]
        bars = f".answer:nth-child({card}) .bars >> nth=0 >> "
        names = [predictor.trained.class_names[k] for k in order]
        assert tab.texts(f"{bars}.name") == names
        assert tab.texts(f"{bars}.n") == [shown_share(shares[k]) for k in order]
    # The picture is the file's, enlarged, and the other one differs from it by colours.
    photo = tab.source(".pictures img").astype(int)
    small = np.asarray(Image.open(io.BytesIO(content)))
    assert np.abs(photo[17::35, 17::35, 0] - small).max() <= 12
    heat = tab.source(".pictures figure:nth-child(2) img").astype(int)
    assert heat.shape == photo.shape
    assert np.abs(heat[..., 0] - heat[..., 2]).max() > 40


def test_the_class_to_explain_and_the_method_can_be_chosen(tab):
    tab.choose(digit_files(7)[3])
    tab.answered()
    first = tab.source(".pictures figure:nth-child(2) img")
    caption = tab.page.locator(".pictures figure:nth-child(2) figcaption").first
    assert "Speaks for" in caption.inner_text()
    tab.page.select_option("#class", label="3")
    caption.get_by_text("for 3,").wait_for()
    tab.answered()
    second = tab.source(".pictures figure:nth-child(2) img")
    assert (first != second).any()
    tab.page.select_option("#method", "occlusion")
    caption.get_by_text("(occlusion)").wait_for()
    tab.answered()
    assert (tab.source(".pictures figure:nth-child(2) img") != second).any()


def test_a_sketch_on_paper_is_swapped_for_a_run_of_light_on_dark(tab, digits):
    tab.page.click("#tab-draw")
    assert not tab.page.locator(".answer").count()
    tab.stroke([(168, 60), (168, 120), (168, 200), (168, 280)])  # a one
    tab.answered()
    note, other = tab.texts(".saw span")
    assert "light and dark swapped, as the run was trained on light things" in note
    assert "swapped" not in other  # the other run is on photos
    square = tab.source(".saw img")
    assert square.shape == (28, 28)
    assert square[:, 0].max() < 20
    assert square[14, 14] > 200
    predictor = Predictor.from_run(digits, batch_size=1)
    (likeliest,) = predictor(square[None, :, :, None]).logits.argmax(axis=1)
    says = tab.texts(".answer .says")[0]
    assert says.startswith(f"{predictor.trained.class_names[likeliest]} ")
    drawn = tab.source(".pictures img").astype(int)
    assert drawn[0, 0].min() > 240
    assert drawn[len(drawn) // 2, len(drawn) // 2].max() < 15
    tab.page.select_option("#invert", "no")
    tab.page.get_by_text(re.compile("swapped, as the run")).wait_for(state="detached")
    tab.answered()
    assert tab.source(".saw img")[:, 0].min() > 235
    tab.page.click("#clear")
    tab.page.select_option("#invert", "auto")


def test_the_webcam_takes_a_picture(tab):
    tab.page.click("#tab-webcam")
    tab.page.locator("#shoot:enabled").click()
    tab.answered()
    taken = tab.source(".pictures img").reshape(-1, 3).astype(int)
    # Chromium's camera shows a green ground.
    assert np.median(taken[:, 1] - taken[:, [0, 2]].max(axis=1)) > 80
    tab.page.click("#tab-photo")
    assert tab.page.evaluate("document.getElementById('video').srcObject") is None


def test_without_a_camera_the_page_says_so(browser, page):
    tab = Tab(browser, page.url)
    missing = "navigator.mediaDevices.getUserMedia = "
    missing += "async () => { throw new DOMException('', 'NotFoundError'); }"
    tab.page.add_init_script(missing)
    tab.open()
    tab.page.click("#tab-webcam")
    tab.page.get_by_text("There is no camera").wait_for()
    assert tab.page.locator("#shoot").is_disabled()
    tab.close()


def test_what_is_no_picture_is_refused_in_words_and_the_page_goes_on(tab):
    trouble = tab.page.locator("#trouble")
    tab.choose(b"#!/bin/sh\nrm -rf /\n", "photo.jpg")
    trouble.get_by_text("The file is no picture").wait_for()
    tab.choose(bytes(LARGEST_PICTURE + 1))
    trouble.get_by_text("more than the 20 MB").wait_for()
    tab.choose(grey_png(30_000, 30_000))
    trouble.get_by_text("64 million").wait_for()
    tab.choose(digit_files(7)[3])
    tab.answered()
    assert trouble.is_hidden()


def test_a_class_is_taught_in_the_browser_and_recognised(tab, page, digits):
    zeros = digit_files(HELD_BACK)
    before = contents(digits)
    tab.page.select_option("#compare", "")
    for i, content in enumerate(zeros[:8]):
        tab.choose(content, f"{i}.png", "#example-files")
    tab.choose(b"rubbish", "<img src=x onerror=alert(1)>.png", "#example-files")
    tab.page.get_by_text("<img src=x onerror=alert(1)>.png: the file is no picture").wait_for()
    tab.choose(zeros[8])
    tab.answered()
    tab.page.click("#example-above")
    tab.page.get_by_text("9 examples").wait_for()
    assert tab.page.locator("#begin").is_disabled()  # It has no name yet.
    tab.page.fill("#name", ODD_NAME)
    tab.page.check("input[value=finetune]")
    tab.page.click("#begin")
    tab.page.locator("#progress").wait_for()
    tab.page.locator("#learned .learned").wait_for()
    assert tab.page.locator("#lesson").is_hidden()

    facts = dict(zip(tab.texts("#learned .label"), tab.texts("#learned .value"), strict=True))
    shares = {name: float(value.removesuffix(" %")) for name, value in facts.items()}
    assert shares["Old classes before"] > 80
    assert shares["Old classes before"] - shares["Old classes after"] < 12
    assert shares["Its photos"] >= 80

    new = page.answers.runs[-1].predictor.trained
    assert new.folder.parent == digits.parent
    assert re.fullmatch(r"digits-plus-[\w.-]+", new.folder.name)
    assert new.class_names[-1] == ODD_NAME
    assert contents(digits) == before
    assert tab.page.locator("#run option:checked").inner_text() == new.folder.name
    # Markup in a name is text: nothing of it became an element.
    assert tab.page.locator("main b").count() == 0

    unseen = zeros[60:65]
    hits = 0
    for content in unseen:
        tab.choose(content)
        tab.page.wait_for_selector("#results[aria-busy], #results:not([aria-busy]) .answer")
        tab.answered()
        hits += tab.texts(".answer .says")[0].startswith(ODD_NAME)
    assert hits >= 3
    tab.open()
    assert new.folder.name in tab.texts("#run option")


def test_examples_can_come_from_the_webcam_and_go_again(tab):
    tab.page.click("#example-camera")
    for count in (1, 2):
        tab.page.locator("#example-shoot:enabled").click()
        tab.page.get_by_text(re.compile(f"^{count} example")).wait_for()
    tab.page.get_by_role("button", name="Remove example 1").click()
    tab.page.get_by_text(re.compile("^1 example,")).wait_for()
    # They are what the chosen run sees: colour of the other run.
    tab.page.select_option("#run", label="colours")
    tab.page.locator("#parent option", has_text="warm").wait_for(state="attached")
    tab.page.get_by_text(re.compile("^1 example,")).wait_for()
    tab.page.click("#example-camera")
    assert tab.page.locator("#example-webcam").is_hidden()


def test_parents_are_shown_and_are_asked_for(tab):
    tab.page.select_option("#run", label="colours")
    tab.page.select_option("#compare", "")
    tab.choose(encoded(photo((40, 40, 200), 99)))
    tab.answered()
    assert tab.texts(".answer .bars-title") == ["Class", "Parent"]
    assert set(tab.texts(".answer .bars >> nth=1 >> .name")) == {"warm", "cold"}
    assert tab.page.locator("#parent-field").is_visible()
    assert tab.texts("#class option")[1] == "<i>red"


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_nothing_hangs_over_the_edge(browser, page, width, height):
    tab = Tab(browser, page.url, viewport={"width": width, "height": height})
    tab.open()
    tab.choose(encoded(photo((200, 40, 40), size=(300, 100))))
    tab.answered()
    for source in ("#tab-webcam", "#tab-draw", "#tab-photo"):
        tab.page.click(source)
        assert tab.page.evaluate("document.scrollingElement.scrollWidth") <= width
    cards = [card.bounding_box() for card in tab.page.locator(".answer").all()]
    side_by_side = cards[0]["y"] == cards[1]["y"]
    assert side_by_side == (width > 1000)
    tab.close()


# --- without a browser


def test_only_this_page_is_answered(page):
    look = "/api/look?run=0"
    picture = digit_files(3)[0]

    def status(**headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return page.request("POST", look, picture, headers)[0]

    own = f"127.0.0.1:{page.port}"
    assert status(Host=own, Origin=f"http://{own}", Sec_Fetch_Site="same-origin") == 200
    assert status(Host=f"localhost:{page.port}") == 200
    assert status(Host=f"shown.example:{page.port}") == 200
    assert status(Host="evil.example") == 403
    assert status(Host="127.0.0.1.evil.example") == 403
    assert status(Host="[::1") == 403
    assert status(Origin="http://evil.example") == 403
    assert status(Origin="null") == 403
    assert status(Origin=f"http://127.0.0.1:{page.port + 1}") == 403
    assert status(Sec_Fetch_Site="cross-site") == 403
    code, content = page.request("GET", "/api/runs", None, {"Sec-Fetch-Site": "cross-site"})
    assert code == 403
    assert json.loads(content) == {"refused": "another page may not ask this one"}


def test_the_browser_is_told_to_ask_nobody_else(page):
    for path in ("/", "/app.js", "/api/runs", "/nowhere"):
        page.request("GET", path)
        policy = page.headers["content-security-policy"]
        sources = re.findall(r"\S+", re.sub(r"[\w-]+-(src|uri|action|ancestors)", "", policy))
        assert {s.rstrip(";") for s in sources} <= {
            "'none'",
            "'self'",
            "data:",
            "blob:",
            "mediastream:",
        }
        assert page.headers["x-content-type-options"] == "nosniff"
    for path in ("/", "/app.js", "/app.css", "/page.css"):
        assert not re.search(rb"(https?:)?//[\w.-]+\.\w+", page.request("GET", path)[1])


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd",
        "/..%2f..%2f..%2fetc%2fpasswd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/app.js/../../predictor.py",
        "/app.js%00.html",
        "/templates/app.html",
        "/file=/etc/passwd",
        "/gradio_api/file=/etc/passwd",
        "/api/../../../etc/passwd",
        "/api/look?run=../../etc/passwd",
        "/api/lesson?number=../../etc/passwd",
        "/" + "a" * 5000,
    ],
)
def test_no_address_names_a_file(page, path):
    status, content = page.request("GET", path)
    assert status in (200, 404, 405)
    assert b"root:" not in content
    assert json.loads(content).keys() == {"refused"}


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(page, method):
    assert page.request(method, "/api/runs")[0] == 405
    assert page.request(method, "/")[0] == 405


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def grey_png(width: int, height: int, data: bytes | None = None) -> bytes:
    """A PNG of black pixels, one bit each, which packs 900 megapixels into 110 KB."""
    if data is None:
        packer = zlib.compressobj(9)
        row = bytes(1 + -(-width // 8))
        data = b"".join(packer.compress(row * 1000) for _ in range(height // 1000)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def with_size(kind: str, mark: bytes, offset: int, form: str, *size: int) -> bytes:
    """A file whose header says another size."""
    data = bytearray(encoded(photo((90, 90, 90)), kind))
    at = data.index(mark) + offset
    data[at : at + struct.calcsize(form)] = struct.pack(form, *size)
    return bytes(data)


def damaged_png() -> bytes:
    data = bytearray(encoded(photo((90, 90, 90))))
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    return bytes(data)


REFUSED = {
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"not a picture", "no picture"),
    "markup": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture"),
    "program": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) run\n", "no picture"),
    "archive": (lambda: b"PK\x03\x04" + bytes(60), "no picture"),
    "pickle": (lambda: b"\x80\x04cposix\nsystem\n.", "no picture"),
    "noise": (lambda: random.Random(0).randbytes(100_000), "no picture"),
    "bomb": (lambda: grey_png(30_000, 30_000), "64 million"),
    "just too many": (lambda: grey_png(8_001, 8_000), "64 million"),
    "huge header": (lambda: grey_png(2**31 - 1, 2**31 - 1, b""), "64 million"),
    "huge jpeg": (lambda: with_size("jpeg", b"\xff\xc0", 5, ">HH", 65500, 65500), "64 million"),
    "huge gif": (lambda: with_size("gif", b"GIF8", 6, "<HH", 65535, 65535), "64 million"),
    "cut jpeg": (lambda: encoded(photo((9, 9, 9), size=(300, 300)), "jpeg")[:9000], "truncated"),
    "cut png": (lambda: encoded(photo((9, 9, 9), size=(300, 300)))[:9000], "truncated"),
    "damaged": (damaged_png, "cannot be decoded"),
    "floats": (lambda: encoded(Image.fromarray(np.eye(8, dtype=np.float32)), "tiff"), "float"),
    "20 MB and one": (lambda: bytes(LARGEST_PICTURE + 1), "more than 20 MB"),
    "50 MB": (lambda: bytes(50 * 2**20), "more than 20 MB"),
}


def moving(kind: str) -> bytes:
    frames = [photo((200, 40, 40)), photo((40, 40, 200))]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=40)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo((200, 40, 40), size=(60, 20)), "jpeg", exif=exif)


ANSWERED = {
    "animated gif": lambda: moving("gif"),
    "animated webp": lambda: moving("webp"),
    "print": lambda: encoded(photo((200, 40, 40)).convert("CMYK"), "jpeg"),
    "16 bit": lambda: encoded(
        Image.fromarray(np.asarray(photo((90, 90, 90)).convert("L")).astype(np.uint16) * 257)
    ),
    "one bit": lambda: encoded(photo((90, 90, 90)).convert("1")),
    "transparent": lambda: encoded(photo((200, 40, 40)).convert("P"), transparency=0),
    "one pixel": lambda: encoded(photo((90, 90, 90), size=(1, 1)), "bmp"),
    "a line": lambda: encoded(photo((90, 90, 90), size=(1, 6000))),
    "turned": turned,
    "as many as may be": lambda: grey_png(8_000, 8_000),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_hostile_upload_is_refused_in_words(page, kind):
    make, sentence = REFUSED[kind]
    content = make()
    for path in ("/api/look?run=0", "/api/look?run=1", "/api/example?run=1"):
        assert re.search(sentence, page.refused(path, content))


@pytest.mark.parametrize("kind", ANSWERED)
def test_an_odd_upload_is_answered_like_any_other(page, kind):
    content = ANSWERED[kind]()
    for number in (0, 1):
        answer = page.ask(f"/api/look?run={number}", content)
        assert 0.2 < sum(bar["share"] for bar in answer["top"]) <= 1.0001
        photo, heat = pixels(answer["photo"]), pixels(answer["overlay"])
        assert photo.shape == heat.shape
        assert max(photo.shape) <= 720
    if kind == "turned":
        assert photo.shape[0] > photo.shape[1]


def test_the_limit_of_pixels_is_that_of_the_sentence(page):
    assert MOST_PIXELS == 8_000 * 8_000


def test_wrong_questions_are_refused_in_words(page):
    picture = digit_files(3)[0]
    for question, sentence in {
        "": "run is no number",
        "run=9": "no such run",
        "run=-1": "run is no number",
        "run=٣": "run is no number",
        "run=0&class=9": "no class number 9",
        "run=0&class=x": "class is no number",
        "run=0&method=shap": "no method 'shap'",
        "run=0&method=cam": "cam cannot explain this model",
        f"run=0&method={quote('../../x')}": "no method",
        "run=0&invert=perhaps": "is none of yes, no, auto",
    }.items():
        question = quote(question, safe="=&%")
        assert sentence in page.refused(f"/api/look?{question}", picture)


def test_wrong_lessons_are_refused_in_words(page, digits):
    good = [page.ask("/api/example?run=0", content)["square"] for content in digit_files(0)[:3]]
    colour = page.ask("/api/example?run=1", digit_files(0)[0])["square"]
    larger = "data:image/png;base64," + base64.b64encode(grey_png(64, 1000)).decode()
    wish = {"run": 0, "name": "new", "parent": None, "method": "imprint", "squares": good}
    count = len(page.answers.runs)
    before = contents(digits.parent)
    for change, sentence in (
        ({"squares": good[:2]}, "give 3 to 20"),
        ({"squares": good * 7}, "give 3 to 20"),
        ({"squares": [*good[:2], larger]}, "read for another run"),
        ({"squares": [*good[:2], "data:image/png;base64,!!!!"]}, "not understood"),
        ({"squares": [*good[:2], 7]}, "not understood"),
        ({"squares": [*good[:2], "AAAA"]}, "no picture"),
        ({"squares": "../../etc/passwd"}, "not understood"),
        ({"run": 99}, "no such run"),
        ({"run": True}, "not understood"),
        ({"run": "0"}, "not understood"),
        ({"name": "  "}, "name is empty"),
        ({"name": "two\nlines"}, "no name that can be shown"),
        ({"name": "n" * 101}, "at most 100"),
        ({"name": "7"}, "has a class '7' already"),
        ({"method": "magic"}, "imprint, finetune"),
        ({"parent": "animal"}, "no parents"),
        ({"run": 1, "squares": [colour] * 3}, "have parents"),
        ({"run": 1, "squares": [colour] * 3, "parent": "hot"}, "none of"),
        ({"more": 1}, "not understood"),
    ):
        sent = json.dumps({**wish, **change}).encode()
        assert sentence in page.refused("/api/teach", sent), change
    for sent in (b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"run": NaN}'):
        assert "not understood" in page.refused("/api/teach", sent)
    assert "no class is being taught" in page.refused("/api/lesson?number=9999")
    assert len(page.answers.runs) == count
    assert contents(digits.parent) == before


def test_uploads_at_the_same_time_are_all_answered(page):
    pictures = [digit_files(3)[0], b"rubbish", grey_png(30_000, 30_000), moving("gif")]
    alone = [page.ask("/api/look?run=0", picture) for picture in pictures]

    def ask(i: int):
        return i, page.ask("/api/look?run=0", pictures[i % 4])

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(ask, range(40)))
    busy = 0
    for i, answer in answers:
        if "too much to do" in answer.get("refused", ""):
            busy += 1
        else:
            assert answer.get("top") == alone[i % 4].get("top")
            assert answer.get("refused") == alone[i % 4].get("refused")
    assert busy < 40
    assert "top" in page.ask("/api/look?run=0", pictures[0])


def test_who_goes_away_in_the_middle_is_forgotten(page):
    head = "POST /api/look?run=0 HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n"
    for sent in (head.encode() + bytes(5000), b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9\r\n"):
        with socket.create_connection(("127.0.0.1", page.port)) as connection:
            connection.sendall(sent)
    assert "top" in page.ask("/api/look?run=0", digit_files(3)[0])


def test_an_upload_opens_no_file_for_writing(page):
    picture = encoded(photo((200, 40, 40), size=(3000, 2000)), "bmp")  # 18 MB
    page.ask("/api/look?run=1", picture)  # what is read once is read
    opened: list[tuple[str, int]] = []
    listening = True

    def hear(event: str, arguments: tuple) -> None:
        if listening and event == "open" and isinstance(arguments[0], str | bytes):
            opened.append((os.fsdecode(arguments[0]), arguments[2]))

    sys.addaudithook(hear)
    try:
        page.ask("/api/look?run=1", picture)
        page.ask("/api/example?run=0", picture)
        for make, _ in REFUSED.values():
            page.refused("/api/look?run=0", make())
    finally:
        listening = False
    written = [path for path, flags in opened if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)]
    assert written == []


def test_imprint_adds_a_child_of_a_parent_beside_the_run(page, colours):
    green = [encoded(photo((40, 200, 40), seed)) for seed in range(4)]
    squares = [page.ask("/api/example?run=1", content)["square"] for content in green[:3]]
    wish = {"run": 1, "name": "green", "parent": "cold", "method": "imprint", "squares": squares}
    lesson = page.teach(**wish)
    result = lesson["result"]
    assert result is not None, lesson
    assert Path(result["folder"]) == colours.with_name("colours-plus-green")
    run_ = page.ask("/api/runs")["runs"][result["run"]]
    assert run_["classes"][-1] == "green"
    assert run_["origin"] == "colours"
    answer = page.ask(f"/api/look?run={result['run']}", green[3])
    assert answer["top"][0]["name"] == "green"
    # The next of that name gets a folder of its own.
    assert new_folder(colours, "green").name == "colours-plus-green-2"


@pytest.mark.parametrize("name", ["../../etc", "/", "..", "a/b", "\N{SNOWMAN}", "x" * 100, "n\0l"])
def test_no_name_leads_out_of_the_folder_of_the_runs(tmp_path, name):
    folder = new_folder(tmp_path / "run", name)
    assert folder.parent == tmp_path
    assert folder.resolve().parent == tmp_path.resolve()
    folder.mkdir()


# --- the command


def test_ctrl_c_ends_the_page_quietly(digits):
    command = [sys.executable, "-m", "flaxcls.main", "--mode=app", f"--workdir={digits}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [*command, "--port=0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        watch = threading.Timer(120, process.kill)
        watch.start()
        try:
            address = re.search(r"http://127\.0\.0\.1:(\d+)$", process.stdout.readline().strip())
            assert address, process.stderr.read()
            connection = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=60)
            connection.request("GET", "/")
            assert b"What the model sees" in connection.getresponse().read()
            process.send_signal(signal.SIGINT)
            _, error = process.communicate()
        finally:
            watch.cancel()
            process.kill()
    assert process.returncode == 0
    assert error == ""


def test_a_port_in_use_is_named(digits):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run("--mode=app", f"--workdir={digits}", f"--port={port}")
    assert f"--port: {port} is in use" in done.sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--port=99999"], "--port: 99999 is no port"),
        (["--host=no.such.host.invalid"], "no name or address of this machine"),
        (["--host=192.0.2.1"], "no address of this machine"),
    ],
)
def test_an_address_that_cannot_be_listened_at_is_named(digits, arguments, sentence):
    assert sentence in run("--mode=app", f"--workdir={digits}", *arguments).sentence


def test_a_missing_library_is_named(digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "flaxcls.deploy.page")
    monkeypatch.delattr("flaxcls.deploy.page")
    done = run("--mode=app", f"--workdir={digits}", "--port=0")
    assert "needs uvicorn" in done.sentence
    assert "pip install 'flaxcls[app]'" in done.sentence


def test_folders_that_hold_no_run_are_named(digits, colours, tmp_path):
    both = f"{digits},{colours}"
    assert app.find_folders(both) == [digits, colours]
    assert app.find_folders(f"{digits}, {digits}/") == [digits]
    assert set(app.find_folders(f"{digits.parent}/*")) >= {digits, colours}
    for named, sentence in (
        (f"{tmp_path}/*", "there is no run"),
        (f"{digits},{tmp_path}/none", "there is no run"),
        (",", "is empty"),
    ):
        with pytest.raises(InputError, match=sentence):
            app.find_folders(named)
    with pytest.raises(InputError, match="holds no trained run"):
        app.load_runs(f"{digits},{tmp_path}")
    shutil.copytree(digits, tmp_path / "run")
    (tmp_path / "run" / "weights.safetensors").write_bytes(b"rubbish")
    with pytest.raises(InputError, match=r"weights\.safetensors"):
        app.load_runs(str(tmp_path / "run"))


def test_runs_of_the_same_name_are_told_apart(digits, tmp_path):
    other = Path(shutil.copytree(digits, tmp_path / "digits"))
    runs = app.load_runs(f"{digits},{other}")
    assert [run.name for run in runs] == [str(digits), str(other)]


def test_too_many_runs_are_refused(digits, tmp_path):
    for i in range(13):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "preprocess.json").touch()
    with pytest.raises(InputError, match="names 13 runs, of which the page takes 12"):
        app.load_runs(f"{tmp_path}/*")
