"""The built wheel, in an environment of its own and an empty folder: nothing of the checkout is needed."""
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SMALL = ["-o", "training.length=2", "-o", "training.batch_size=4"]


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"  # a build leaves files beside its sources
    tracked = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=repository,
                             capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, tracked):
        if (repository / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((repository / name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder,
                    copy],
                   check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    "The bin folder of an environment that holds the wheel; it sees the packages of this one, but not the checkout."
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    packages = next(environment.glob("lib/python3*/site-packages"))
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", packages,
                    wheel],
                   check=True)
    # As a line of a .pth file is a folder alone: the finder of an editable install is not started from there.
    (packages / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    script = f"#!{environment}/bin/python\nfrom adiff.runs.command_line import main\nmain()\n"
    (environment / "bin/adiff").write_text(script)
    (environment / "bin/adiff").chmod(0o755)
    return environment / "bin"


@pytest.fixture
def adiff(installed, tmp_path, monkeypatch):
    "Runs the command of the installed wheel in an empty folder."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def run(*arguments, program="adiff"):
        answer = subprocess.run([installed / program, *map(str, arguments)], capture_output=True, text=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert answer.returncode == 0, answer.stderr
        return answer.stdout
    return run


def test_the_wheel_holds_what_the_lab_needs(repository, wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    matrices = {f"adiff/lab/experiments/matrices/{path.name}"
                for path in (repository / "nbs/experiments/matrices").glob("*.yaml")}
    assert len(matrices) >= 8 and matrices <= names
    assert {"adiff/py.typed", "adiff/lab/experiments/published.csv", "adiff/lab/experiments/method.ipynb",
            "adiff/lab/_site/style.css"} <= names
    assert not any(name.startswith(("nbs/", "tests/")) for name in names)


def test_the_commands_work_in_an_empty_folder(adiff, installed, tmp_path):
    where = adiff("-c", "import adiff; print(adiff.__file__)", program="python").strip()
    assert Path(where).is_relative_to(installed.parent)
    adiff("-c", "from adiff.data.demo_images import make_demo_data\n"
          "make_demo_data('photos', categories=('cup',), train=8, good=2, per_defect=1)", program="python")
    adiff("fit", "deco", "photos", "--out", "run", *SMALL)
    assert "image AUROC" in adiff("evaluate", "run")
    found = json.loads(adiff("detect", "run/model", "photos/cup/test", "--out", "found", "--json"))
    assert len(found) == len(list(Path("photos/cup/test").rglob("*.png"))) and Path("found/scores.csv").is_file()
    plan = adiff("reproduce", "demo", "--dry-run")
    assert "8 runs" in plan and "new" in plan and not Path("reproduced").exists()
    assert "image AUROC" in adiff("table", "run")
    adiff("-c", "from adiff.lab.tables import read_published; assert len(read_published()) > 1000", program="python")


def test_the_core_asks_for_the_lab_in_one_line(installed, tmp_path):
    "Where the packages of the lab are not installed, everything else works, and the lab says what to do."
    missing = ["papermill", "ipykernel", "ruamel", "submitit", "nbconvert", "tensorboard", "jupyter_client", "pyarrow",
               "bs4", "sphinx", "myst_nb", "furo"]
    (tmp_path / "core.py").write_text(f"""
import sys
from importlib.abc import MetaPathFinder
absent = lambda name: name.partition(".")[0] in {missing}
class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if absent(name): raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if absent(name) else find(name, package)
if len(sys.argv) == 1:
    import pkgutil, adiff
    for module in pkgutil.walk_packages(adiff.__path__, "adiff."):
        if ".lab" not in module.name: importlib.import_module(module.name)
else:
    from adiff.runs.command_line import main
    main()
""")

    def core(*arguments):
        return subprocess.run([installed / "python", tmp_path / "core.py", *arguments], cwd=tmp_path,
                              capture_output=True, text=True)

    everything = core()
    assert everything.returncode == 0, everything.stderr
    answer = core("reproduce", "demo", "--dry-run")
    assert answer.returncode == 2 and len(answer.stderr.strip().splitlines()) == 1, answer.stderr
    assert "pip install 'adiff[lab]'" in answer.stderr
