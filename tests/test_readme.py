"""What the README shows works: its python block and its adiff commands run as they stand, with a shorter training."""
import re
import shlex
import shutil
import subprocess
import sys

import papermill
import pytest
from click.testing import CliRunner

from adiff import experiment
from adiff.cli import main
from adiff.demo_data import make_demo_data


def blocks(repository, language):
    return re.findall(rf"```{language}\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    "A folder with the data that the README speaks of; presets train for a moment only."
    data = make_demo_data(tmp_path / "data" / "mvtec_ad", categories=("brick",), train=8, good=2, per_defect=1)
    (data / "brick").rename(data / "bottle")
    shutil.copytree(data / "bottle/train/good", tmp_path / "photos/normal")
    shutil.copytree(data / "bottle/test/hole", tmp_path / "photos/new")
    (tmp_path / "photos/new/000.png").rename(tmp_path / "photos/new/IMG_1.png")
    monkeypatch.setitem(experiment.METHODS["deco"].presets, "cpu", dict(
        experiment.METHODS["deco"].presets["cpu"], length=6, image_size=32, wavelet_levels=2, batch_size=4, augmentations=[]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_block(repository, workplace):
    (block,) = blocks(repository, "python")
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["result"].maps.shape == (1, 256, 256)
    assert names["detector"].config.categories == ["normal"]


def test_adiff_commands(repository, workplace):
    commands = [line.split("#")[0] for block in blocks(repository, "sh") for line in block.splitlines() if line.startswith("adiff ")]
    assert [shlex.split(command)[1] for command in commands] == ["fit", "detect", "fit", "evaluate"]
    for command in commands:
        result = CliRunner().invoke(main, shlex.split(command)[1:])
        assert result.exit_code == 0, (command, result.output)
    assert (workplace / "detections" / "scores.csv").exists() and (workplace / "runs/bottle/report.html").exists()


def test_named_files_and_parameters_exist(repository):
    text = (repository / "README.md").read_text()
    for name in re.findall(r"(?:data_scripts|nbs)/[\w/]+\.(?:py|ipynb)", text):
        assert (repository / name).exists(), name
    (command,) = re.findall(r"^papermill (.*)$", text, re.MULTILINE)
    known = papermill.inspect_notebook(repository / shlex.split(command)[0])
    assert set(re.findall(r"-p (\w+)", command)) <= set(known)
    help_text = subprocess.run([sys.executable, repository / "data_scripts/mvtec_ad.py", "--help"], capture_output=True, text=True).stdout
    assert "--out" in help_text and "--archive" in help_text
    for target in ("demo", "test", "export"):
        assert re.search(rf"^{target}:", (repository / "Makefile").read_text(), re.MULTILINE)
