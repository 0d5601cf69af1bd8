"""The experiment notebooks from end to end, as papermill runs them."""
import json

import papermill
import pytest

from adiff import AnomalyDetector
from adiff.demo_data import make_demo_data
from adiff.demo_sounds import make_demo_sounds
from adiff.experiment import evaluate, fit

OVERRIDES = {"image_size": 32, "wavelet_levels": 2, "length": 6, "batch_size": 4, "augmentations": []}


def execute(repository, folder, name="deco_image", **parameters):
    output = folder / "out.ipynb"
    papermill.execute_notebook(repository / f"nbs/experiments/{name}.ipynb", output, parameters=parameters, progress_bar=False)
    return json.loads(output.read_text())


def pictures(notebook, kind="image/png"):
    return [output for cell in notebook["cells"] for output in cell.get("outputs", []) if kind in output.get("data", {})]


@pytest.mark.parametrize("name", ["deco_image", "adiff_image", "adiff_audio"])
def test_parameters_are_the_documented_ones(repository, name):
    known = papermill.inspect_notebook(repository / f"nbs/experiments/{name}.ipynb")
    assert set(known) == {"data_root", "categories", "preset", "out_dir", "seed", "device", "overrides", "resume", "processes"}
    assert all(one["help"] for one in known.values())


def test_notebook_end_to_end(repository, tmp_path):
    data = make_demo_data(tmp_path / "demo", categories=("brick", "cup"), train=6, good=2, per_defect=1)
    notebook = execute(repository, tmp_path, data_root=str(data), categories="brick,cup", out_dir=str(tmp_path / "run"), device="cpu",
                       overrides=json.dumps(OVERRIDES))
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert set(metrics["categories"]) == {"brick", "cup"} and metrics["mean"]["n_test"] == 16
    assert any("class label" in note for note in metrics["notes"])
    assert "figures/cases_cup.png" in (tmp_path / "run/report.html").read_text()
    assert len(pictures(notebook)) >= 6


MOMENT = json.dumps({"length": 4, "batch_size": 4, "augmentations": []})


def test_adiff_on_images(repository, tmp_path):
    data = make_demo_data(tmp_path / "demo", categories=("brick", "cup"), train=6, good=2, per_defect=1)
    notebook = execute(repository, tmp_path, "adiff_image", data_root=str(data), out_dir=str(tmp_path / "runs"), device="cpu", overrides=MOMENT)
    assert set(json.loads((tmp_path / "runs/metrics.json").read_text())["categories"]) == {"brick", "cup"}
    assert (tmp_path / "runs/brick/report.html").exists() and len(pictures(notebook)) >= 6


def test_adiff_on_sounds(repository, tmp_path):
    data = make_demo_sounds(tmp_path / "demo", train=6, good=2, per_fault=1)
    notebook = execute(repository, tmp_path, "adiff_audio", data_root=str(data), out_dir=str(tmp_path / "run"), device="cpu", overrides=MOMENT)
    assert json.loads((tmp_path / "run/metrics.json").read_text())["kind"] == "sound"
    players = [output for output in pictures(notebook, "text/html") if "<audio" in "".join(output["data"]["text/html"])]
    assert len(players) == 3 and len(pictures(notebook)) >= 4


@pytest.mark.parametrize("parameters, words", [({"data_rot": "x"}, ["data_rot", "data_root"]),
                                               ({"overrides": '{"codek": "taef2"}'}, ["codek", "codec"])])
def test_misspelt_parameters_are_refused(repository, tmp_path, parameters, words):
    data = make_demo_data(tmp_path / "demo", categories=("brick",), train=2, good=1, per_defect=1)
    with pytest.raises(papermill.PapermillExecutionError) as error:
        execute(repository, tmp_path, **{"data_root": str(data), "out_dir": str(tmp_path / "run"), **parameters})
    assert all(word in str(error.value) for word in words)
    assert not (tmp_path / "run/model").exists()


def test_evaluation_refuses_changed_data(tmp_path):
    data = make_demo_data(tmp_path / "demo", categories=("brick",), train=4, good=2, per_defect=1)
    fit("deco", data, tmp_path / "run", device="cpu", overrides=OVERRIDES)
    (data / "brick/test/good/001.png").unlink()
    with pytest.raises(ValueError, match="changed"):
        evaluate(tmp_path / "run", device="cpu")


def test_mixed_precision_ends_with_training(tmp_path):
    "The detector that training returns answers like the one that is loaded from its folder: in full precision."
    data = make_demo_data(tmp_path / "demo", categories=("cup",), train=8, good=2, per_defect=1)
    detector = fit("deco", data, tmp_path / "run", device="cpu",
                   overrides={**OVERRIDES, "mixed_precision": "bf16", "ema_decay": 0.9, "gradient_accumulation_steps": 2})
    image = data / "cup/test/hole/000.png"
    reloaded = AnomalyDetector.from_pretrained(tmp_path / "run/model")
    assert abs(detector(image).maps - reloaded(image).maps).max() < 1e-5
