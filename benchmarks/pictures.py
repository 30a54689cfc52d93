"""The README's pictures of what a person looks at, made from runs by the commands that it gives.

    python -m flaxcls.main --config=vgg13:caltech101_3 --config.model.name=baseline_cnn \\
        --config.data.path=DIR --config.data.image_size=128 --config.train.epochs=8 \\
        --config.optimizer.name=adam --config.optimizer.learning_rate=1e-3 --workdir=runs/photos
    python -m flaxcls.main --config=fashion/fast --config.data.path=FASHION \\
        --config.data.classes="('T-shirt/top','Trouser','Pullover','Dress','Coat','Sandal',\\
        'Shirt','Sneaker','Ankle boot')" --config.train.epochs=6 --workdir=runs/clothes
    python benchmarks/pictures.py --photos=runs/photos --photos_path=DIR \\
        --clothes=runs/clothes --bags=TEN_BAGS

`photos` is a run on a folder of photos, `clothes` one whose new class TEN_BAGS shows; it is taught
that beside the run. The pictures show paths as they are given. Needs the extras `app` and `test`,
and Chromium.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

RESULTS = Path(__file__).parent / "results" / "see"
WIDTH, HEIGHT = 1180, 860


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "flaxcls.main", *arguments]


def run(*arguments: str) -> None:
    """Runs a command, whatever its exit code: check_data's is 1 where it finds something."""
    subprocess.run(command(*arguments), check=False, stdout=subprocess.DEVNULL)


@contextmanager
def served(workdir: Path) -> Iterator[str]:
    """Serves the page of a run, and gives its address."""
    process = subprocess.Popen(
        command("--mode=app", f"--workdir={workdir}", "--port=0"),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if address := re.search(r"http://\S+", line):
                yield address[0]
                break
    finally:
        process.terminate()
        process.wait()


def page_of(browser: Browser, address: str) -> Page:
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    page.goto(address)
    return page


def save(page: Page, name: str) -> None:
    page.screenshot(path=RESULTS / f"{name}.png")
    page.close()


def several_photos(folder: Path) -> list[Path]:
    """One photo of each class, and a second of the first."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    firsts = [sorted(path.iterdir())[10] for path in classes]
    return [*firsts, sorted(classes[0].iterdir())[100]]


def explained(workdir: Path, photos: list[Path], folder: Path) -> Image.Image:
    """The overlays of `--explain`, side by side at one height."""
    inputs = [f"--input={photo}" for photo in photos]
    run("--mode=predict", f"--workdir={workdir}", *inputs, f"--output={folder}", "--explain")
    said = json.loads((folder / "predictions.json").read_text())["images"]
    pictures = [Image.open(folder / one["overlay"]) for one in said]
    scaled = [picture.resize((580, picture.height * 580 // picture.width)) for picture in pictures]
    rows = [scaled[i : i + 2] for i in range(0, len(scaled), 2)]
    heights = [max(picture.height for picture in row) for row in rows]
    sheet = Image.new("RGB", (1170, sum(heights) + 10 * (len(rows) - 1)), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for i, picture in enumerate(row):
            sheet.paste(picture, (590 * i, top))
        top += height + 10
    return sheet


def teach(page: Page, bags: Path) -> None:
    """Teaches a class on the page, as a person does."""
    files = sorted(path for path in bags.iterdir() if path.is_file())[:10]
    page.set_input_files("#example-files", [str(path) for path in files])
    page.fill("#name", "Bag")
    page.check("input[value=finetune]")
    expect(page.locator("#begin")).to_be_enabled(timeout=60_000)
    page.click("#begin")
    expect(page.locator("#learned")).to_be_visible(timeout=300_000)
    page.locator("#teach").scroll_into_view_if_needed()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog=Path(__file__).name,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in ("photos", "photos_path", "clothes", "bags"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    given = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    browser_path = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))))
    photos = several_photos(given.photos_path)
    with tempfile.TemporaryDirectory() as made, sync_playwright() as playwright:
        folder = Path(made)
        explained(given.photos, photos, folder / "explained").save(RESULTS / "explain.png")
        browser = playwright.chromium.launch(
            executable_path=browser_path,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        run(
            "--mode=check_data",
            "--config=vgg13:image_folder",
            f"--config.data.path={given.photos_path}",
            f"--output={folder}",
        )
        save(page_of(browser, f"file://{folder}/check_data.html"), "check_data")
        run("--mode=evaluate", f"--workdir={given.clothes}")
        report = given.clothes.absolute() / "report.html"
        save(page_of(browser, f"file://{report}"), "report")
        with served(given.photos) as address:
            page = page_of(browser, address)
            page.set_input_files("#photo", str(photos[1]))
            page.wait_for_selector("#results:not([aria-busy]) .answer", timeout=120_000)
            page.wait_for_timeout(1000)  # until it is no longer faded
            save(page, "app")
        with served(given.clothes) as address:
            page = page_of(browser, address)
            teach(page, given.bags)
            save(page, "teach")
        browser.close()


if __name__ == "__main__":
    main()
