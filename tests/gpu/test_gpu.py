"""tests/gpu/check.py: rehearsed on the CPU everywhere, carried out where there is a GPU."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
CHECK = Path(__file__).with_name("check.py")


def check(out, *options):
    "Runs the script; returns its exit code and the content of its JSON file."
    done = subprocess.run([sys.executable, CHECK, "--out", out, *options], capture_output=True, text=True)
    (found,) = [json.loads(path.read_text()) for path in out.glob("*.json")]
    return done.returncode, found, done.stderr


def test_the_rehearsal_measures_what_a_gpu_would(tmp_path):
    code, found, said = check(tmp_path, "--rehearse", "--only", "precision", "training", "detection", "ideal")
    assert code == 0, said
    rows = {row["what"] for row in found["rows"]}
    assert len(rows) == 3 + 6 + 6 + 1
    assert all(0 < row["numbers"]["bf16"][0] <= 3e-2 for row in found["rows"] if row["part"] == "precision")
    table = (tmp_path / "gpu.md").read_text()
    assert table.count("not measured") == len(rows) and "samples/s" in table


def test_the_table_of_the_documentation_is_of_this_script(repository):
    "Its rows are those of a rehearsal, and what was not measured says so."
    page, script = (repository / "nbs/docs/gpu.md").read_text(), CHECK.read_text()
    assert "not measured" in page and "tests/gpu/check.py" in page
    for what in ("training step of UNet_S, batch 128: ours, bf16", "detection with UNet_L, batch 64",
                 "10,400 updates of UNet_L, extrapolated", "killed and resumed: the same bits"):
        assert f"| {what} |" in page, what
    assert "10,400 updates of UNet_L, extrapolated" in script


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_everything_on_a_gpu(tmp_path):
    code, found, said = check(tmp_path)
    assert code == 0, said
    assert found["seconds"] < 900
