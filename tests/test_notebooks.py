"""Every notebook runs from top to bottom, each in a process of its own that has imported everything already."""
import sys
from pathlib import Path

import pytest
from processes import finish

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path.relative_to(REPOSITORY / "nbs").as_posix() for path in (REPOSITORY / "nbs").rglob("*.ipynb")
                   if not (path.parent / ".notest").exists()
                   and not any(part[0] in "._" for part in path.relative_to(REPOSITORY).parts))
# Those that compute for more than five seconds, which only `make check` runs.
SLOW = set()


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
