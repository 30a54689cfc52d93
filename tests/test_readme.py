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
    """In a config file of one's own, which needs no place in the package."""
    (model,) = (block for block in blocks("python") if "class TinyCNN" in block)
    assert len([line for line in model.splitlines() if line.strip()]) < 16
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
    done = run("--config=mine.py", "--workdir=run", "--config.model.dropout=0.5")
    assert done.code == 0, done.error
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["params"] == 16 * 9 + 16 + 16 * 10 + 10


def test_every_config_that_the_readme_names_is_there():
    configs = Path(__file__).parents[1] / "configs"
    named = set(re.findall(r"--config=(?:configs/)?([\w/]+)", README)) - {"mine", "CONFIG"}
    assert len(named) >= 2
    for name in named:
        assert (configs / f"{name}.py").is_file(), name


def test_every_file_that_the_readme_links_is_there():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / link).is_file(), link
