"""Every notebook runs from top to bottom, each in a process of its own that has imported everything already."""
import sys
from pathlib import Path

import pytest
from processes import finish

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path.relative_to(REPOSITORY / "nbs").as_posix() for path in (REPOSITORY / "nbs").rglob("*.ipynb")
                   if not (path.parent / ".notest").exists()
                   and not any(part[0] in "._" for part in path.relative_to(REPOSITORY).parts))
# Which only `make check` runs: those that compute for more than five seconds (imports aside), and two, 04_site and
# 04_logs, that need packages which `make test` does not install.
SLOW = {f"{name}.ipynb" for name in """
    codecs/01_wavelets codecs/06_load data/10_demo_images data/11_demo_sounds detector/02_pipeline
    diffusion/01_masked lab/01_engines lab/02_tables lab/03_gallery lab/04_site lab/05_reproduce lab/06_export
    lab/07_doctor lab/08_benchmark lab/09_app methods/01_deco_diff methods/02_adiff networks/02_attention
    networks/03_autoencoders networks/04_fast_cpu runs/00_fit runs/01_run_figures runs/03_each_category
    scores/02_semantic scores/04_memories training/00_loop training/03_processes training/04_logs
    training/05_held_out training/06_train tutorials/00_architecture tutorials/01_photo_folder
    tutorials/02_sound_folder tutorials/03_new_method tutorials/04_reading_metrics
""".split()}


def execute(name):
    "What nbdev-test does with a notebook: executes its cells and leaves with 1 at the first that raises."
    from nbdev.test import test_nb

    passed, _ = test_nb(REPOSITORY / "nbs" / name, skip_flags=["notest"], basepath=REPOSITORY)
    sys.exit(not passed)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
                                  for name in NOTEBOOKS])
def test_notebook(name):
    done = finish(execute, name, cwd=REPOSITORY / "nbs")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_list_of_slow_ones_names_notebooks():
    assert SLOW <= set(NOTEBOOKS) and len(NOTEBOOKS) > 60
