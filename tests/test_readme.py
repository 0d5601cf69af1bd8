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
from adiff.runs.command_line import main
from adiff.data.demo_images import make_demo_data
from adiff.data.demo_sounds import make_demo_sounds


def blocks(repository, language):
    return re.findall(rf"```{language}\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch, urban_tree):
    "A folder with the data that the README speaks of; presets train for a moment only."
    data = make_demo_data(tmp_path / "data" / "mvtec_ad", categories=("brick",), train=8, good=2, per_defect=1)
    (data / "brick").rename(data / "bottle")
    shutil.copytree(data / "bottle/train/good", tmp_path / "photos/normal")
    shutil.copytree(data / "bottle/test/hole", tmp_path / "photos/new")
    (tmp_path / "photos/new/000.png").rename(tmp_path / "photos/new/IMG_1.png")
    pump = make_demo_sounds(tmp_path / "sounds_made", train=6, good=2, per_fault=1) / "pump"
    shutil.copytree(pump / "train/good", tmp_path / "sounds/normal")
    shutil.copytree(pump / "test/knock", tmp_path / "recordings/new")
    urban_tree(tmp_path / "data/urbansound8k")
    for method, size in (("deco", 32), ("adiff", 64)):
        monkeypatch.setitem(experiment.METHODS[method].presets, "cpu", dict(
            experiment.METHODS[method].presets["cpu"], length=6, image_size=size, wavelet_levels=2, batch_size=4, augmentations=[]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_block(repository, workplace):
    (block,) = blocks(repository, "python")
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["result"].maps.shape == (1, 256, 256)
    assert names["detector"].config.categories == ["normal"]


def adiff_commands(repository):
    lines = [line.split("#")[0] for block in blocks(repository, "sh") for line in block.replace("\\\n", "").splitlines()
             if line.startswith("adiff ")]
    return [shlex.split(line)[1:] for line in lines]


def run(*arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, (arguments, result.output)
    return result.output


def test_adiff_commands(repository, workplace):
    commands = [command for command in adiff_commands(repository) if command[0] not in ("reproduce", "table", "benchmark")]
    names = " ".join(command[0] for command in commands)
    assert names == "demo fit detect fit detect doctor export tensorboard fit evaluate fit"
    for command in commands:
        run(*command)
    (example,) = re.findall(r"^python (nbs/tutorials/.*)$", (repository / "README.md").read_text(), re.MULTILINE)
    subprocess.run([sys.executable, repository / example.split()[0], *example.split()[1:]], check=True)
    for made in ("detections/scores.csv", "runs/bottle/report.html", "heard/windows.csv", "runs/demo_audio/run_sounds/report.html",
                 "runs/svm/siren/metrics.json", "found.png", "runs/mine/tensorboard"):
        assert (workplace / made).exists(), made
    shutil.copytree("runs/bottle", "reproduced/demo/runs/bottle")  # test_reproduce.py carries matrices out
    (table,) = [command for command in adiff_commands(repository) if command[0] == "table"]
    assert "bottle" in run(*table)


def test_benchmark_commands_are_understood(repository):
    "What they do is left to test_benchmark.py."
    commands = [command[1:] for command in adiff_commands(repository) if command[0] == "benchmark"]
    assert len(commands) == 2
    for command in commands:
        assert main.commands["benchmark"].make_context("benchmark", list(command)).params["sizes"] == "XS,S"


def test_matrices_plan(repository, workplace):
    "Every reproduce command of the README plans its runs; where they would be carried out is left to test_reproduce.py."
    commands = [command for command in adiff_commands(repository) if command[0] == "reproduce"]
    assert len(commands) >= 9 and {"demo", "deco_mvtec", "ablation_deco", "ablation_adiff",
                                   "baselines"} <= {command[1] for command in commands}
    for command in commands:
        here = [part.replace("/datasets/", "data/") for part in command if part != "--dry-run"]
        if command[1] == "deco_mvtec":
            here += ["--only", "categories=bottle"]  # the only category in this place
        if command[1] in ("ablation_adiff", "baselines"):
            here = [part.replace("bottle,dog_bark,drilling,siren", "bottle,dog_bark,siren") for part in here]
            here += ["--only", "categories=dog_bark,siren"] if "group=sounds" in here else []
        assert "new" in run(*here, "--dry-run"), command


def test_named_files_and_parameters_exist(repository):
    text = (repository / "README.md").read_text()
    for name in re.findall(r"(?:data_scripts|nbs)/[\w/]+\.(?:py|ipynb)", text):
        assert (repository / name).exists(), name
    commands = re.findall(r"^papermill (.*)$", text, re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        known = papermill.inspect_notebook(repository / shlex.split(command)[0])
        assert set(re.findall(r"-p (\w+)", command)) <= set(known), command
    help_text = subprocess.run([sys.executable, repository / "data_scripts/mvtec_ad.py", "--help"], capture_output=True, text=True).stdout
    assert "--out" in help_text and "--archive" in help_text
    for target in re.findall(r"`make (\w+)`", text):
        assert re.search(rf"^{target}:", (repository / "Makefile").read_text(), re.MULTILINE)
