"""The kit holds together: two settings files agree, export leaves no diff, the top level is what it should be."""
import configparser
import filecmp
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

import adiff


def settings(repository):
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(repository / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def test_settings_ini_and_pyproject_agree(repository):
    ini = settings(repository)
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    assert project["project"]["name"] == ini["lib_name"]
    assert project["project"]["requires-python"] == f">={ini['min_python']}"
    for key, value in project["tool"]["nbdev"].items():
        as_text = " ".join(value) if isinstance(value, list) else str(value)
        assert ini[key] == as_text, key
    assert adiff.__version__ == ini["version"]


def test_every_requirement_is_explained(repository):
    text, ini = (repository / "settings.ini").read_text(), settings(repository)
    for name in " ".join(value for key, value in ini.items() if key.endswith("requirements")).split():
        assert re.search(rf"^#   .*\b{re.escape(name)}\b.* {{2,}}\w", text, re.MULTILINE), f"say in one line why {name} is needed"


def test_export_leaves_no_diff(repository, tmp_path):
    for name in ("nbs", "adiff"):
        shutil.copytree(repository / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml", "setup.py", "README.md"):
        shutil.copy(repository / name, tmp_path)
    subprocess.run([Path(sys.executable).with_name("nbdev-export")], cwd=tmp_path, check=True)
    names = sorted(path.name for path in (repository / "adiff").glob("*.py"))
    assert names == sorted(path.name for path in (tmp_path / "adiff").glob("*.py"))
    assert filecmp.cmpfiles(repository / "adiff", tmp_path / "adiff", names, shallow=False)[1:] == ([], [])


def test_top_level_is_what_the_ecosystem_needs(repository):
    if not (repository / ".git").exists():
        pytest.skip("needs the git checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=True).stdout.split("\n")
    expected = {"nbs", "adiff", "settings.ini", "setup.py", "data_scripts", "tests", "README.md", "pyproject.toml", "constraints.txt",
                "Makefile", "LICENSE", "CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md", ".ci",
                ".gitignore", "requirements-lock.txt"}
    assert {name.split("/")[0] for name in tracked if name} <= expected


def test_constraints_pin_what_is_installed(repository):
    lines = [line for line in (repository / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    assert {name.replace("_", "-") for name in settings(repository)["requirements"].split()} <= pinned


def test_ruff_has_nothing_to_say(repository):
    if not find_spec("ruff"):
        pytest.skip("needs ruff: pip install -c constraints.txt -e '.[dev]'")
    found = subprocess.run([sys.executable, "-m", "ruff", "check", "adiff", "data_scripts", "tests"], cwd=repository, capture_output=True,
                           text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_types_fit(repository):
    if not find_spec("mypy"):
        pytest.skip("needs mypy: pip install -c constraints.txt -e '.[dev]'")
    found = subprocess.run([sys.executable, "-m", "mypy"], cwd=repository, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert (repository / "adiff/py.typed").exists()  # so that they count where adiff is installed


def test_the_lock_holds_the_pinned_versions(repository):
    def pins(name, mark):
        found = re.findall(rf"^([\w.-]+)==([\w.+]+){mark}", (repository / name).read_text(), re.MULTILINE)
        return {re.sub(r"[_.]", "-", package.lower()): version for package, version in found}

    locked, constraints = pins("requirements-lock.txt", r"[^\n]* \\\n    --hash=sha256:"), pins("constraints.txt", "")
    needed = " ".join(settings(repository)[key] for key in ("requirements", "dev_requirements", "docs_requirements")).split()
    for package in needed:
        package = re.sub(r"[_.]", "-", package.lower())
        assert locked[package] == constraints[package], f"{package}: make lock"
