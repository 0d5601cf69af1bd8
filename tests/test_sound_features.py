"""Frozen features of sounds: golden values of EfficientAT mn04, its weights, and detectors that use them."""
import json
import time

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from adiff import AnomalyDetector, evaluate, fit
from adiff.codecs import sound_features
from adiff.codecs.load import load_codec
from adiff.codecs.sound_features import SoundFeatureCodec
from adiff.core import InputError
from adiff.data.audioset_pictures import AudioSetPicture, audioset_levels, bands_of_picture, picture_of_bands
from adiff.methods.configuration import make_codec
from adiff.methods.registry import resolve_config

NAME = "efficientat-mn04"


@pytest.fixture(scope="module")
def weights(shared):
    file = shared / "weights" / NAME / "mn04_as.safetensors"
    if not file.is_file():
        pytest.skip("needs the weights of EfficientAT mn04 in the shared folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADIFF_WEIGHTS", str(shared / "weights"))
        yield file


@pytest.fixture(scope="module")
def golden(shared):
    file = shared / "golden" / "efficientat" / "golden.safetensors"
    if not file.is_file():
        pytest.skip("needs the golden values of EfficientAT mn04 in the shared folder")
    return load_file(file)


def relative(found, expected):
    "The largest difference in units of the largest value."
    return float((found - expected).abs().max() / expected.float().abs().max())


# ---- golden values

def test_the_front_end(golden):
    assert (audioset_levels(golden["waveform"]) - golden["log_mel"]).abs().max() < 1e-3
    pictures = AudioSetPicture(2.0).tensor(golden["waveform"])
    assert pictures.shape == (3, 1, 200, 200)
    assert (bands_of_picture(pictures)[:, 0] - golden["log_mel"]).abs().max() < 1e-3


def test_the_network(golden, weights):
    codec = load_codec("sound-features")
    pictures = picture_of_bands(golden["log_mel"])[:, None]
    maps, embedding = codec.maps(pictures), codec.embedding(pictures)
    for depth in (2, 4, 6, 10, 13, 15, 16):
        assert relative(maps[depth], golden[f"features_{depth}"]) < 2e-3, depth
    assert relative(embedding, golden["embedding"]) < 1e-4
    state = load_file(weights)
    hidden = F.hardswish(F.linear(embedding, state["classifier.2.weight"], state["classifier.2.bias"]))
    logits = F.linear(hidden, state["classifier.5.weight"], state["classifier.5.bias"])
    assert relative(logits, golden["logits"]) < 1e-4


def test_from_the_waveform_to_the_embedding(golden, weights):
    pictures = AudioSetPicture(2.0).tensor(golden["waveform"])
    assert relative(load_codec("sound-features").embedding(pictures), golden["embedding"]) < 1e-3


# ---- latents

def test_maps_lie_where_the_picture_has_them():
    torch.manual_seed(0)
    codec = SoundFeatureCodec((2,)).eval()
    quiet = torch.full((1, 1, 400, 400), -1.4)
    for rows, columns in ((slice(0, 50), slice(0, 50)), (slice(350, 400), slice(200, 250))):
        loud = quiet.clone()
        loud[..., rows, columns] = 1
        changed = (codec.encode(loud) - codec.encode(quiet)).abs().sum(1)[0]  # 32 rows of 12.5, 100 columns of 4
        row, column = np.unravel_index(int(changed.argmax()), changed.shape)
        assert rows.start - 26 < 12.5 * row < rows.stop + 26 and columns.start - 9 < 4 * column < columns.stop + 9


def test_one_pass_gives_maps_and_embedding():
    torch.manual_seed(0)
    codec, pictures = SoundFeatureCodec((4, 17)).eval(), torch.rand(2, 1, 250, 250)
    z = codec.encode(pictures)
    assert z.shape == (2, *codec.latent_shape(250, 250)) == (2, 16 + 384, 16, 32)
    embedding = codec.embedding(pictures)[:, :, None, None].expand(-1, -1, 16, 32)
    torch.testing.assert_close(z[:, 16:], embedding, rtol=1e-4, atol=0)
    assert torch.equal(z[:, :16], codec.maps(pictures)[4].flip(-2))
    alone = SoundFeatureCodec((17,)).eval()
    assert alone.latent_shape(250, 250) == (384, 1, 1) == tuple(alone.encode(pictures).shape[1:])


def test_a_neighborhood_is_averaged():
    torch.manual_seed(0)
    codec = SoundFeatureCodec((4,), neighborhood=3).eval()
    one = codec.maps(pictures := torch.rand(1, 1, 200, 200))[4].flip(-2)
    z = codec.encode(pictures)
    assert torch.allclose(z[0, :, 5, 7], one[0, :, 4:7, 6:9].mean((1, 2)), atol=1e-5)
    assert torch.allclose(z[0, :, 0, 0], one[0, :, :2, :2].mean((1, 2)), atol=1e-5)


# ---- weights

def test_other_weights_are_refused(weights, tmp_path, monkeypatch):
    state = load_file(weights)
    state["features.0.0.weight"] = state["features.0.0.weight"] + 1e-6
    (tmp_path / NAME).mkdir()
    monkeypatch.setenv("ADIFF_WEIGHTS", str(tmp_path))
    with pytest.raises(InputError, match="no usable weights"):
        load_codec("sound-features")
    for content in (state, {"features.0.0.weight": torch.zeros(8, 1, 3, 3)}):
        save_file(content, tmp_path / NAME / "mn04_as.safetensors")
        with pytest.raises(InputError, match="SHA-256"):
            load_codec("sound-features")
    (tmp_path / NAME / "mn04_as.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="no usable weights"):
        load_codec("sound-features")


def test_the_release_is_read_from_torchs_cache(weights, tmp_path, monkeypatch):
    "What the author's release holds under the same names; a file that would execute something is refused."
    monkeypatch.delenv("ADIFF_WEIGHTS")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / sound_features._release.split("/")[-1]
    cached.parent.mkdir()
    torch.save(load_file(weights), cached)
    assert load_codec("sound-features").latent_channels == 128
    torch.save({"features.0.0.weight": pytest.raises}, cached)
    with pytest.raises(InputError, match="no usable weights"):
        load_codec("sound-features")


# ---- detectors

def sounds(folder, count, pitch):
    "Noises of two seconds around a pitch, at 16 kHz."
    generator = np.random.default_rng(int(pitch))
    folder.mkdir(parents=True)
    for number in range(count):
        tone = np.sin(np.arange(32000) * 2 * np.pi * pitch * generator.uniform(0.95, 1.05) / 16000)
        soundfile.write(folder / f"{number:03}.wav", 0.1 * tone + generator.normal(0, 0.01, 32000), 16000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds") / "hums"
    for name, count, pitch in (("train/good", 12, 300), ("test/good", 6, 301), ("test/high", 6, 900)):
        sounds(folder / name, count, pitch)
    return folder


@pytest.mark.parametrize("method, overrides", [
    ("one-class-svm", {"codec": {"depths": [17]}, "discrepancy": {"statistics": "mean", "estimator": "gaussian"}}),
    ("knn", {}), ("padim", {"codec": {"depths": [17]}})])
def test_a_detector_from_fit_to_detection(method, overrides, folder, weights, tmp_path):
    codec = {"kind": "sound-features", **overrides.get("codec", {})}
    overrides = {**overrides, "codec": codec, "data": {"seconds": 2.0}}
    fit(method, folder, tmp_path / "run", overrides=overrides, device="cpu")
    metrics = evaluate(tmp_path / "run")
    assert metrics["mean"]["image_auroc"] == 1.0
    assert SoundFeatureCodec.note in metrics["notes"] and any("AudioSet's log-mel" in one for one in metrics["notes"])
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["processor"] == {"front_end": "audioset", "seconds": 2.0, "mix": "loudest"}
    detector = AnomalyDetector.from_pretrained(tmp_path / "run/model")
    files = [str(folder / "test/good/000.wav"), str(folder / "test/high/000.wav")]
    began = time.process_time()
    found = detector(files)
    assert time.process_time() - began < 2  # a second for each
    assert found.maps.shape == (2, 200, 200) and found.scores[1] > found.scores[0]


@pytest.mark.parametrize("data, message", [
    ({"sample_rate": 22050}, "data.sample_rate"), ({"image_size": 128}, "data.image_size"),
    ({"seconds": 1.0}, "1.28 to 30 seconds"), ({"front_end": "log-mel"}, "needs the front end audioset")])
def test_settings_that_do_not_fit_are_refused(data, message, folder, weights, tmp_path):
    with pytest.raises(InputError, match=message):
        fit("knn", folder, tmp_path / "run", overrides={"codec": {"kind": "sound-features"}, "data": data})


def test_photographs_are_refused(weights):
    from adiff.data.images import PROTOCOLS
    with pytest.raises(InputError, match="is for sounds"):
        make_codec({"kind": "sound-features"}, PROTOCOLS["full_frame"])


def test_the_codec_decides_the_front_end():
    assert resolve_config("knn", overrides={"codec": {"kind": "sound-features"}}).data.front_end == "audioset"
    assert resolve_config("knn", kind="sound").data.front_end == "log-mel"
