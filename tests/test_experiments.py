"""The experiment notebooks, as papermill runs them; training that is killed, and training on very many images."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import papermill
import pandas as pd
import pytest
import torch

import adiff.runs.fit
import adiff.training.train
from adiff import AnomalyDetector
from adiff.scores.reconstruction import ReconstructionErrorDiscrepancy
from adiff.codecs.autoencoders import KLCodec
from adiff.core import InputError
from adiff.data.images import ImageProcessor
from adiff.data.reading import read_dataset
from adiff.data.demo_images import make_demo_data
from adiff.data.demo_sounds import make_demo_sounds
from adiff.runs.evaluate import evaluate
from adiff.runs.fit import fit
from adiff.training.held_out import normal_latents
from adiff.training.latents import LatentCache, TrainingLatents
from adiff.training.train import TrainingConfig

pytestmark = pytest.mark.slow

OVERRIDES = {"codec": {"levels": 2}, "data": {"image_size": 32}, "discrepancy": {"kind": "deviation"},
             "training": {"length": 6, "batch_size": 4, "augmentations": []}}


def execute(repository, folder, name="deco_image", **parameters):
    output = folder / "out.ipynb"
    notebook = repository / f"nbs/experiments/{name}.ipynb"
    papermill.execute_notebook(notebook, output, parameters=parameters, progress_bar=False)
    return json.loads(output.read_text())


def pictures(notebook, kind="image/png"):
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return [output for output in outputs if kind in output.get("data", {})]


@pytest.mark.parametrize("name", ["deco_image", "adiff_image", "adiff_audio"])
def test_parameters_are_the_documented_ones(repository, name):
    known = papermill.inspect_notebook(repository / f"nbs/experiments/{name}.ipynb")
    assert set(known) == {"data_root", "categories", "preset", "out_dir", "seed", "device", "overrides", "resume",
                          "processes"}
    assert all(one["help"] for one in known.values())


def test_notebook_end_to_end(repository, tmp_path):
    data = make_demo_data(tmp_path / "demo", categories=("brick", "cup"), train=6, good=2, per_defect=1)
    notebook = execute(repository, tmp_path, data_root=str(data), categories="brick,cup", out_dir=str(tmp_path / "run"),
                       device="cpu", overrides=json.dumps(OVERRIDES))
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert set(metrics["categories"]) == {"brick", "cup"} and metrics["mean"]["n_test"] == 16
    assert any("class label" in note for note in metrics["notes"])
    assert "figures/cases_cup.png" in (tmp_path / "run/report.html").read_text()
    assert len(pictures(notebook)) >= 6


MOMENT = json.dumps({"training": {"length": 4, "batch_size": 4, "augmentations": []}})


def test_adiff_on_images(repository, tmp_path):
    data = make_demo_data(tmp_path / "demo", categories=("brick", "cup"), train=6, good=2, per_defect=1)
    notebook = execute(repository, tmp_path, "adiff_image", data_root=str(data), out_dir=str(tmp_path / "runs"),
                       device="cpu", overrides=MOMENT)
    assert set(json.loads((tmp_path / "runs/metrics.json").read_text())["categories"]) == {"brick", "cup"}
    assert (tmp_path / "runs/brick/report.html").exists() and len(pictures(notebook)) >= 6


def test_adiff_on_sounds(repository, tmp_path):
    data = make_demo_sounds(tmp_path / "demo", train=6, good=2, per_fault=1)
    notebook = execute(repository, tmp_path, "adiff_audio", data_root=str(data), out_dir=str(tmp_path / "run"),
                       device="cpu", overrides=MOMENT)
    assert json.loads((tmp_path / "run/metrics.json").read_text())["kind"] == "sound"
    players = [output for output in pictures(notebook, "text/html") if "<audio" in "".join(output["data"]["text/html"])]
    assert len(players) == 3 and len(pictures(notebook)) >= 4


@pytest.mark.parametrize("parameters, words", [({"data_rot": "x"}, ["data_rot", "data_root"]),
                                               ({"overrides": '{"codek": {"kind": "taef2"}}'}, ["codek", "codec"])])
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
    training = {**OVERRIDES["training"], "mixed_precision": "bf16", "ema_decay": 0.9, "gradient_accumulation_steps": 2}
    detector = fit("deco", data, tmp_path / "run", device="cpu", overrides={**OVERRIDES, "training": training})
    image = data / "cup/test/hole/000.png"
    reloaded = AnomalyDetector.from_pretrained(tmp_path / "run/model")
    assert abs(detector(image).maps - reloaded(image).maps).max() < 1e-5


# ---- latents: read ahead, encoded when first needed, kept in a file


@pytest.fixture
def read_files(monkeypatch):
    "Paths of the images that have been read, in order."
    read, load = [], ImageProcessor.load
    monkeypatch.setattr(ImageProcessor, "load",
                        lambda self, source, window=0: read.append(source) or load(self, source, window))
    return read


@pytest.fixture(scope="module")
def cup(tmp_path_factory):
    return make_demo_data(tmp_path_factory.mktemp("data") / "demo", categories=("cup",), train=10, good=2, per_defect=1)


def kl_detector(dataset):
    "A detector whose codec convolves, and has a posterior to draw from."
    torch.manual_seed(0)
    codec = KLCodec(dict(block_out_channels=[16, 16, 32, 32], norm_num_groups=4, layers_per_block=1,
                         down_block_types=["DownEncoderBlock2D"] * 4,
                         up_block_types=["UpDecoderBlock2D"] * 4)).eval()
    return AnomalyDetector(codec, None, None, None, ReconstructionErrorDiscrepancy(), categories=dataset.categories,
                           image_size=64)


def test_a_latent_does_not_depend_on_its_neighbours_nor_on_the_cache(cup, tmp_path, read_files):
    dataset = read_dataset(cup)
    rows, detector = dataset.select("train"), kl_detector(dataset)
    augmentations = ["translate", "rotate180"]

    def drawn(latents, *batches):
        torch.manual_seed(3)
        return [latents(torch.tensor(batch))[0] for batch in batches]

    batches = ([0, 1, 2, 3], [2, 8], [5], [3, 2, 1, 0, 0, 0])
    folder = tmp_path / "kept"
    uncached = drawn(TrainingLatents(detector, dataset, rows, augmentations, cache=False), *batches)
    cached = drawn(latents := TrainingLatents(detector, dataset, rows, augmentations, folder=folder), *batches)
    assert all(map(torch.equal, uncached, cached))
    assert latents.cache.shape == (2, 4, 8, 8) and latents.cache.there.shape == (4 * 9,)

    read_files.clear()
    again = TrainingLatents(detector, dataset, rows, augmentations, folder=folder)
    assert all(map(torch.equal, drawn(again, *batches), cached)) and not read_files

    other = TrainingLatents(detector, dataset, rows, augmentations, folder=tmp_path / "other")
    drawn(other, *([index] for index in range(9) for _ in range(40)))  # one by one, every version
    assert other.cache.there.all()
    entries = np.flatnonzero(latents.cache.there).tolist()
    assert torch.equal(other.cache.read(entries), latents.cache.read(entries))
    stream = other.stream((torch.tensor(batch), seed) for seed, batch in enumerate(batches))
    for seed, (batch, (z0, labels)) in enumerate(zip(batches, stream)):
        torch.manual_seed(seed)
        assert torch.equal(z0, other(torch.tensor(batch))[0]) and labels.tolist() == [0] * len(batch)


def test_a_cache_of_other_settings_or_a_torn_one_is_not_used(cup, tmp_path):
    dataset = read_dataset(cup)
    rows, detector = dataset.select("train"), kl_detector(dataset)

    def kept(**changes):
        options = {"detector": detector, "rows": rows, "augmentations": ["translate"], **changes}
        latents = TrainingLatents(dataset=dataset, folder=tmp_path, **options)
        found = sum(entry in latents.cache for entry in range(len(latents.cache.there)))
        for _ in range(12):
            latents(torch.arange(len(latents)))
        return found

    assert kept() == 0 and kept() == 18
    assert kept(rows=rows[1:]) == 0 and kept(augmentations=["rotate180"]) == 0
    detector.codec.shift += 1e-6
    assert kept(augmentations=["rotate180"]) == 0 and kept(augmentations=["rotate180"]) == 18
    os.utime(dataset.root / rows.path[0], (0, 0))
    assert kept(augmentations=["rotate180"]) == 0
    (tmp_path / "settings.json").write_text("{")
    assert kept(augmentations=["rotate180"]) == 0

    size = (tmp_path / "latents").stat().st_size
    os.truncate(tmp_path / "latents", size * 3 // 4 + 100)
    os.truncate(tmp_path / "latents", size)  # what a disk may hold after a power cut: the end of the file is missing
    assert kept(augmentations=["rotate180"]) == 13 and kept(augmentations=["rotate180"]) == 18
    os.truncate(tmp_path / "latents", 100)
    assert kept(augmentations=["rotate180"]) == 0


def test_temporary_caches_go_with_their_owner_and_a_full_disk_is_told(cup, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dataset = read_dataset(cup)
    latents = TrainingLatents(kl_detector(dataset), dataset, dataset.select("train"))
    latents(torch.arange(3))
    assert len(list(tmp_path.iterdir())) == 1
    del latents
    assert not list(tmp_path.iterdir())

    cache = LatentCache(tmp_path / "cache", 4, (2,), {})
    cache.path = "/dev/full"
    with pytest.raises(InputError, match="/dev/full: cannot be written .*cache_latents"):
        cache.write(1, torch.ones(2))
    assert 1 not in cache


TRAIN = {"codec": {"levels": 2}, "data": {"image_size": 32}, "discrepancy": {"kind": "deviation"},
         "training": {"length": 12, "batch_size": 3, "checkpoint_every": 4, "learning_rate": 1e-3}}
KILLED = """import sys, torch; from adiff.runs.fit import fit; torch.set_num_threads(1)
fit("deco", sys.argv[1], sys.argv[2], device="cpu", overrides=eval(sys.argv[3]))"""


@pytest.mark.usefixtures("one_thread")
def test_a_killed_training_ends_where_an_uninterrupted_one_does(cup, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", KILLED, cup, run, repr(TRAIN)], stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(run.glob("checkpoints/*")):
        time.sleep(0.01)
    time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert (run / ".latents/train_0/latents").exists() and not (run / "model").exists()
    shutil.copytree(run, tmp_path / "without", ignore=shutil.ignore_patterns(".latents", ".lock"))

    folders = [tmp_path / "uninterrupted", run, tmp_path / "without"]
    ends = [fit("deco", cup, folder, device="cpu", overrides=TRAIN, resume=True) for folder in folders]
    first = ends[0].network.state_dict()
    assert all(torch.equal(value, end.network.state_dict()[name]) for end in ends[1:] for name, value in first.items())
    assert ends[0].config.calibration == ends[1].config.calibration == ends[2].config.calibration
    assert not [folder for folder in folders if (folder / ".latents").exists()]


def test_a_hundred_thousand_images_are_not_read_at_start(cup, tmp_path, monkeypatch, read_files):
    dataset = read_dataset(cup)
    normals, held_out = dataset.select("train"), dataset.select("validation")
    many = normals.iloc[np.arange(100_000) % len(normals)]
    dataset = replace(dataset, samples=pd.concat([many, held_out], ignore_index=True))
    monkeypatch.setattr(adiff.runs.fit, "read_dataset", lambda *arguments: dataset)
    monkeypatch.setattr(type(dataset), "fingerprint", lambda self: "0")
    at_update, caches, run = [], [], tmp_path / "run"

    def watched(*arguments):
        at_update.append(len(read_files))
        caches.append((run / ".latents/train_0/latents").stat())
        return losses(*arguments)

    losses = adiff.training.train.denoising_losses
    monkeypatch.setattr(adiff.training.train, "denoising_losses", watched)
    training = {**OVERRIDES["training"], "length": 3}
    fit("deco", cup, run, device="cpu", overrides={**OVERRIDES, "training": training})
    batch = training["batch_size"]
    assert at_update[0] <= 1000 + 3 * batch + len(held_out) and len(read_files) <= 1200 + 3 * batch + 5 * len(held_out)
    apparent, used = caches[2].st_size, 512 * caches[2].st_blocks
    assert apparent > 100_000 * 4 * 48 * 8 * 8 and used < 2**20
    assert not any(thread.name.startswith("read_ahead") for thread in threading.enumerate())


def test_a_discrepancy_that_learns_nothing_reads_nothing(cup, read_files):
    dataset = read_dataset(cup)
    latents = normal_latents(kl_detector(dataset), dataset, dataset.select("train"))
    ReconstructionErrorDiscrepancy().fit(latents)
    assert not read_files and len(torch.cat([z for z, _ in latents])) == 9 == len(read_files)


# ---- trackers

@pytest.mark.usefixtures("one_thread")
def test_curves_in_tensorboard(cup, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    training = {**OVERRIDES["training"], "length": 12, "validate_every": 5, "log_with": "tensorboard"}
    fit("deco", cup, tmp_path / "run", device="cpu", overrides={**OVERRIDES, "training": training})
    log = pd.read_json(tmp_path / "run/log.jsonl", lines=True)
    events = event_accumulator.EventAccumulator(str(tmp_path / "run/logs/adiff")).Reload()
    for name in ("loss", "lr", "validation_loss"):
        wanted = log[["step", name]].dropna()
        seen = events.Scalars(name)
        assert [one.step for one in seen] == wanted.step.tolist()
        assert np.allclose([one.value for one in seen], wanted[name], rtol=1e-5)


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_written(cup, tmp_path, monkeypatch):
    monkeypatch.setattr("adiff.training.logs.find_spec", lambda name: None if name == "wandb" else True)
    training = {"length": 1, "log_with": ["tensorboard", "wandb"]}
    with pytest.raises(InputError, match="wandb is not installed; pip install wandb") as error:
        fit("deco", cup, tmp_path / "run", device="cpu", overrides={**OVERRIDES, "training": training})
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    assert TrainingConfig(log_with="tensorboard").trackers == ["tensorboard"] and TrainingConfig().trackers == []
