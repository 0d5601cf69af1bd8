"""The notebook of figures, from run folders to pictures with captions."""
import json
import shutil

import papermill
import pytest

from adiff.core import read_json, write_json
from adiff.data.demo_images import make_demo_data
from adiff.data.demo_sounds import make_demo_sounds
from adiff.runs.evaluate import evaluate
from adiff.runs.fit import fit

pytestmark = pytest.mark.slow

TINY = {"data": {"image_size": 32}, "training": {"length": 4, "batch_size": 4, "augmentations": []}}


@pytest.fixture(scope="module")
def out(tmp_path_factory, one_thread):
    """A folder as `adiff reproduce` leaves it: two variants with two seeds, of two categories of images and of a sound.

    One run of each is real; the others are copies of it with worse numbers, which nothing here can tell.
    """
    folder = tmp_path_factory.mktemp("figures") / "out"
    data = {"images": make_demo_data(folder / "data/images", categories=("brick", "cup"), train=4, good=2,
                                     per_defect=1),
            "sounds": make_demo_sounds(folder / "data/sounds", train=4, good=2, per_fault=1)}
    listed = []
    for kind, method, overrides in (("images", "deco", TINY), ("sounds", "one-class-svm", {})):
        real = folder / "runs" / f"{kind}-0"
        fit(method, data[kind], real, device="cpu", overrides=overrides)
        evaluate(real, "cpu")
        metrics = read_json(real / "metrics.json")
        variants = ((variant, seed) for variant in ("all parts", "without one") for seed in (0, 1))
        for number, (variant, seed) in enumerate(variants):
            run = folder / "runs" / f"{kind}-{number}"
            if number:
                shutil.copytree(real, run, ignore=shutil.ignore_patterns("model", "checkpoints", "figures"))
                worse = {name: {**found, "image_auroc": found["image_auroc"] * (1 - 0.02 * number)} for name,
                         found in metrics["categories"].items()}
                write_json(run / "metrics.json",
                           {**metrics, "categories": worse, "seed": seed, "network_calls": float(number)})
            listed.append({"label": f"{variant} {kind} {seed}", "folder": f"runs/{run.name}",
                           "identity": str(len(listed)), "group": kind, "axes": {"part": variant, "seed": str(seed)}})
            write_json(run / "run.json",
                       {"matrix": "small", "notebook": "deco_image.ipynb", "parameters": {}, **listed[-1]})
            write_json(run / "done.json",
                       {"identity": listed[-1]["identity"], "seconds": 1.0, "finished": "2026-01-01T00:00:00"})
    write_json(folder / "matrix.json",
               {"matrix": "small", "description": "", "command": "adiff reproduce small", "runs": listed})
    return folder


def execute(repository, folder, **parameters):
    papermill.execute_notebook(repository / "nbs/experiments/figures.ipynb", folder / "out.ipynb",
                               parameters=parameters, progress_bar=False)
    return json.loads((folder / "out.ipynb").read_text())


def test_figures_of_a_matrix(repository, tmp_path, out):
    notebook = execute(repository, tmp_path, runs=str(out), out_dir=str(tmp_path / "figures"))
    found = {path.name for path in (tmp_path / "figures").iterdir()}
    expected = {"qualitative_images", "ablation_images", "cost_images", "gaps_images", "gaps_pixel_ap_images",
                "roc_images", "pro_images", "histograms_images",
                "qualitative_sounds", "sounds_sounds", "ablation_sounds", "cost_sounds", "roc_sounds",
                "histograms_sounds"}
    assert found == {name + suffix for name in expected for suffix in (".png", ".svg", ".txt")}
    assert all(path.read_text().startswith(path.stem.rsplit("_")[-1]) for path in (tmp_path / "figures").glob("*.txt"))
    assert "standard deviation over 2 seeds" in (tmp_path / "figures/ablation_images.txt").read_text()
    assert "<text" in (tmp_path / "figures/ablation_images.svg").read_text()
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    printed = "".join("".join(output.get("text", "")) for output in outputs)
    assert "adiff reproduce small" in printed and "pro, sounds: left out, no masks" in printed
    assert sum("image/png" in output.get("data", {}) for output in outputs) == len(expected)


def test_a_folder_without_runs_is_one_line(repository, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(papermill.PapermillExecutionError) as error:
        execute(repository, tmp_path, runs=str(tmp_path / "empty"), out_dir=str(tmp_path / "figures"))
    assert error.value.ename == "InputError"
    assert "holds no evaluated run" in error.value.evalue and "\n" not in error.value.evalue
    assert not (tmp_path / "figures").exists()


def test_unknown_parameters_are_refused(repository, tmp_path):
    known = papermill.inspect_notebook(repository / "nbs/experiments/figures.ipynb")
    assert set(known) == {"runs", "out_dir"} and all(one["help"] for one in known.values())
    with pytest.raises(papermill.PapermillExecutionError, match="unknown parameter 'run'"):
        execute(repository, tmp_path, run="x")
