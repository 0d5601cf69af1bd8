"""The corpus of tests/bad_inputs.py, every entry on the command line, in python and in the notebooks: handled or
refused, nothing else."""
import contextlib
import faulthandler
import functools
import io
import json
import os
import re
import resource
import shutil
import stat
from pathlib import Path

import IPython.display  # noqa: F401  the notebooks need it, also where they run as somebody who may read nothing
import pandas as pd
import papermill
import pytest
from bad_inputs import CORPUS, ENTRIES, ODD_NAMES, TINY, TINY_SOUNDS, TOY, Kit, common, corpus_table, png
from bs4 import BeautifulSoup
from click.testing import CliRunner
from processes import adiff

from adiff import AnomalyDetector, InputError, detect, evaluate, fit
from adiff.core import write_json
from adiff.data.demo_images import make_demo_data
from adiff.data.demo_sounds import make_demo_sounds
from adiff.lab import site
from adiff.lab.engines import SbatchEngine
from adiff.lab.tables import write_tables
from adiff.runs.command_line import main
from adiff.runs.report import write_report

SECONDS = 240  # after which an input counts as one that hangs, on a busy machine as well: the process ends
MEGABYTES = 700  # that an input may add to what was in memory before


@pytest.fixture(scope="module")
def kit(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("good")
    images = make_demo_data(folder / "images", categories=("brick",), train=4, good=2, per_defect=1)
    sounds = make_demo_sounds(folder / "sounds", train=4, good=2, per_fault=1)
    fit("deco", images, folder / "run", device="cpu", overrides=TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adiff.runs.evaluate.draw_figures", lambda *_: None)
        evaluate(folder / "run", device="cpu")
    fit("adiff", sounds, folder / "sound_run", device="cpu", overrides=TINY_SOUNDS)
    return Kit(images, sounds, folder / "run", folder / "sound_run")


@pytest.fixture(autouse=True)
def quick(request, kit, monkeypatch):
    """What would take longer than all that is tested here: figures are drawn in one test only, and the good models
    are loaded once."""
    if "Sounds-sounds" not in request.node.name:
        monkeypatch.setattr("adiff.runs.evaluate.draw_figures", lambda *_: None)
    load, good = AnomalyDetector.from_pretrained, (kit.run / "model", kit.sound_run / "model")
    monkeypatch.setattr(AnomalyDetector, "from_pretrained",
                        lambda folder: loaded(load, Path(folder)) if Path(folder) in good else load(folder))


@functools.cache
def loaded(load, folder):
    return load(folder)


@pytest.fixture(autouse=True)
def no_hang_and_no_bomb():
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    faulthandler.cancel_dump_traceback_later()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1024


def contents(*folders):
    """Every file below the folders: what it is, where it is on the disk, and when it was written. A file that is
    replaced is another one."""
    found = {path: path.lstat() for folder in folders for path in folder.rglob("*")}
    return {path: (state.st_mode, state.st_ino, state.st_size, state.st_mtime_ns) for path,
            state in found.items() if not stat.S_ISDIR(state.st_mode)}


@contextlib.contextmanager
def without_privileges(*folders):
    "root reads everything: while the body runs, this process is nobody, who may enter and write the folders."
    if os.geteuid():
        yield
        return
    inside = {path: path.stat().st_mode for folder in folders for path in (folder, *folder.rglob("*"))}
    entered = {path: path.stat().st_mode for folder in folders for path in folder.parents} | inside
    for path, mode in entered.items():
        path.chmod(mode | (mode >> 6 & 7) * 0o11 if path in inside else mode | 0o55)  # what its owner may, others may
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        for path, mode in entered.items():
            path.chmod(mode)


@pytest.fixture
def used(kit, tmp_path):
    """A context that makes the entry `name` and yields (entry, use); if it is to be refused, nothing may have
    changed afterwards."""
    @contextlib.contextmanager
    def used(name):
        entry = ENTRIES[name]
        use = entry.use(kit, tmp_path)
        good = (kit.images, kit.sounds, kit.run, kit.sound_run)
        before = contents(tmp_path, *good)
        with without_privileges(tmp_path, kit.run) if "unreadable" in name else contextlib.nullcontext():
            yield entry, use
        if entry.outcome == "refused":
            assert contents(tmp_path, *good) == before
        assert not (tmp_path / "executed").exists() and not Path("executed").exists()
    return used


def said(entry, line):
    "What a refusal says: one line, with the words of the entry."
    assert line and line.isprintable(), repr(line)
    for word in entry.words:
        assert word in line, line


def sampled(names):
    "For parametrize: every tenth of the names belongs to the quick tests, the others are slow."
    return [pytest.param(name, marks=() if number % 10 == 0 else pytest.mark.slow)
            for number, name in enumerate(names)]


@pytest.mark.parametrize("name", sampled(ENTRIES))
def test_command_line(used, name):
    with used(name) as (entry, use):
        if use.command is None:
            pytest.skip("no command line can hold it")
        if use.script:
            err = io.StringIO()
            with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
                code = common.main(TOY, list(map(str, use.command)))
            lines = err.getvalue().splitlines()
        else:
            result = CliRunner().invoke(main, list(map(str, use.command)))
            assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
            code, lines = result.exit_code, result.stderr.splitlines()
            first = next((number for number, line in enumerate(lines) if line.startswith("adiff: ")), len(lines))
            lines = lines[first:]  # before it, what a progress bar has shown
        assert (code, len(lines)) == ((2, 1) if entry.outcome == "refused" else (0, 0)), (code, lines)
        if entry.outcome == "refused":
            said(entry, lines[0])


@pytest.mark.parametrize("name", sampled(ENTRIES))
def test_python(used, name):
    with used(name) as (entry, use):
        if entry.outcome == "handled":
            assert entry.check(use.call())
            return
        with pytest.raises((InputError, common.DataError)) as error:
            use.call()
        said(entry, str(error.value))


def run_notebook(repository, name, parameters):
    "Executes the cells of an experiment in this process, with the parameters set where papermill sets them."
    namespace = {}
    for cell in json.loads((repository / f"nbs/experiments/{name}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}: {cell['id']}", "exec"), namespace)
            if "parameters" in cell["metadata"].get("tags", []):
                namespace.update(parameters)
    return namespace


TAKEN = ("Pictures", "Masks", "Sounds", "Tables", "Overrides", "Parameters", "Models, codecs, checkpoints",
         "Results of runs")
TOGETHER = {"Pictures": "photos", "Sounds": "sounds"}  # what is handled is handled in one run


@pytest.mark.parametrize("name", sampled(name for name, entry in ENTRIES.items() if name.split(":")[0] in TAKEN
                                         and (entry.outcome == "refused" or name.split(":")[0] not in TOGETHER)))
def test_notebook(used, repository, name):
    with used(name) as (entry, use):
        if use.notebook is None:
            pytest.skip("no notebook takes such a thing")
        if entry.outcome == "handled":
            run_notebook(repository, *use.notebook)
            return
        with pytest.raises(InputError) as error:
            run_notebook(repository, *use.notebook)
        said(entry, str(error.value))


@pytest.mark.slow
@pytest.mark.parametrize("section, folder", TOGETHER.items())
def test_notebook_with_all_that_is_handled(kit, repository, tmp_path, section, folder):
    handled = [entry for entry in CORPUS[section] if entry.outcome == "handled"
               and not re.search("16 bits|floating", entry.name)]  # not beside 8 bits
    for number, entry in enumerate(handled):
        (tmp_path / str(number)).mkdir()
        use = entry.use(kit, tmp_path / str(number))
        shutil.copytree(tmp_path / str(number) / folder, tmp_path / "all/thing/train/good" / str(number), symlinks=True)
    for path in [*(tmp_path / "all").rglob("*.*")]:
        shutil.move(path, tmp_path / "all/thing/train/good" / f"{path.parent.name}{path.name}".replace("good", "part"))
    shutil.copytree(tmp_path / "all/thing/train/good", tmp_path / "all/thing/test/odd")
    notebook, parameters = use.notebook
    found = run_notebook(repository, notebook,
                         {**parameters, "data_root": str(tmp_path / "all"), "out_dir": str(tmp_path / "run")})
    assert found["metrics"]["mean"]["n_test"] >= len(handled)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Pictures: truncated PNG", "Overrides: unknown setting"])
def test_papermill_says_the_same(used, repository, tmp_path, name):
    with used(name) as (entry, use):
        notebook, parameters = use.notebook
        with pytest.raises(papermill.PapermillExecutionError) as error:
            papermill.execute_notebook(repository / f"nbs/experiments/{notebook}.ipynb", None, parameters,
                                       progress_bar=False)
        assert error.value.ename == "InputError"
        said(entry, error.value.evalue)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Pictures: pipe named .png", "Matrices: aliases of aliases",
                                  "Official checkpoints: pickle that runs a command",
                                  "Models, codecs, checkpoints: a pipeline with code in the folder"])
def test_real_process(used, name):
    with used(name) as (entry, use):
        result = adiff(*use.command)
        lines = [line for line in result.stderr.splitlines() if line.startswith("adiff: ")]
        assert result.returncode == 2 and len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
        said(entry, lines[0])


# ---- names go nowhere but into text

HTML = "<img src=x onerror=alert(1)><script>alert(1)"


def test_odd_names_come_back_from_tables(kit, tmp_path):
    for name in ODD_NAMES.values():
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(png())
    detect(kit.run / "model", [tmp_path / "photos"], tmp_path / "out", device="cpu")
    table = pd.read_csv(tmp_path / "out/scores.csv")
    assert set(table.path) == {str(tmp_path / "photos" / name) for name in ODD_NAMES.values()}
    assert all((tmp_path / "out" / overlay).is_file() for overlay in table.overlay)


def check_page(path):
    """Raises if the page holds anything that names could have brought in: a script that is not ours, a handler, a
    picture from elsewhere."""
    soup = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
    for script in soup.find_all("script"):
        assert "//" not in script.get("src", "") and "alert(1)" not in str(script.string)
    assert not [value for tag in soup.find_all(True) for name, value in tag.attrs.items() if name.startswith("on")]
    assert not soup.find_all(["iframe", "object", "embed", "base"])
    assert all("/" in tag["src"] for tag in soup.find_all("img"))


@pytest.mark.slow
def test_names_are_text_in_every_page(kit, tmp_path):
    "A category, a dataset, a label, an axis: each is a name that would be a script."
    out = tmp_path / "out"
    run, data = out / "runs/x", tmp_path / f"data {HTML}"
    shutil.copytree(kit.images / "brick", data / HTML)
    fit("deco", data, run, device="cpu", overrides=TINY)
    evaluate(run, device="cpu")
    (run / "figures").mkdir()
    (run / f"figures/cases_{HTML}.png").write_bytes(png())
    check_page(write_report(run))
    write_json(out / "matrix.json", {"matrix": HTML, "description": HTML, "command": HTML, "runs": [
        {"label": HTML, "folder": "runs/x", "identity": "x", "group": HTML, "axes": {HTML: HTML}}]})
    write_json(run / "run.json",
               {"label": HTML, "group": HTML, "axes": {HTML: HTML}, "matrix": HTML, "identity": "x",
                "parameters": {HTML: HTML}})
    write_json(run / "done.json", {"identity": "x", "seconds": 1.0, "finished": ""})
    pages = [path for path in write_tables([out], out / "tables") if path.suffix == ".html"]
    site.write_site(out)
    pages += (out / "site").rglob("*.html")
    assert {"index.html", "x.html"} < {path.name for path in pages}
    for path in pages:
        check_page(path)
        if path.stem not in ("genindex", "search"):  # Sphinx's own, which name nothing of ours
            assert "alert(1)" in BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser").get_text()


def test_no_name_reaches_a_shell(tmp_path, monkeypatch):
    "A fake sbatch runs the script as Slurm would, with bash."
    fake = tmp_path / "bin/sbatch"
    fake.parent.mkdir()
    fake.write_text("#!/bin/bash\nSLURM_ARRAY_TASK_ID=0 bash \"$1\" 2> task.txt\necho Submitted batch job 7\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    evil = "it's $(touch executed) `touch executed`; touch executed & \"x\" #"
    engine = SbatchEngine(tmp_path / evil, device=evil, comment=evil, partition="a b'c")
    engine.submit([tmp_path / evil / "runs" / evil])
    said = (f"adiff: {tmp_path / evil / 'runs' / evil}: no run.json here, so there is nothing to run; "
            "adiff reproduce writes it\n")
    assert (tmp_path / "task.txt").read_text() == said
    assert not list(tmp_path.rglob("executed"))


def test_the_page_is_the_corpus(repository):
    page = (repository / "nbs/bad_inputs.md").read_text(encoding="utf-8")
    assert page == corpus_table(), "python tests/bad_inputs.py writes it anew"
    assert len(ENTRIES) == sum(map(len, CORPUS.values())), "a name is there twice"
