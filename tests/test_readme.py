"""What the README shows works as it stands."""

import json
import re
from pathlib import Path

import pytest
from command_line import run

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_model_of_the_readme_trains_with_its_option(tmp_path):
    """In a config file of one's own: it needs no place in the package, nor its option a key."""
    (model,) = (block for block in blocks("python") if "class TinyCNN" in block)
    lines = [line for line in model.splitlines() if line.strip() and " import " not in line]
    assert len(lines) <= 13
    lines = (
        "from flaxcls import config",
        "def get_config():",
        "    c = config.for_dataset('digits')",
        "    c.model.name = 'tiny_cnn'",
        "    c.train.epochs = 1",
        "    c.log.plots = False",
        "    return c",
    )
    (tmp_path / "mine.py").write_text(model + "\n".join(lines) + "\n")
    mine = ("--config=mine.py", "--workdir=run", "--config.model.init=kaiming_uniform")
    done = run(*mine, "--config.model.options=width=32", "--config.precision=bfloat16")
    assert done.code == 0, done.error
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["params"] == 32 * 9 + 32 + 32 * 10 + 10

    unknown = run(*mine, "--config.model.options=widht=32").sentence
    assert unknown == "model.widht: tiny_cnn has no such option; it takes width, init"
    assert "'32px' is not possible; give a whole number of at least 1" in (
        run(*mine, "--config.model.options=width=32px").sentence
    )
    small = run("--config=mine.py", "--workdir=small", "--config.data.image_size=4").sentence
    assert "images of 4x4 pixels are too small; the smallest it takes is 8x8" in small


def test_every_config_that_the_readme_names_is_there():
    configs = Path(__file__).parents[1] / "configs"
    named = set(re.findall(r"--config=(?:configs/)?([\w/]+)", README)) - {"mine", "CONFIG"}
    assert len(named) >= 2
    for name in named:
        assert (configs / f"{name}.py").is_file(), name


def test_every_file_that_the_readme_links_is_there():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / link).is_file(), link
