"""Evaluation and detection in bounded memory: the same numbers, for long sounds too, and nothing left behind."""
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from PIL import Image

import adiff.runs.evaluate as evaluation
from adiff import AnomalyDetector
from adiff.core import InputError
from adiff.data import images
from adiff.data.demo_images import make_demo_data
from adiff.data.reading import read_dataset
from adiff.data.sounds import LogMel
from adiff.detector.pipeline import stream_rows
from adiff.runs.detect import detect_files
from adiff.runs.evaluate import detect_rows, evaluate
from adiff.runs.fit import fit
from adiff.scores import metrics, pixel_counts

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
TINY = {"codec": {"levels": 2}, "discrepancy": {"kind": "deviation", "levels": ["pixel", "latent"]},
        "data": {"image_size": 32},
        "training": {"length": 6, "batch_size": 4, "augmentations": []}}


@pytest.fixture(scope="module")
def cup(tmp_path_factory):
    "A finished run on images of a cup, not yet evaluated."
    folder = tmp_path_factory.mktemp("cup")
    data = make_demo_data(folder / "demo", categories=("cup",), train=6, good=3, per_defect=2)
    fit("deco", data, folder / "run", device="cpu", overrides=TINY)
    return folder


@pytest.fixture(scope="module")
def hums(tmp_path_factory):
    "A finished run on hums whose test sounds have 1 to 5 windows, a burst somewhere in the anomalous ones."
    folder, generator = tmp_path_factory.mktemp("hums"), np.random.default_rng(0)
    for path, count, seconds in (("train/good", 6, [4]), ("test/good", 4, [4, 9, 12, 5]),
                                 ("test/burst", 6, [12, 3, 8, 7, 11, 6])):
        (folder / "data/hum" / path).mkdir(parents=True)
        for index in range(count):
            duration = seconds[index % len(seconds)]
            hum = 0.1 * np.sin(np.arange(duration * 16000) / 20) + generator.normal(0, 0.01, duration * 16000)
            if path == "test/burst":
                start = generator.integers(0, len(hum) - 3000)
                hum[start:start + 3000] += generator.normal(0, 0.3, 3000)
            soundfile.write(folder / "data/hum" / path / f"{index:03d}.wav", hum.clip(-1, 1), 16000)
    fit("one-class-svm", folder / "data", folder / "run", device="cpu")
    return folder


# ---- evaluate

def test_metrics_from_files_are_those_from_memory(cup, monkeypatch):
    monkeypatch.setattr(metrics, "_held", 3000)  # many ranges
    monkeypatch.setattr(evaluation, "draw_figures", lambda *_: None)
    (cup / "run/.evaluating/maps").mkdir(parents=True)  # left by a killed process
    found = evaluate(cup / "run", device="cpu", batch_size=4)
    assert not (cup / "run/.evaluating").exists()
    monkeypatch.undo()

    dataset, detector = read_dataset(cup / "demo"), AnomalyDetector.from_pretrained(cup / "run/model")
    rows = dataset.select("test")
    out = detector([dataset.root / path for path in rows.path], batch_size=4)
    masks = np.stack([dataset.mask(row, detector.processor) for row in rows.itertuples()])
    wanted = {**metrics.image_metrics(rows.label, out.scores), **metrics.pixel_metrics(masks, out.maps)}
    for name, value in wanted.items():
        assert name == "notes" or found["mean"][name] == pytest.approx(value, abs=1e-6)
    share = f"a constant map would have pixel AP {masks.mean():.3f}"
    assert any(share in note for note in found["notes"])
    levels = pd.read_csv(cup / "run/discrepancies.csv", index_col="discrepancy")
    assert set(levels.index) == {"pixel", "latent", "pixel x latent", "pixel + latent", "final map"}
    for name, one in out.discrepancies.items():
        assert levels.pixel_ap[name] == pytest.approx(metrics.pixel_metrics(masks, one)["pixel_ap"], abs=1e-6)
    with np.load(cup / "run/pixels/cup.npz") as file:
        counts = pixel_counts.PixelCounts(**file)
    assert ((counts.normal + counts.anomalous).sum(1) == masks[0].size).all()
    assert (counts.anomalous.sum(1) == masks.sum((1, 2))).all()
    wanted = {name: found["mean"][name] for name in metrics.METRIC_NAMES[3:]}
    assert pixel_counts.counted_metrics(counts) == pytest.approx(wanted, abs=1e-3)


def test_an_error_leaves_no_maps_behind(cup, monkeypatch):
    monkeypatch.setattr(evaluation, "category_metrics", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(cup / "run", device="cpu")
    assert not (cup / "run/.evaluating").exists()
    monkeypatch.setattr(evaluation.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(InputError, match="needs 0.0 GB") as error:
        evaluate(cup / "run", device="cpu")
    assert "\n" not in str(error.value) and not (cup / "run/.evaluating").exists()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_the_highest_window_is_found_across_batches(hums, batch_size):
    dataset, detector = read_dataset(hums / "data"), AnomalyDetector.from_pretrained(hums / "run/model")
    rows = dataset.select("test")
    paths = [dataset.root / path for path in rows.path]
    whole = detector(paths)
    maps, _ = detect_rows(detector, dataset, rows, batch_size)
    assert maps["anomaly"].shape == whole.maps.shape and np.allclose(maps["anomaly"], whole.maps, rtol=0, atol=1e-6)
    windows = [one.start for one in stream_rows(detector, dataset, rows, "testing", batch_size)]
    shown = torch.stack([detector.processor.load(path, window) for path, window in zip(paths, windows)])
    assert np.allclose(detector(shown).scores, whole.scores, rtol=0, atol=1e-6) and len({*windows}) > 3


def test_evaluation_of_long_sounds(hums):
    found = evaluate(hums / "run", device="cpu", batch_size=3)
    scores = pd.read_csv(hums / "run/scores.csv")
    detector = AnomalyDetector.from_pretrained(hums / "run/model")
    assert np.allclose(detector([hums / "data" / path for path in scores.path]).scores, scores.score, rtol=1e-6)
    assert found["mean"]["n_test"] == 10 and found["mean"]["pixel_ap"] is None


# ---- detect

@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_detection_does_not_depend_on_batches(hums, tmp_path, batch_size):
    folder = tmp_path / "sounds"
    folder.mkdir()
    for path in sorted((hums / "data/hum/test/burst").iterdir()):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "000_text.wav").write_text("not a sound")
    table = detect_files(hums / "run/model", [folder], tmp_path / "out", device="cpu", batch_size=batch_size)
    assert table.path.tolist() == [str(path) for path in sorted(folder.iterdir())]
    assert (table.error != "").tolist() == [False, True] + [False] * 5
    good = table[table.error == ""]
    detector = AnomalyDetector.from_pretrained(hums / "run/model")
    assert np.allclose(detector(good.path.tolist()).scores, good.score.astype(float), rtol=1e-6)
    windows = pd.read_csv(tmp_path / "out/windows.csv")
    starts = [detector.processor.windows(path) for path in good.path]
    assert windows.start.tolist() == pytest.approx(sum(starts, [])) and windows.path.tolist() == sum(
        ([path] * len(own) for path, own in zip(good.path, starts)), [])
    assert np.allclose(windows.groupby("path").score.max(), good.score.astype(float))
    assert all((tmp_path / "out" / overlay).exists() for overlay in good.overlay)


def test_a_sound_that_breaks_off_half_way_has_an_error_and_no_windows(hums, tmp_path, monkeypatch):
    whole, load = hums / "data/hum/test/good/001.wav", LogMel.load

    def breaks(self, source, window=0.0):
        if source.name == "broken.wav" and window > 3:
            raise InputError(f"{source}: breaks off")
        return load(self, source, window)

    monkeypatch.setattr(LogMel, "load", breaks)
    for name in ("broken.wav", "whole.wav"):
        (tmp_path / name).write_bytes(whole.read_bytes())
    table = detect_files(hums / "run/model", [tmp_path / "broken.wav", tmp_path / "whole.wav"], tmp_path / "out",
                         device="cpu", batch_size=2)
    assert table.error.str.contains("breaks off").tolist() == [True, False]
    assert table.overlay[0] == "" and table.score.notna().tolist() == [False, True]
    assert set(pd.read_csv(tmp_path / "out/windows.csv").path) == {str(tmp_path / "whole.wav")}
    with pytest.raises(InputError, match="breaks off"):
        detect_files(hums / "run/model", [tmp_path / "broken.wav"], tmp_path / "none", device="cpu", batch_size=2)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("seconds, shared", [(3, 1), (4, 1), (9.3, 1), (128, 1), (129, 2), (3 * 3600, 85)])
def test_a_picture_of_any_length(seconds, shared):
    processor = LogMel()
    starts = processor.windows((np.broadcast_to(np.float32(0), int(seconds * 16000)), 16000))
    canvas, events = processor.canvas("a sound", starts), (0, len(starts) // 2, len(starts) - 1)
    for index, start in enumerate(starts):
        tensor = torch.zeros(1, 128, 128)
        tensor[0, 5, 77] = index in events  # one column of thousands
        canvas.add(start, tensor, tensor[0] - 1)
    assert canvas.shared == shared and canvas.map.shape[1] <= 4096 and np.isfinite(canvas.map).all()
    places = sorted({(round(32 * starts[index]) + 77) // shared for index in events})
    assert np.flatnonzero(canvas.spectrogram[5]).tolist() == places == np.flatnonzero(canvas.map[5] == 0).tolist()


MEMORY = """
import resource, sys
from pathlib import Path
from adiff.runs.detect import detect_files

def peak(name):
    detect_files(sys.argv[1], [Path(sys.argv[2]) / name], Path(sys.argv[2]) / "out", device="cpu")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

short = peak("short.wav")
print(peak("long.wav") - short)
"""


def test_the_memory_for_a_recording_does_not_grow_with_its_length(hums, tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 150 * 16000)
    soundfile.write(tmp_path / "short.wav", noise, 16000)
    soundfile.write(tmp_path / "long.wav", np.tile(noise, 8), 16000)  # 600 windows, whose pictures and maps are 79 MB
    command = [sys.executable, "-c", MEMORY, hums / "run/model", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 25 and len(pd.read_csv(tmp_path / "out/windows.csv")) > 590


def test_images_are_drawn_at_their_own_size_whatever_the_batch(cup, tmp_path, monkeypatch):
    sizes = [(80, 60), (64, 64), (50, 90), (40, 40), (120, 30)]
    (tmp_path / "photos").mkdir()
    for number, size in enumerate(sizes):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (*size[::-1], 3),
                                                               np.uint8)).save(tmp_path / "photos" / f"{number}.png")
    read, read_image = [], images.read_image

    def counted(source):
        read.extend([source] * (not isinstance(source, Image.Image)))
        return read_image(source)

    monkeypatch.setattr(images, "read_image", counted)
    tables = [detect_files(cup / "run/model", [tmp_path / "photos"], tmp_path / f"out{size}", device="cpu",
                           batch_size=size) for size in (1, 2, 16)]
    assert len(read) == 3 * len(sizes)  # once each
    for table in tables:
        assert [Image.open(tmp_path / "out1" / name).size for name in table.overlay] == sizes
        assert np.allclose(table.score.astype(float), tables[0].score.astype(float), atol=1e-5)
