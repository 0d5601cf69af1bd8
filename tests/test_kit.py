"""The kit holds together: two settings files agree, export leaves no diff, the top level is what it should be."""
import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles

import pytest

import adiff

FOLDERS = ["", "data", "codecs", "diffusion", "networks", "scores", "detector", "training", "methods", "runs", "lab"]
SCIENCE = ("codecs", "diffusion", "networks", "scores", "methods")
# Where a name in an import differs from that of the package.
PACKAGES = {"PIL": "pillow", "pywt": "pywavelets", "sklearn": "scikit-learn", "skimage": "scikit-image",
            "ruamel": "ruamel.yaml",
            "bs4": "beautifulsoup4", "myst_nb": "myst-nb"}


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
        assert re.search(rf"^#   .*\b{re.escape(name)}\b.* {{2,}}\w", text,
                         re.MULTILINE), f"say in one line why {name} is needed"


def imported_packages(paths):
    "Top-level names of other packages that the files import at their top level or inside."
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
            yield from ((name.split(".")[0], path) for name in names)


def test_what_is_imported_is_declared(repository):
    "The core imports what it requires, the lab also what its extra brings; what is optional has an extra of its own."
    ini = settings(repository)
    core, lab = set(ini["requirements"].split()), set(ini["lab_requirements"].split())
    optional = set(" ".join(value for key, value in ini.items() if key.endswith("_requirements")).split()) - lab
    known = {*sys.stdlib_module_names, "adiff", "torchvision",
             "jupyter_client", "IPython"}  # looked for; of ipykernel
    for name, path in imported_packages((repository / "adiff").rglob("*.py")):
        allowed = core | optional | (lab if path.parent.name == "lab" else set())
        assert name in known or PACKAGES.get(name, name) in allowed, f"{path.relative_to(repository)} imports {name}"


def test_export_leaves_no_diff(repository, tmp_path):
    for name in ("nbs", "adiff"):
        shutil.copytree(repository / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__",
                                                                                          ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml", "setup.py", "README.md"):
        shutil.copy(repository / name, tmp_path)
    subprocess.run([Path(sys.executable).with_name("nbdev-export")], cwd=tmp_path, check=True)

    def files(folder):
        return {path.relative_to(folder).as_posix(): path.read_text()
                for path in sorted((folder / "adiff").rglob("*.py"))}

    before, after = files(repository), files(tmp_path)
    assert list(before) == list(after)
    assert [name for name in before if before[name] != after[name]] == []
    homes = {re.search(r"File to edit: (?:\.\./)+(nbs/.+\.ipynb)\.", text)[1] for text in before.values()
             if "File to edit" in text}
    assert [name for name in homes if not (repository / name).is_file()] == []


def module_order(repository):
    "Module -> its notebook's place in the reading order: (folder, number)."
    order = {}
    for path in (repository / "adiff").rglob("*.py"):
        home = re.search(r"File to edit: (?:\.\./)+nbs/(?:(.+)/)?(\d\d)_", path.read_text(encoding="utf-8"))
        if home:
            name = ".".join(path.relative_to(repository / "adiff").with_suffix("").parts)
            order[name] = (FOLDERS.index(home[1] or ""), int(home[2]))
    return order


def test_no_module_and_no_notebook_needs_a_later_one(repository):
    """Imports go only backwards in reading order, in the package (so that there is no circle) and in notebooks.

    Those of `99_package` (the facade), which loads what it names when it is asked, and `98_metrics` stand last.
    """
    from adiff.lab.matrix import imported_modules

    order = module_order(repository)
    last = {name for name, (folder, number) in order.items() if folder == 0 and number >= 90}
    upward = []
    for name, place in order.items():
        if name in last or name == "__init__":
            continue
        path = repository / "adiff" / f"{name.replace('.', '/')}.py"
        needs = imported_modules(path.read_text(encoding="utf-8"), order, name.split(".")[:-1])
        upward += [(name, other) for other in needs - {name} if order[other] >= place]
    for path in (repository / "nbs").rglob("[0-9][0-9]_*.ipynb"):
        folder = path.parent.relative_to(repository / "nbs").as_posix().strip(".")
        if folder not in FOLDERS or (folder == "" and int(path.name[:2]) >= 90):
            continue
        place = (FOLDERS.index(folder), int(path.name[:2]))
        for cell in code_cells(path):
            upward += [(path.name, other) for other in imported_modules(cell, order) if order[other] > place]
    assert upward == []


def code_cells(path):
    "The sources of a notebook's code cells."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [source for cell in cells if cell["cell_type"] == "code" and (source := "".join(cell["source"]).strip())]


def test_cells_are_short(repository):
    "A cell holds one idea: at most 60 lines anywhere; about four, where the science is."
    lengths = {path: [source.count("\n") + 1 for source in code_cells(path)]
               for path in (repository / "nbs").rglob("*.ipynb")
               if not re.search(r"/[._]|/results/", path.as_posix())}
    assert [(path.name, max(counts)) for path, counts in lengths.items() if max(counts, default=0) > 60] == []
    for folder in SCIENCE:
        counts = [count for path, counts in lengths.items() if path.parent.name == folder for count in counts]
        assert median(counts) <= 5 and quantiles(counts, n=10)[8] <= 20, (folder, median(counts),
                                                                          quantiles(counts, n=10)[8])


def test_lines_are_short(repository):
    "At most 120 characters in the package, but for the list of names that nbdev writes."
    long = []
    for path in (repository / "adiff").rglob("*.py"):
        if path.stem != "_modidx":
            text = re.sub(r"^__all__ = \[.*?\]\n", "\n", path.read_text(encoding="utf-8"), flags=re.DOTALL
                          | re.MULTILINE)
            long += [(path.name, line) for line in text.split("\n") if len(line) > 120]
    assert long == []


def test_top_level_is_what_the_ecosystem_needs(repository):
    if not (repository / ".git").exists():
        pytest.skip("needs the git checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=repository, capture_output=True, text=True,
                             check=True).stdout.split("\n")
    expected = {"nbs", "adiff", "settings.ini", "setup.py", "data_scripts", "tests", "README.md", "pyproject.toml",
                "constraints.txt",
                "Makefile", "LICENSE", "CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md", ".ci",
                ".gitignore", "requirements-lock.txt", ".github", ".pre-commit-config.yaml", "CODE_OF_CONDUCT.md"}
    assert {name.split("/")[0] for name in tracked if name} <= expected


def test_constraints_pin_what_is_installed(repository):
    lines = [line for line in (repository / "constraints.txt").read_text().splitlines() if line
             and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    ini = settings(repository)
    needed = f"{ini['requirements']} {ini['lab_requirements']}".split()
    assert {name.replace("_", "-") for name in needed} <= pinned


def test_ruff_has_nothing_to_say(repository):
    if not find_spec("ruff"):
        pytest.skip("needs ruff: pip install -c constraints.txt -e '.[dev]'")
    found = subprocess.run([sys.executable, "-m", "ruff", "check", "adiff", "data_scripts", "tests"], cwd=repository,
                           capture_output=True,
                           text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.slow
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
    needed = " ".join(settings(repository)[key] for key in ("requirements", "dev_requirements",
                                                            "lab_requirements")).split()
    for package in needed:
        package = re.sub(r"[_.]", "-", package.lower())
        assert locked[package] == constraints[package], f"{package}: make lock"
