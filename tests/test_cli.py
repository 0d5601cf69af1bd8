"""The command line as a user meets it: real processes, real files, every kind of bad input in one line with exit code
2."""
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from processes import adiff, adiff_command, start
from safetensors.torch import load_file

from adiff import AnomalyDetector
from adiff.runs.command_line import _methods, _presets, main
from adiff.runs.evaluate import open_run
from adiff.data.demo_images import make_demo_data
from adiff.methods.registry import METHODS

TINY = {"codec.levels": 2, "data.image_size": 32, "discrepancy.kind": "deviation", "training.length": 12,
        "training.batch_size": 4, "training.checkpoint_every": 4, "training.augmentations": []}


def adiff_here(*arguments):
    "The same command inside this process, for what would otherwise start python dozens of times."
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


def fit_arguments(data, out, **changes):
    "A short training, with the settings `changes` (path: value); those that are ... are left to the preset."
    settings = {path: value for path, value in {**TINY, **changes}.items() if value is not ...}
    return ["fit", "deco", data, "--out", out, "--categories", "brick", "--device", "cpu", *options(settings)]


def options(settings):
    "-o PATH=VALUE for each of the `settings`; texts are typed as they are, other values as JSON."
    typed = [f"{path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in settings.items()]
    return [word for assignment in typed for word in ("-o", assignment)]


def refused(result, *words):
    "One line on standard error, exit code 2, and the words in it."
    lines = [line for line in result.stderr.splitlines() if line.startswith("adiff: ")]
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert str(word) in lines[0], lines[0]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_demo_data(tmp_path_factory.mktemp("data") / "demo", train=10, good=3, per_defect=1)


@pytest.fixture(scope="session")
def run(data, tmp_path_factory):
    "A finished, evaluated run."
    out = tmp_path_factory.mktemp("runs") / "brick"
    assert adiff(*fit_arguments(data, out)).returncode == 0
    result = adiff("evaluate", out, "--device", "cpu", "--save-maps")
    assert result.returncode == 0 and "image AUROC" in result.stdout, result.stderr
    return out


def test_a_run_folder_holds_what_is_promised(run):
    names = {path.relative_to(run).as_posix() for path in run.rglob("*")}
    assert {"config.json", "metrics.json", "scores.csv", "discrepancies.csv", "log.jsonl", "report.html",
            "model/model_index.json",
            "checkpoints/step_00000012.pt", "figures/cases_brick.png", "maps/brick/test/hole/000.tiff"} <= names
    assert len(list((run / "checkpoints").iterdir())) == 2  # the last two are kept
    metrics = json.loads((run / "metrics.json").read_text())
    keys = {"image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro", "n_train",
            "n_test",
            "image_pauc"}
    assert set(metrics["mean"]) == set(metrics["categories"]["brick"]) == keys
    assert {"method", "dataset", "preset", "seed", "train_seconds", "seconds_per_image", "peak_memory_mb",
            "parameters"} <= set(metrics)
    assert any("protocol official" in note for note in metrics["notes"])
    assert list(pd.read_csv(run / "scores.csv")) == ["path", "category", "label", "defect", "score"]
    config = json.loads((run / "config.json").read_text())
    assert config["parameters"]["training"]["length"] == 12
    assert config["dataset"]["fingerprint"] and config["versions"]["torch"]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 13)) and {"loss", "lr", "seconds"} <= set(log[0])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(data, run, tmp_path):
    assert adiff(*fit_arguments(data, tmp_path / "again")).returncode == 0
    first, again = (load_file(folder / "model/network/diffusion_pytorch_model.safetensors")
                    for folder in (run, tmp_path / "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_killed_run_resumes_to_the_same_weights(data, run, tmp_path):
    out = tmp_path / "killed"
    process = start(adiff_command, list(map(str, fit_arguments(data, out))), out=tmp_path / "said.txt")
    while not list(out.glob("checkpoints/step_*.pt")):
        assert process.is_alive() and time.sleep(0.02) is None
    process.kill()
    process.join()
    assert not (out / "model").exists()
    refused(adiff_here(*fit_arguments(data, out)), out, "resume")
    refused(adiff_here("evaluate", out), "not finished")
    assert adiff(*fit_arguments(data, out), "--resume").returncode == 0
    whole, resumed = (load_file(folder / "model/network/diffusion_pytorch_model.safetensors") for folder in (run, out))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_that_goes_on_keeps_its_number_of_threads(data, run, tmp_path, monkeypatch):
    "As their number changes the order of sums, and with it last digits."
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    config = json.loads((run / "config.json").read_text())
    config["machine"]["threads"] = 3
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    chosen = []
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("adiff.machine.usable_cores", lambda: 4)
    monkeypatch.setattr("torch.set_num_threads", chosen.append)
    monkeypatch.setattr("torch.get_num_threads", lambda: chosen[-1])
    assert adiff_here(*fit_arguments(data, tmp_path / "run"), "--resume").returncode == 0
    open_run(tmp_path / "run", "cpu")
    assert chosen == [3, 3]


@pytest.mark.slow
def test_detect_on_a_folder_of_any_images(run, data, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    tile = Image.open(data / "brick/test/hole/000.png").convert("L")
    tile.save(photos / "grey.png")
    tile.convert("RGBA").resize((200, 90)).save(photos / "wide.png")
    Image.fromarray(np.asarray(tile).astype(np.uint16) * 257).save(photos / "deep.png")
    result = adiff("detect", run / "model", photos, "--out", tmp_path / "out", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path / "out" / "scores.csv")
    assert len(table) == 3 and table.score.between(0, 1).all() and table.anomalous.isin([True, False]).all()
    assert Image.open(tmp_path / "out" / table.overlay[table.path.str.contains("wide")].item()).size == (200, 90)
    assert np.isclose(table.score[0], table.score[1], atol=1e-3)  # deep and grey show the same picture
    (photos / "broken.png").write_bytes(b"not an image")
    refused(adiff("detect", run / "model", photos, "--out", tmp_path / "some", "--device", "cpu"), "1 of 4 files")
    assert pd.read_csv(tmp_path / "some" / "scores.csv").error.notna().sum() == 1
    refused(adiff("detect", run / "model", photos / "broken.png", "--out", tmp_path / "none"), "broken.png")
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_quiet_and_json(data, run, tmp_path):
    result = adiff("detect", run / "model", data / "brick/test/hole", "--out", tmp_path / "out", "--device", "cpu",
                   "--json", "--quiet")
    assert result.returncode == 0 and result.stderr == ""
    (found,) = json.loads(result.stdout)
    assert found["path"].endswith("000.png") and found["score"] > 0 and found["anomalous"] in (True, False)
    loud = adiff_here("table", run, "--json")
    assert {row["metric"] for row in json.loads(loud.stdout)} >= {"image_auroc", "pixel_ap"}
    assert json.loads(adiff_here("evaluate", run, "--device", "cpu",
                                 "--json").stdout) == json.loads((run / "metrics.json").read_text())
    refused(adiff_here("evaluate", tmp_path / "nowhere", "--json", "--quiet"), "nowhere")


@pytest.mark.slow
def test_shells_complete_names(data):
    assert set(_methods) == {*METHODS}
    assert set(_presets) == {name for method in METHODS.values() for name in method.presets}

    def completed(words, position):
        return adiff(env={**os.environ, "_ADIFF_COMPLETE": "bash_complete", "COMP_WORDS": words,
                          "COMP_CWORD": str(position)}).stdout.split()

    assert completed("adiff det", 1) == ["plain,detect"]
    assert completed("adiff fit deco --preset cpu-", 4) == ["plain,cpu-taef2"]
    assert completed("adiff reproduce ablation_", 2) == ["plain,ablation_adiff", "plain,ablation_deco"]


@pytest.mark.slow
def test_a_plain_folder_is_enough(data, tmp_path):
    shutil.copytree(data / "brick/train/good", tmp_path / "photos")
    arguments = ["fit", "deco", tmp_path / "photos", "--out", tmp_path / "run", "--device", "cpu", *options(TINY)]
    assert adiff(*arguments).returncode == 0
    detector = AnomalyDetector.from_pretrained(tmp_path / "run" / "model")
    assert detector.config.protocol == "full_frame" and detector.config.categories == ["photos"]
    out = detector(data / "brick/test/hole/000.png")
    assert out.maps.shape == (1, 256, 256) and out.is_anomalous is not None
    refused(adiff("evaluate", tmp_path / "run"), "no test images")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def bad_inputs(data, run, folder):
    "name -> (arguments, words that the line must hold); each must leave everything as it was."
    corrupt, empty, small_mask = folder / "corrupt", folder / "empty", folder / "small_mask"
    for copy in (corrupt, small_mask):
        shutil.copytree(data / "brick", copy / "brick")
    (corrupt / "brick/train/good/001.png").write_bytes(b"\x89PNG broken")
    Image.new("L", (9, 9), 255).save(small_mask / "brick/ground_truth/hole/000_mask.png")
    empty.mkdir()
    (folder / "file").write_text("in the way")
    with open(folder / "evil.pt", "wb") as file:
        pickle.dump({"model": Malicious(folder / "executed")}, file)
    torch.save({"model": {"weight": torch.zeros(3)}}, folder / "foreign.pt")
    shutil.copytree(run / "model", folder / "incomplete")
    (folder / "incomplete/network/diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    out = folder / "out"
    return {
        "corrupt image": (fit_arguments(corrupt, out), ["001.png"]),
        "empty folder": (fit_arguments(empty, out), ["empty"]),
        "missing folder": (fit_arguments(folder / "nowhere", out), ["nowhere"]),
        "unknown category": (["fit", "deco", data, "--out", out, "--categories", "botle"], ["botle", "brick"]),
        "unknown section": (fit_arguments(data, out, **{"codek.kind": "taef2"}), ["codek", "codec"]),
        "unknown setting": (fit_arguments(data, out, **{"correction.steps": 1}),
                            ["unknown override 'correction.steps'", "correction.num_inference_steps"]),
        "setting without its section": (fit_arguments(data, out, num_inference_steps=1),
                                        ["did you mean correction.num_inference_steps?"]),
        "setting of a wrong type": (fit_arguments(data, out, **{"training.length": "long"}), ["training.length"]),
        "setting of a wrong range": (fit_arguments(data, out, **{"training.learning_rate": -1}),
                                     ["training.learning_rate"]),
        "setting without a value": ([*fit_arguments(data, out), "-o", "training.warmup"],
                                    ["-o training.warmup", "=VALUE"]),
        "setting given twice": ([*fit_arguments(data, out), "-o", "training.length=3"], ["training.length", "twice"]),
        "unknown preset": (["fit", "deco", data, "--out", out, "--preset", "huge"], ["huge", "cpu"]),
        "unknown method": (["fit", "dceo", data, "--out", out], ["dceo", "deco"]),
        "unknown device": ([*fit_arguments(data, out), "--device", "tpu"], ["tpu"]),
        "image size that does not fit": (fit_arguments(data, out, **{"data.image_size": 36}), ["image_size"]),
        "missing codec folder": (fit_arguments(data, out,
                                               **{"codec.kind": str(folder / "no_codec"), "codec.levels": ...}),
                                 ["no_codec"]),
        "unwritable output": (fit_arguments(data, folder / "file" / "run"), ["file"]),
        "run that exists": (fit_arguments(data, run), ["resume"]),
        "malicious checkpoint": (["convert-official", folder / "evil.pt", out, "--network-only"], ["evil.pt"]),
        "foreign checkpoint": (["convert-official", folder / "foreign.pt", out, "--network-only"], ["foreign.pt"]),
        "missing checkpoint": (["convert-official", folder / "no.pt", out], ["no.pt"]),
        "torn model": (["detect", folder / "incomplete", data / "brick/test/good", "--out", out], ["incomplete"]),
        "no model": (["detect", empty, data / "brick/test/good", "--out", out], ["empty"]),
        "no images to detect in": (["detect", run / "model", empty, "--out", out], ["empty"]),
        "no such run": (["evaluate", folder / "nowhere"], ["nowhere"]),
    }


@pytest.mark.slow
def test_bad_input_is_one_line_and_changes_nothing(data, run, tmp_path):
    cases, before = bad_inputs(data, run, tmp_path), contents(run)
    there = contents(tmp_path)
    for name, (arguments, words) in cases.items():
        print(name)
        refused(adiff_here(*arguments), *words)
        assert contents(tmp_path) == there, f"{name}: something was written"
    assert contents(run) == before


def test_commands_that_cannot_be_understood_are_one_line():
    refused(adiff_here("fit", "deco", "photos", "--out", "run", "--seed", "one"), "--seed", "adiff fit --help")
    refused(adiff_here("fit", "deco"), "DATA", "adiff fit --help")
    refused(adiff_here("detcet"), "detcet", "adiff --help")


@pytest.mark.slow
def test_bad_input_in_a_real_process(data, run, tmp_path):
    cases = bad_inputs(data, run, tmp_path)
    for name in ("unknown category", "malicious checkpoint"):
        arguments, words = cases[name]
        command = [Path(sys.executable).with_name("adiff"), *map(str, arguments)]
        refused(subprocess.run(command, capture_output=True, text=True), *words)
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_mask_of_another_size(data, run, tmp_path):
    bad_inputs(data, run, tmp_path)
    assert adiff(*fit_arguments(tmp_path / "small_mask", tmp_path / "out")).returncode == 0
    refused(adiff("evaluate", tmp_path / "out"), "000_mask.png")
    assert not (tmp_path / "out" / "metrics.json").exists()
