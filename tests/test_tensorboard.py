"""A run as TensorBoard reads it back holds what the run folder holds; and what a training prints into a log reads well there."""
import contextlib
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from adiff import InputError, evaluate, fit
from adiff.demo_data import make_demo_data
from adiff.tensorboard import write_tensorboard

TINY = {"image_size": 32, "wavelet_levels": 2, "length": 12, "batch_size": 4, "validate_every": 6, "augmentations": []}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_thread):
    "An evaluated run, and what was printed meanwhile on a standard error that is no terminal."
    folder = tmp_path_factory.mktemp("tensorboard")
    data = make_demo_data(folder / "demo", categories=("brick",), train=10, good=3, per_defect=1)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as log:
        patch.delenv("JPY_SESSION_NAME", raising=False)
        fit("deco", data, folder / "runs" / "brick", device="cpu", overrides=TINY)
        evaluate(folder / "runs" / "brick", device="cpu")
    return folder / "runs" / "brick", log.getvalue()


@pytest.fixture(scope="module")
def run(trained):
    return trained[0]


def test_bars_in_a_log_are_whole_lines(trained):
    log = trained[1]
    assert "\r" not in log and log.endswith("\n")
    for job in ("measuring latents", "training", "testing brick"):
        lines = [line for line in log.splitlines() if line.startswith(job)]
        assert lines[0].startswith(f"{job}:   0%") and lines[-1].startswith(f"{job}: 100%"), log


def test_events_hold_what_the_run_folder_holds(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for _ in range(2):  # the second time replaces the first
        assert write_tensorboard(run.parent) == [run / "tensorboard"]
    events = accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for name in ("loss", "lr", "validation_loss"):
        lines = [line for line in log if line.get(name) is not None]
        written = events.Scalars(f"training/{name}")
        assert [one.step for one in written] == [line["step"] for line in lines] and len(lines) > 1
        np.testing.assert_allclose([one.value for one in written], [line[name] for line in lines], rtol=1e-6)
        np.testing.assert_allclose(np.diff([one.wall_time for one in written]), np.diff([line["seconds"] for line in lines]), atol=1e-3)
    metrics = json.loads((run / "metrics.json").read_text())
    for category, values in {**metrics["categories"], "mean": metrics["mean"]}.items():
        for name, value in values.items():
            assert events.Scalars(f"metrics/{category}/{name}")[0].value == pytest.approx(value, rel=1e-6)
    figures = {path.stem: Image.open(path).size for path in (run / "figures").glob("*.png")}
    assert {tag: (events.Images(tag)[0].width, events.Images(tag)[0].height) for tag in events.Tags()["images"]} == figures and figures


def test_no_run_and_no_log_are_refused(tmp_path):
    pytest.importorskip("tensorboard")
    with pytest.raises(InputError, match="holds no run"):
        write_tensorboard(tmp_path)
    for text in ("", "{", '{"step": 1}\n', "[1]\n"):
        (tmp_path / "log.jsonl").write_text(text)
        with pytest.raises(InputError, match="log.jsonl: not the log"):
            write_tensorboard(tmp_path)
    assert not (tmp_path / "tensorboard").exists()


def test_without_the_package_the_message_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="adiff\\[tensorboard\\]"):
        write_tensorboard(run)
