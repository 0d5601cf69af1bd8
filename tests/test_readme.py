"""What the README and the documentation pages show works: python blocks, commands, links; with a shorter training."""
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import papermill
import pytest
from click.testing import CliRunner

from adiff.data.demo_images import make_demo_data
from adiff.data.demo_sounds import make_demo_sounds
from adiff.methods.configuration import merged, parse_assignments
from adiff.methods.registry import METHODS, resolve_config
from adiff.runs.command_line import main

PAGES = ["README.md", *(f"nbs/docs/{name}.md" for name in (
    "own_files", "trouble", "deployment", "reproduce", "results", "sounds", "ablations", "speed", "gpu", "app",
    "glossary"))]
ELSEWHERE = {"reproduce", "table", "benchmark", "convert-official", "app"}  # carried out by tests of their own


def blocks(repository, language):
    return [block for page in PAGES
            for block in re.findall(rf"```{language}\n(.*?)```", (repository / page).read_text(), re.DOTALL)]


def adiff_commands(repository, *names):
    "The arguments of every command `adiff ...` of the pages, those of the commands `names` only, if given."
    lines = "".join(blocks(repository, "sh")).replace("\\\n", "").splitlines()
    commands = [shlex.split(line.split("#")[0])[1:] for line in lines if line.startswith("adiff ")]
    return [command for command in commands if not names or command[0] in names]


@pytest.fixture
def workplace(tmp_path, monkeypatch, urban_tree):
    "A folder with the data that the pages speak of; presets train for a moment only."
    data = make_demo_data(tmp_path / "data" / "mvtec_ad", categories=("brick",), train=8, good=2, per_defect=1)
    (data / "brick").rename(data / "bottle")
    shutil.copytree(data / "bottle/train/good", tmp_path / "photos/normal")
    shutil.copytree(data / "bottle/test/hole", tmp_path / "photos/new")
    (tmp_path / "photos/new/000.png").rename(tmp_path / "photos/new/IMG_1.png")
    shutil.copytree(data / "bottle/test/good", tmp_path / "photos/more_normal")
    pump = make_demo_sounds(tmp_path / "sounds_made", train=6, good=2, per_fault=1) / "pump"
    shutil.copytree(pump / "train/good", tmp_path / "sounds/normal")
    shutil.copytree(pump / "test/knock", tmp_path / "recordings/new")
    urban_tree(tmp_path / "data/urbansound8k")
    for method, size in (("deco", 32), ("adiff", 64)):
        presets = METHODS[method].presets
        short = {"codec": {"levels": 2}, "data": {"image_size": size},
                 "training": {"length": 6, "batch_size": 4, "augmentations": []}}
        monkeypatch.setitem(presets, "cpu", merged(presets["cpu"], short))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, (arguments, result.output)
    return result.output


def test_readme_is_short(repository):
    assert len((repository / "README.md").read_bytes()) <= 6000


@pytest.mark.slow
def test_python_blocks(repository, workplace):
    block, *others = dict.fromkeys(blocks(repository, "python"))
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    for other in others:
        exec(compile(other, "nbs/docs", "exec"), {})
    assert names["result"].maps.shape == (1, 256, 256)
    assert names["detector"].config.categories == ["normal"]


@pytest.mark.slow
def test_adiff_commands(repository, workplace):
    commands = [command for command in adiff_commands(repository)
                if command[0] not in ELSEWHERE and "-o" not in command]
    assert " ".join(command[0] for command in commands) == ("fit detect fit detect fit fit calibrate detect detect fit "
                                                            "evaluate fit doctor export evaluate demo fit")
    for command in commands:
        run(*command)
    text = (repository / "nbs/docs/deployment.md").read_text()
    program, *arguments = shlex.split(re.search(r"^python nbs/tutorials/(.*)$", text, re.MULTILINE)[1])
    subprocess.run([sys.executable, repository / "nbs/tutorials" / program, *arguments], check=True)
    for made in ("detections/scores.csv", "runs/bottle/report.html", "heard/windows.csv",
                 "runs/demo_audio/run_sounds/report.html", "runs/svm/siren/metrics.json", "found.png"):
        assert (workplace / made).exists(), made
    shutil.copytree("runs/bottle", "reproduced/demo/runs/bottle")  # test_reproduce.py carries matrices out
    (table,) = adiff_commands(repository, "table")
    assert "bottle" in run(*table)


@pytest.mark.slow
def test_overrides_of_the_pages_are_known(repository):
    "Every `-o` of the pages is a change that the configuration of its method, or of DeCo-Diff, takes."
    for command in adiff_commands(repository, "fit"):
        changes = [value for key, value in zip(command, command[1:]) if key == "-o"]
        kind = "sound" if "sound" in command[2] else "image"
        config = resolve_config(command[1], overrides=parse_assignments(changes), kind=kind)
        assert "codec.kind=taef2" not in changes or (config.codec["kind"], config.training.length) == ("taef2", 800)
    text = "\n".join((repository / page).read_text() for page in PAGES)
    paths = re.findall(r"-o ([a-z_]+\.[a-z_]+=[\w.]+)", text)
    assert len(paths) >= 4
    for path in paths:
        if not path.startswith(("discrepancy.estimator", "discrepancy.statistics")):  # of one-class-svm, above
            assert resolve_config("deco", overrides=parse_assignments([path]))


def test_commands_that_others_carry_out_are_understood(repository):
    commands = adiff_commands(repository, "benchmark")
    assert len(commands) == 2
    for command in commands:
        understood = main.commands["benchmark"].make_context("benchmark", list(command[1:]))
        assert understood.params["sizes"] == "XS,S"
    (command,) = adiff_commands(repository, "convert-official")
    assert command[1:] == ["CHECKPOINT.pt", "models/official"]


@pytest.mark.slow
def test_matrices_plan(repository, workplace):
    "Every reproduce command plans its runs; where they would be carried out is left to test_reproduce.py."
    commands = adiff_commands(repository, "reproduce")
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
    text = "\n".join((repository / page).read_text() for page in PAGES).replace("\\\n", "")
    for name in re.findall(r"(?:data_scripts|nbs)/[\w/]+\.(?:py|ipynb)", text):
        assert (repository / name).exists(), name
    commands = re.findall(r"^papermill (.*)$", text, re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        known = papermill.inspect_notebook(repository / shlex.split(command)[0])
        assert set(re.findall(r"-p (\w+)", command)) <= set(known), command
    script = [sys.executable, repository / "data_scripts/mvtec_ad.py", "--help"]
    help_text = subprocess.run(script, capture_output=True, text=True).stdout
    assert "--out" in help_text and "--archive" in help_text


def test_make_targets_exist(repository):
    "Those that the pages name, and those that continuous integration calls."
    text = "\n".join((repository / page).read_text() for page in (*PAGES, "CONTRIBUTING.md"))
    text += "\n" + (repository / ".github/workflows/test.yml").read_text().replace("      - run: ", "")
    targets = {a or b for a, b in re.findall(r"`make (\w+)`|^make (\w+) *(?:#|$)", text, re.MULTILINE)}
    assert {"demo", "test", "docs"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", (repository / "Makefile").read_text(), re.MULTILINE), target


def test_no_link_to_a_file_is_broken(repository):
    pages = [page for folder in (".", "nbs", "nbs/docs", "nbs/cards") for page in (repository / folder).glob("*.md")]
    assert len(pages) > 15
    for page in pages:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)#\s]+)", prose):
            if not re.match(r"https?:|mailto:", target):
                assert (page.parent / Path(target)).exists(), (page.name, target)
