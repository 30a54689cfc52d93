"""The report of an evaluation: its numbers are scikit-learn's, and a browser shows it alone."""

import csv
import html.parser
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import sklearn.calibration
import sklearn.metrics
from command_line import SMALL, compiled_once, run
from small_experiments import lenet

from flaxcls import config, runlog
from flaxcls.analysis import measures
from flaxcls.analysis.report_page import report_path, write_report
from flaxcls.data.dataset import Dataset, Split
from flaxcls.errors import InputError
from flaxcls.evaluate import softmax, write_predictions

CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
HALVES = ("--config.data.parents=('[0-4]=low', '[5-9]=high')", "--config.loss.name=hierarchical")
HOSTILE = (
    "<b>bold",
    "<img src=x onerror=alert(1)>",
    "\"'&amp;",
    "</script><script>alert(2)",
    "漢字 é ☃",
)


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """A run of two epochs, evaluated on its test split; not to be changed."""
    folder = tmp_path_factory.mktemp("report") / "run"
    assert run(*SMALL, f"--workdir={folder}").code == 0
    done = run("--mode=evaluate", f"--workdir={folder}")
    assert done.code == 0, done.error
    assert done.error == ""
    assert f"the report, to be opened in a browser, is {folder}/report.html" in done.output
    return folder


def report_of(folder, name="report.json"):
    return json.loads((folder / name).read_text())


class Text(html.parser.HTMLParser):
    """The words that a page holds, without scripts and style."""

    def __init__(self, page: str):
        super().__init__()
        self.words: set[str] = set()
        self._skipped = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self._skipped = tag in ("script", "style")

    def handle_data(self, data):
        if not self._skipped:
            self.words |= set(data.lower().split())


class Tables(html.parser.HTMLParser):
    """The text of the cells of every table, by the id of its section."""

    def __init__(self, page: str):
        super().__init__()
        self.found: dict[str, list[list[str]]] = {}
        self._section, self._cell = "", None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "section":
            self._section = dict(attributes)["id"]
        elif tag == "tr":
            self.found.setdefault(self._section, []).append([])
        elif tag in ("td", "th"):
            self._cell = ""

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.found[self._section][-1].append(self._cell.strip())
            self._cell = None


# Numbers.


def test_the_numbers_are_those_of_scikit_learn_on_the_saved_predictions(evaluated):
    report = report_of(evaluated)
    arrays = np.load(evaluated / "predictions" / "test.npz")
    truth, logits = arrays["label"], arrays["logits"]
    guess, labels = logits.argmax(axis=1), np.arange(10)
    assert len(set(guess)) > 3, "too easy"
    assert 0 < (guess == truth).mean() < 1
    values = {name: metric["value"] for name, metric in report["metrics"].items()}
    assert values["accuracy"] == sklearn.metrics.accuracy_score(truth, guess)
    for average in ("macro", "weighted"):
        expected = sklearn.metrics.precision_recall_fscore_support(
            truth, guess, average=average, zero_division=0
        )
        for name, value in zip(("precision", "recall", "f1"), expected[:3], strict=True):
            assert values[f"{name}_{average}"] == value
            assert report["averages"][f"{average} avg"][name] == value
    loss = sklearn.metrics.log_loss(truth, softmax(logits), labels=labels)
    assert values["log_loss"] == pytest.approx(loss, rel=1e-12)
    for k in range(1, 10):
        top = sklearn.metrics.top_k_accuracy_score(truth, logits, k=k, labels=labels)
        assert report["top_k"][str(k)] == top
    assert values["top_5"] == report["top_k"]["5"]
    matrix = sklearn.metrics.confusion_matrix(truth, guess, labels=labels)
    assert report["confusion_matrix"] == matrix.tolist()
    scores = sklearn.metrics.precision_recall_fscore_support(
        truth, guess, labels=labels, zero_division=0
    )
    for name, expected in zip(("precision", "recall", "f1", "support"), scores, strict=True):
        assert [row[name] for row in report["classes"]] == expected.tolist()
    for row, hits in zip(report["classes"], np.diag(matrix), strict=True):
        assert row["accuracy"] == hits / row["support"]
    wrong = matrix - np.diag(np.diag(matrix))
    assert sum(pair["count"] for pair in report["confused_pairs"]) == wrong.sum()
    assert report["confused_pairs"][0]["count"] == wrong.max()


def test_the_page_shows_the_classification_report_of_scikit_learn(evaluated):
    arrays = np.load(evaluated / "predictions" / "test.npz")
    expected = sklearn.metrics.classification_report(
        arrays["label"], arrays["logits"].argmax(1), digits=4, zero_division=0
    )
    lines = [line.split() for line in expected.splitlines() if line]
    shown = Tables((evaluated / "report.html").read_text()).found
    rows = [[" ".join(cell.split()) for cell in row if cell] for row in shown["report"][1:]]
    assert [" ".join(row).split() for row in rows] == lines[1:]
    matrix = sklearn.metrics.confusion_matrix(arrays["label"], arrays["logits"].argmax(1))
    cells = [row[1:] for row in shown["confusion"][1:11]]
    assert [[int(cell.replace("·", "0")) for cell in row] for row in cells] == matrix.tolist()
    by_row = 100 * sklearn.metrics.confusion_matrix(
        arrays["label"], arrays["logits"].argmax(1), normalize="true"
    )
    shares = [row[1:] for row in shown["confusion"][12:]]
    assert [[float(cell.replace("·", "0")) for cell in row] for row in shares] == [
        [float(f"{value:.1f}") for value in row] for row in by_row
    ]
    accuracies = [float(row[1].removesuffix(" %")) for row in shown["classes"][1:]]
    assert accuracies == sorted(accuracies)
    np.testing.assert_allclose(accuracies, sorted(np.diag(by_row)), atol=0.00501)


def test_calibration_is_that_of_scikit_learn_and_scipy(evaluated):
    found = report_of(evaluated)["calibration"]
    arrays = {
        split: np.load(evaluated / "predictions" / f"{split}.npz") for split in ("val", "test")
    }
    logits, truth = arrays["test"]["logits"].astype(float), arrays["test"]["label"]
    val, val_truth = arrays["val"]["logits"].astype(float), arrays["val"]["label"]

    def loss(log_temperature, z=val, y=val_truth):
        return sklearn.metrics.log_loss(y, softmax(z / np.exp(log_temperature)), labels=range(10))

    best = scipy.optimize.minimize_scalar(loss, bounds=(-5, 5), options={"xatol": 1e-9})
    assert found["temperature"] == pytest.approx(np.exp(best.x), rel=1e-4)
    assert found["fitted_on"] == "val"
    for key, temperature in (("raw", 1.0), ("scaled", found["temperature"])):
        probabilities = softmax(logits / temperature)
        right = probabilities.argmax(axis=1) == truth
        confidence = probabilities.max(axis=1)
        accuracy, mean = sklearn.calibration.calibration_curve(right, confidence, n_bins=15)
        filled = [one for one in found[key]["bins"] if one["count"]]
        np.testing.assert_allclose([one["accuracy"] for one in filled], accuracy, rtol=1e-12)
        np.testing.assert_allclose([one["confidence"] for one in filled], mean, rtol=1e-12)
        counts = np.array([one["count"] for one in filled])
        assert counts.sum() == len(truth)
        ece = (counts * np.abs(accuracy - mean)).sum() / len(truth)
        assert found[key]["ece"] == pytest.approx(ece, rel=1e-12)
        assert found[key]["log_loss"] == pytest.approx(loss(np.log(temperature), logits, truth))


def test_intervals_are_those_of_wilson_and_of_a_plain_bootstrap(evaluated):
    arrays = np.load(evaluated / "predictions" / "test.npz")
    truth, guess = arrays["label"], arrays["logits"].argmax(axis=1)
    found = report_of(evaluated)["metrics"]
    exact = scipy.stats.binomtest(int((truth == guess).sum()), len(truth)).proportion_ci(
        method="wilson"
    )
    assert (found["accuracy"]["low"], found["accuracy"]["high"]) == pytest.approx(exact)
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(1000):
        i = rng.integers(0, len(truth), len(truth))
        drawn.append(sklearn.metrics.f1_score(truth[i], guess[i], average="macro", zero_division=0))
    value = found["f1_macro"]["value"]
    low, high = value + np.quantile(drawn, [0.025, 0.975]) - np.mean(drawn)
    assert found["f1_macro"]["low"] == pytest.approx(low, abs=0.02)
    assert found["f1_macro"]["high"] == pytest.approx(high, abs=0.02)
    assert found["log_loss"]["low"] < found["log_loss"]["value"] < found["log_loss"]["high"]


@pytest.mark.parametrize(("hits", "count"), [(0, 7), (7, 7), (1, 2), (9_999, 10_000)])
def test_wilson_is_that_of_scipy(hits, count):
    exact = scipy.stats.binomtest(hits, count).proportion_ci(method="wilson")
    assert measures.wilson(hits, count) == pytest.approx(tuple(exact), abs=1e-12)


def test_rank_correlation_is_that_of_scipy():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, 50).tolist(), rng.integers(0, 9, 50).tolist()
    found = measures.rank_correlation(x, y)
    assert found.value == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert -1 < found.low < found.value < found.high < 1
    assert measures.rank_correlation([1, 2, 3, 4], [5, 6, 7, 8]).value == 1
    assert measures.rank_correlation([1, 1, 1, 1], [5, 6, 7, 8]) is None


def test_a_temperature_is_found_wherever_there_is_one():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, 20_000)
    logits = rng.normal(size=(20_000, 5)) + 1.5 * np.eye(5)[truth]
    plain = measures.fit_temperature(logits, truth)
    assert plain == pytest.approx(1 / 1.5, rel=0.05)
    for scale in (1e-3, 40.0):
        assert measures.fit_temperature(scale * logits, truth) == pytest.approx(scale * plain)
    assert measures.fit_temperature(5 * np.eye(5)[truth], truth) is None  # all right
    assert measures.fit_temperature(-np.eye(5)[truth], truth) is None  # worse than guessing
    assert measures.fit_temperature(np.zeros((3, 5)), truth[:3]) is None


# Files.


def test_a_report_is_made_again_from_files_alone(evaluated, tmp_path):
    copy = tmp_path / "run"
    ignored = shutil.ignore_patterns("checkpoints", "*.safetensors", "exemplars.npz", "report.*")
    shutil.copytree(evaluated, copy, ignore=ignored)
    assert write_report(copy, "test") == copy / "report.html"
    for name in ("report.html", "report.json"):
        assert (copy / name).read_bytes() == (evaluated / name).read_bytes()


def test_other_splits_and_steps_have_reports_of_their_own(evaluated, tmp_path):
    copy = shutil.copytree(evaluated, tmp_path / "run")
    before = (copy / "report.html").read_bytes()
    done = run("--mode=evaluate", f"--workdir={copy}", "--config.eval.split=val")
    assert done.code == 0, done.error
    assert f"{copy}/predictions/val-report.html" in done.output
    assert report_of(copy, "predictions/val-report.json")["examples"] == 20
    assert "these same examples" in (copy / "predictions" / "val-report.html").read_text()
    flags = ("--config.eval.step=8", "--config.eval.split=val")
    assert run("--mode=evaluate", f"--workdir={copy}", *flags).code == 0
    assert report_of(copy, "predictions/val-step8-report.json")["step"] == 8
    assert (copy / "report.html").read_bytes() == before
    # Of a run without a test split, the validation split is what it is judged by.
    for path in (copy / "predictions").glob("test*"):
        path.unlink()
    assert report_path(copy, "val") == copy / "report.html"


def test_predictions_of_another_checkpoint_give_no_temperature(evaluated, tmp_path):
    copy = shutil.copytree(evaluated, tmp_path / "run")
    log = copy / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        line["accuracy"] += 0.01
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "of another checkpoint than step" in write_report(copy, "test").read_text()
    assert report_of(copy)["calibration"]["temperature"] is None
    (copy / "predictions" / "val.npz").unlink()
    assert "no predictions of the validation split" in write_report(copy, "test").read_text()


def test_what_is_missing_or_damaged_is_said(evaluated, tmp_path):
    copy = shutil.copytree(evaluated, tmp_path / "run")
    with pytest.raises(InputError, match=r"'.*all.npz' is not there; evaluate the run first"):
        write_report(copy, "all")
    (copy / "environment.json").write_text("{")
    (copy / "predictions" / "test-images.npz").unlink()
    (copy / "predictions" / "test.json").unlink()
    (copy / "predictions" / "test.csv").unlink()
    page = write_report(copy, "test").read_text()
    assert "environment.json" in page
    assert "images and heat maps are saved by --mode=evaluate" in page
    (copy / "predictions" / "test.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match="cannot be read"):
        write_report(copy, "test")


def test_images_and_heat_maps_are_saved_of_what_is_shown(evaluated):
    report = report_of(evaluated)
    pictures = np.load(evaluated / "predictions" / "test-images.npz")
    shown = [one["index"] for one in report["mistakes"] + report["uncertain_hits"]]
    assert sorted(shown) == pictures["heat_index"].tolist()
    assert set(shown) <= set(pictures["image_index"].tolist())
    # As they are stored: the model's own step enlarges the digits.
    assert pictures["image"].shape == (len(pictures["image_index"]), 8, 8, 1)
    assert pictures["heat"].shape == (len(shown), 28, 28)
    assert np.median(pictures["heat"].max(axis=(1, 2))) == 255
    assert str(pictures["method"]) in ("cam", "grad_cam", "grad_cam_pp")
    probabilities = [one["probability"] for one in report["mistakes"]]
    assert probabilities == sorted(probabilities, reverse=True)
    with open(evaluated / "predictions" / "test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for one in report["mistakes"] + report["uncertain_hits"]:
        row = rows[one["index"]]
        assert (one["file"], one["truth"], one["prediction"]) == (
            row["file"],
            row["truth"],
            row["prediction"],
        )
        assert f"{one['probability']:.6f}" == row["probability"]
    assert all(one["truth"] != one["prediction"] for one in report["mistakes"])
    assert all(one["truth"] == one["prediction"] for one in report["uncertain_hits"])
    page = (evaluated / "report.html").read_text()
    assert page.count('alt="heat map of') == len(shown)


def test_a_model_that_cannot_be_explained_has_a_report_all_the_same(
    evaluated, tmp_path, monkeypatch
):
    def refuse(*args, **options):
        raise InputError("there is too little memory; there are no heat maps")

    monkeypatch.setattr("flaxcls.analysis.pictures.Explainer", refuse)
    copy = shutil.copytree(evaluated, tmp_path / "run")
    done = run("--mode=evaluate", f"--workdir={copy}")
    assert done.code == 0, done.error
    page = (copy / "report.html").read_text()
    assert "No heat maps: there is too little memory" in page
    assert 'alt="heat map of' not in page
    assert page.count("<img") > 10


def test_a_hierarchical_run_in_bfloat16_has_tables_of_parents(tmp_path):
    folder = tmp_path / "run"
    model = ("--config.model.name=hierarchical", "--config.model.trunk=lenet", *HALVES)
    assert run(*SMALL, *model, "--config.precision=bfloat16", f"--workdir={folder}").code == 0
    done = run("--mode=evaluate", f"--workdir={folder}")
    assert done.code == 0, done.error
    report = report_of(folder)
    arrays = np.load(folder / "predictions" / "test.npz")
    truth, guess = arrays["parent_label"], arrays["parent_logits"].argmax(axis=1)
    assert report["metrics"]["parent_accuracy"]["value"] == (truth == guess).mean()
    hierarchy = report["hierarchy"]
    assert hierarchy["confusion_matrix"] == sklearn.metrics.confusion_matrix(truth, guess).tolist()
    scores = sklearn.metrics.precision_recall_fscore_support(
        truth, guess, labels=[0, 1], zero_division=0
    )
    for name, expected in zip(("precision", "recall", "f1", "support"), scores, strict=True):
        assert [row[name] for row in hierarchy["parents"]] == expected.tolist()
    children, labels = arrays["logits"].argmax(axis=1), arrays["label"]
    assert [row["errors"] for row in hierarchy["parents"]] == [
        int(((truth == p) & (children != labels)).sum()) for p in (0, 1)
    ]
    within = sum(row["errors_within"] for row in hierarchy["parents"])
    share = report["metrics"]["errors_within_parent"]["value"]
    assert share == pytest.approx(within / (children != labels).sum())
    shown = Tables((folder / "report.html").read_text()).found["parents"]
    assert [row[0] for row in shown[1:3]] == ["high", "low"]


# Hand-made predictions.


def make_run(folder, labels, logits, names, *, counts=None, val=None, files=None) -> Path:
    """A run folder that holds predictions and what a report needs besides."""
    labels, count = np.asarray(labels, np.int32), len(names)
    folder.mkdir(parents=True)
    config.save(lenet(), folder / "config.json")
    runlog.write_json(
        folder / "preprocess.json",
        {
            "format_version": 1, "class_names": names, "class_counts": counts or [10] * count,
            "mean": [0.5], "std": [0.5], "placement": "device", "fingerprint": "0",
        },
    )  # fmt: skip
    dataset = Dataset("made", tuple(names), {})
    for name, (y, z) in {"test": (labels, logits), **({"val": val} if val else {})}.items():
        images = np.zeros((len(y), 2, 2, 1), np.uint8)
        split = Split(
            images, np.asarray(y, np.int32), names=files or tuple(map(str, range(len(y))))
        )
        write_predictions(folder / "predictions", name, split, np.asarray(z, np.float32), dataset)
    return folder


def random_logits(count, classes, seed=0, strength=2.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes)) + strength * np.eye(classes)[labels]
    return labels, logits.astype(np.float32)


def _cases():
    labels, logits = random_logits(60, 4)
    right = 9 * np.eye(4)[labels]
    nan = np.where(np.arange(60)[:, None] % 3 == 0, np.nan, logits)
    names = list("abcd")
    return {
        "no mistakes": (labels, right, names, "every example is classified correctly"),
        "all wrong": (labels, -right, names, "0.00 %"),
        "a class is absent": (labels % 3, logits, names, "1 of 4 classes have no examples here"),
        "one example": ([1], logits[:1], names, "1 examples"),
        "two classes": (
            labels % 2,
            logits[:, :2],
            ["a", "b"],
            "Every class has 10 training images",
        ),
        "some not finite": (labels, nan, names, "of 60 examples are not finite"),
        "none finite": (labels, np.full((60, 4), np.nan), names, "No example has a finite"),
        "equal logits": (labels, np.zeros((60, 4)), names, "a"),
        "huge logits": (labels, 1e30 * logits, names, "a"),
    }


@pytest.mark.parametrize("case", _cases())
def test_no_predictions_break_a_report(case, tmp_path):
    labels, logits, names, said = _cases()[case]
    folder = make_run(tmp_path / "run", labels, logits, names, val=(labels, logits))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = write_report(folder, "test").read_text()
    assert said in page
    report = report_of(folder)
    accuracy = float(np.mean(np.argmax(logits, axis=1) == labels))
    assert report["metrics"]["accuracy"]["value"] == accuracy
    assert "nan" not in Text(page).words
    assert "inf" not in Text(page).words


def test_predictions_without_an_example_are_refused(tmp_path):
    folder = make_run(tmp_path / "run", [], np.zeros((0, 2)), ["a", "b"])
    with pytest.raises(InputError, match="no example"):
        write_report(folder, "test")


@pytest.mark.parametrize(
    ("slope", "said"),
    [(1, "Imbalance hurts"), (-1, "does not hurt"), (0, "No effect of imbalance")],
)
def test_whether_imbalance_hurts_is_said(slope, said, tmp_path):
    classes, rng = 20, np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), 50)
    rate = 0.5 + slope * (labels - 10) / 25
    right = rng.random(len(labels)) < rate
    logits = np.eye(classes)[np.where(right, labels, (labels + 1) % classes)]
    counts = [10 + 10 * i for i in range(classes)] if slope else rng.permutation(classes).tolist()
    folder = make_run(
        tmp_path / "run", labels, logits, [f"c{i}" for i in range(classes)], counts=counts
    )
    write_report(folder, "test")
    found = report_of(folder)["imbalance"]
    assert said in found["sentence"]
    accuracy = [right[labels == i].mean() for i in range(classes)]
    expected = scipy.stats.spearmanr(counts, accuracy).statistic
    assert found["correlation" if "correlation" in found else "value"] == pytest.approx(expected)


# In a browser.


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as library:
        flags = ["--no-sandbox", "--disable-gpu"]
        chromium = library.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


class Visit:
    """A page in a browser, with what it complained of and asked for."""

    def __init__(self, browser, path, width, scheme="light"):
        self.said, self.asked = [], []
        self.page = browser.new_page(
            viewport={"width": width, "height": 1000}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def check(self, path):
        """Nothing went wrong, nothing was asked for, and nothing is wider than the window."""
        assert self.said == []
        outside = [url for url in self.asked if not url.startswith("data:")]
        assert outside == [path.as_uri()]
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert self.page.evaluate(wide) == 0
        broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
        assert self.page.evaluate(broken) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_a_browser_shows_it_without_errors_and_requests(width, scheme, evaluated, browser):
    path = evaluated / "report.html"
    visit = Visit(browser, path, width, scheme)
    visit.check(path)
    page = visit.page
    assert page.locator("h1").inner_text() == "lenet"
    accuracy = report_of(evaluated)["metrics"]["accuracy"]["value"]
    assert page.locator(".card .value").first.inner_text() == f"{100 * accuracy:.2f} %"
    assert page.locator("#mistakes figure.example img").count() >= 2
    counts, shares = page.locator("#confusion .counts"), page.locator("#confusion .shares")
    assert (counts.is_visible(), shares.is_visible()) == (True, False)
    page.get_by_text("% of the true class").click()
    assert (counts.is_visible(), shares.is_visible()) == (False, True)
    page.close()


@pytest.mark.parametrize("width", [1280, 375])
def test_two_hundred_classes_of_any_name_are_legible(width, browser, tmp_path):
    names = [*HOSTILE, "l" * 200, *(f"class {i}" for i in range(194))]
    labels, logits = random_logits(3000, 200, strength=3.0)
    folder = make_run(
        tmp_path / "run", labels, logits, names, files=tuple(f"{n}/<i>.png" for n in range(3000)),
        counts=[5 + i for i in range(200)], val=(labels, logits),
    )  # fmt: skip
    path = write_report(folder, "test")
    assert path.stat().st_size < 5_000_000
    visit = Visit(browser, path, width)
    page = visit.page
    shown = page.locator("#classes tbody td:first-child").all_inner_texts()
    assert sorted(shown) == sorted(names)
    matrix = np.array(report_of(folder)["confusion_matrix"])
    holder, field = page.locator("#m-cells"), page.locator("#m-cells .field")
    for zoomed in (False, True):
        if zoomed:
            page.get_by_text("enlarge, with the name of every class").click()
            label = page.locator("#m-cells .down span").nth(100)
            assert label.bounding_box()["height"] >= 12
            assert label.inner_text() == names[100]
        holder.evaluate("holder => {holder.scrollTo(0, 0); holder.scrollIntoView({block: 'end'})}")
        box = field.bounding_box()
        cell, border = field.evaluate("field => [field.clientWidth / 200, field.clientLeft]")
        for row, column in ((1, 1), (0, 3), (5, 5)):
            x = box["x"] + border + (column + 0.5) * cell
            page.mouse.click(x, box["y"] + border + (row + 0.5) * cell)
            row_name, column_name = (
                n if len(n) <= 50 else n[:49] + "…" for n in (names[row], names[column])
            )
            said = f"{row_name} → {column_name}: {matrix[row, column]} of "
            page.wait_for_function(
                "said => document.querySelector('#m-readout').textContent.startsWith(said)",
                arg=said,
                timeout=5000,
            )
    visit.check(path)
    page.close()
