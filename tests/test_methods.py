"""Every method, from a folder of images or sounds to metrics, and back from its saved folder; ADiff's own promises."""
import json

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from adiff import AnomalyDetector, InputError, evaluate, fit
from adiff.data.reading import read_dataset
from adiff.data.demo_images import make_demo_data
from adiff.data.demo_sounds import make_demo_sounds
from adiff.runs.detect import detect_files
from adiff.methods.registry import METHODS, resolve_config
from adiff.runs.each_category import run_each

pytestmark = pytest.mark.slow

MOMENT = {"training": {"length": 4, "batch_size": 4, "augmentations": [], "validate_every": 4, "checkpoint_every": 4}}
MANY_STEPS = {"deco", "adiff", "ddpm", "ddpm-simplex", "autoencoder", "dense-autoencoder"}
SOUNDS_ONLY = {"dense-autoencoder", "one-class-svm", "isolation-forest"}


@pytest.fixture(autouse=True)
def few_figures(request, monkeypatch):
    "Drawing takes longer than what is tested here, so the figures of one test are enough."
    if request.node.originalname != "test_every_method_on_sounds":
        monkeypatch.setattr("adiff.runs.evaluate.draw_figures", lambda *_: None)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "demo"
    return make_demo_data(folder, categories=("brick", "cup"), train=8, good=3, per_defect=1)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    return make_demo_sounds(tmp_path_factory.mktemp("sounds") / "demo", train=8, good=3, per_fault=1)


def overrides(method):
    small = {"knn": {"memory_size": 50}, "padim": {"kept_channels": 8}}
    return MOMENT if method in MANY_STEPS else {"discrepancy": small[method]} if method in small else {}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_on_sounds(sounds, tmp_path, method):
    detector = fit(method, sounds, tmp_path / "run", device="cpu", overrides=overrides(method))
    metrics = evaluate(tmp_path / "run", device="cpu")
    assert metrics["kind"] == "sound" and metrics["mean"]["pixel_ap"] is None
    assert 0 <= metrics["mean"]["image_auroc"] <= 1
    assert any("log-mel" in note for note in metrics["notes"])
    files = sorted((sounds / "pump/test/knock").iterdir())
    again = AnomalyDetector.from_pretrained(tmp_path / "run/model")
    assert np.allclose(detector(files).scores, again(files).scores, rtol=1e-4, atol=1e-5)
    assert {"config.json", "metrics.json", "scores.csv", "log.jsonl", "figures",
            "model"} <= {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("method", sorted(set(METHODS) - SOUNDS_ONLY - {"deco"}))
def test_every_method_on_images(images, tmp_path, method):
    detector = fit(method, images, tmp_path / "run", categories="cup", device="cpu", overrides=overrides(method))
    metrics = evaluate(tmp_path / "run", device="cpu", save_maps=True)
    assert 0 <= metrics["mean"]["pixel_ap"] <= 1 and metrics["mean"]["aupro"] is not None
    assert len(list((tmp_path / "run/maps").rglob("*.tiff"))) == metrics["mean"]["n_test"]
    image = images / "cup/test/hole/000.png"
    again = AnomalyDetector.from_pretrained(tmp_path / "run/model")
    assert np.allclose(detector(image).maps, again(image).maps, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", sorted(SOUNDS_ONLY))
def test_methods_for_sounds_refuse_images(images, tmp_path, method):
    with pytest.raises(InputError, match="is for sounds"):
        fit(method, images, tmp_path / "run", categories="cup", device="cpu")


@pytest.fixture(scope="module")
def adiff_on_sounds(sounds, tmp_path_factory):
    return fit("adiff", sounds, tmp_path_factory.mktemp("adiff") / "run", device="cpu", overrides=MOMENT)


def test_the_same_seed_gives_the_same_adiff(sounds, adiff_on_sounds, tmp_path):
    first, again = adiff_on_sounds, fit("adiff", sounds, tmp_path / "run", device="cpu", overrides=MOMENT)
    pairs = zip(first.network.state_dict().values(), again.network.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)
    assert first.config.calibration == again.config.calibration


def test_scores_do_not_depend_on_the_batch(sounds, adiff_on_sounds):
    detector = adiff_on_sounds
    files = sorted((sounds / "pump/test").rglob("*.wav"))[:5]
    together, alone = detector(files).scores, [detector(file).scores[0] for file in files]
    assert np.allclose(together, alone, rtol=1e-3, atol=1e-4)


def test_normalisation_and_threshold_come_from_held_out_normals(images, tmp_path):
    "Test images may vanish or change without moving a single learned number."
    fitted = []
    for name in ("a", "b"):
        data = make_demo_data(tmp_path / name / "demo", categories=("cup",), train=8, good=3 if name == "a" else 1,
                              per_defect=1)
        fitted.append(fit("adiff", data, tmp_path / name / "run", device="cpu", overrides=MOMENT))
    a, b = (one.discrepancy for one in fitted)
    assert torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std) and (a.std != 1).all()
    assert fitted[0].config.calibration == fitted[1].config.calibration


@pytest.mark.parametrize("sections", [
    {"discrepancy": {"semantic_weight": 0.0}}, {"forward": {"prediction_type": "epsilon", "min_snr_gamma": 5.0}},
    {"forward": {"beta_schedule": "squaredcos_cap_v2"}}, {"discrepancy": {"top_share": 0.01}},
    {"codec": {"wavelet": "db2"}, "forward": {"noise": "simplex"}}])
def test_adiff_switches(sounds, tmp_path, sections):
    fit("adiff", sounds, tmp_path / "run", device="cpu", overrides={**MOMENT, **sections})
    assert evaluate(tmp_path / "run", device="cpu")["mean"]["image_auroc"] is not None


def test_deco_diff_with_visual_features(images, tmp_path):
    fit("deco", images, tmp_path / "run", categories="cup", device="cpu",
        overrides={**MOMENT, "data": {"image_size": 64},
                   "discrepancy": {"kind": "deviation", "levels": ["pixel", "latent", "feature"]}})
    evaluate(tmp_path / "run", device="cpu")
    measured = set(pd.read_csv(tmp_path / "run/discrepancies.csv").discrepancy)
    assert {"pixel", "latent", "feature", "pixel x feature", "latent + feature", "pixel x latent x feature"} <= measured


def test_presets_are_complete_configurations():
    for method, parts in METHODS.items():
        for preset in parts.presets:
            assert resolve_config(method, preset, kind=parts.files[0]).seed == 0


# ---- one detector per category

def test_one_detector_per_category(images, tmp_path):
    metrics = run_each("padim", images, tmp_path / "runs", device="cpu", overrides=overrides("padim"))
    assert set(metrics["categories"]) == {"brick", "cup"} and metrics["mean"]["n_test"] == 18
    single = json.loads((tmp_path / "runs/cup/metrics.json").read_text())
    assert single["categories"]["cup"] == metrics["categories"]["cup"]
    again = run_each("padim", images, tmp_path / "runs", device="cpu", overrides=overrides("padim"), resume=True)
    assert again["categories"] == metrics["categories"]


@pytest.fixture(scope="module")
def urban(urban_tree, tmp_path_factory):
    return urban_tree(tmp_path_factory.mktemp("urban") / "urbansound8k")


def test_one_vs_rest(urban, tmp_path):
    with pytest.raises(InputError, match="its own adiff detector"):
        fit("adiff", urban, tmp_path / "joint", categories="dog_bark,siren", device="cpu", overrides=MOMENT)
    assert not (tmp_path / "joint").exists()
    metrics = run_each("one-class-svm", urban, tmp_path / "runs", categories="dog_bark,siren", device="cpu")
    assert metrics["mean"]["n_test"] == 16
    assert set(metrics["harmonic_mean"]) == {"image_auroc", "image_ap", "image_pauc"}
    # DeCo-Diff is told the category
    fit("deco", urban, tmp_path / "deco", categories="dog_bark,siren", device="cpu", overrides=MOMENT)
    assert evaluate(tmp_path / "deco", device="cpu")["mean"]["n_test"] == 16


# ---- sounds of any length, and bad ones

def test_long_recordings_are_scored_in_windows(sounds, tmp_path):
    generator = np.random.default_rng(0)
    plain = np.concatenate([soundfile.read(file)[0] for file in sorted((sounds / "pump/train/good").iterdir())[:3]])
    soundfile.write(tmp_path / "quiet.wav", plain, 16000)
    plain[7 * 16000:7 * 16000 + 4000] += 0.5 * generator.normal(size=4000)
    soundfile.write(tmp_path / "burst.wav", plain, 16000)
    fit("one-class-svm", sounds, tmp_path / "run", device="cpu")
    sources = [tmp_path / "quiet.wav", tmp_path / "burst.wav"]
    table = detect_files(tmp_path / "run/model", sources, tmp_path / "out", device="cpu")
    windows = pd.read_csv(tmp_path / "out/windows.csv")
    burst = windows[windows.path.str.contains("burst")]
    assert burst.start.tolist() == [0, 2, 4, 6, 8] and table.score[1] > table.score[0]
    highest = burst.loc[burst.score.idxmax()]
    assert highest.start <= 7 < highest.end and (tmp_path / "out/overlays/burst.wav_overlay.png").exists()
    folder = tmp_path / "long"
    folder.mkdir()
    soundfile.write(folder / "hour.wav", plain, 16000)  # a plain folder with one long recording is enough to train
    fit("adiff", folder, tmp_path / "plain", device="cpu", overrides=MOMENT)
    assert AnomalyDetector.from_pretrained(tmp_path / "plain/model")(tmp_path / "burst.wav").scores.shape == (1,)


def test_broken_sounds_are_listed_and_the_rest_goes_on(sounds, tmp_path):
    fit("isolation-forest", sounds, tmp_path / "run", device="cpu")
    folder = tmp_path / "new"
    folder.mkdir()
    hum = 0.1 * np.sin(np.arange(64000) / 20)
    for name, values, rate in (("silent", np.zeros(64000), 16000), ("clipped", np.clip(50 * hum, -1, 1), 16000),
                               ("eight_channels", np.repeat(hum[:, None], 8, 1), 16000), ("8_khz", hum[:32000], 8000)):
        soundfile.write(folder / f"{name}.wav", values, rate)
    with_nan = np.where(np.arange(64000) == 99, np.nan, hum).astype(np.float32)
    soundfile.write(folder / "nan.wav", with_nan, 16000, subtype="FLOAT")
    soundfile.write(folder / "zero_length.wav", np.zeros(0), 16000)
    (folder / "truncated.wav").write_bytes((folder / "clipped.wav").read_bytes()[:1000])
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("not a sound")
    table = detect_files(tmp_path / "run/model", [folder], tmp_path / "out", device="cpu").set_index(
        pd.Index([path.stem for path in sorted(folder.iterdir())]))
    bad = ["empty", "nan", "text", "truncated", "zero_length"]
    assert table.index[table.error != ""].tolist() == bad
    assert table.score.isna().tolist() == (table.error != "").tolist()
    for name in bad:
        assert f"{name}.wav" in table.error[name] and "\n" not in table.error[name]
    with pytest.raises(InputError, match="empty.wav"):
        fit("isolation-forest", folder, tmp_path / "bad", device="cpu")
    assert not (tmp_path / "bad/model").exists()


def test_images_and_sounds_are_not_mixed_up(sounds, images, tmp_path):
    fit("isolation-forest", sounds, tmp_path / "run", device="cpu")
    with pytest.raises(InputError, match="no sound"):
        detect_files(tmp_path / "run/model", [images], tmp_path / "out", device="cpu")
    assert read_dataset(sounds).kind == "sound" and read_dataset(images).kind == "image"
