"""Presets for sounds that need no training: what and where from one pass, saved and loaded; when a fault is heard."""
import numpy as np
import pytest
import torch

from adiff import AnomalyDetector, fit
from adiff.core import InputError
from adiff.data.demo_sounds import fault_times, make_demo_sounds, sound_faults
from adiff.data.files import find_sounds
from adiff.scores.fusion import FusionDiscrepancy
from adiff.scores.metrics import image_metrics


@pytest.fixture(scope="module")
def pump(tmp_path_factory):
    return make_demo_sounds(tmp_path_factory.mktemp("sounds") / "pump", train=24, good=5, per_fault=2)


def heard(detector, pump):
    "Test files, and what the detector says of them."
    files = find_sounds(pump / "pump" / "test")
    return files, detector([str(file) for file in files])


def peaks_inside(files, maps):
    "Of each file with a fault, whether the highest column of its map lies in the time of the fault."
    for file, one in zip(files, maps):
        if file.parent.name != "good":
            times = fault_times(file.parent.name, int(file.stem))
            yield times[int(len(times) * one.max(0).argmax() / one.shape[1])]


def test_patches_find_the_moment_of_a_fault(pump, tmp_path):
    detector = fit("deco", pump, tmp_path / "run", preset="instant", device="cpu")
    files, found = heard(detector, pump)
    assert image_metrics([file.parent.name != "good" for file in files], found.scores)["image_auroc"] > 0.95
    assert np.mean(list(peaks_inside(files, found.maps))) > 0.9


def test_the_whole_clip_and_its_cells(pump, tmp_path):
    detector = fit("adiff", pump, tmp_path / "run", preset="instant", device="cpu")
    files, found = heard(detector, pump)
    assert set(found.discrepancies) == {"latent", "clip"}
    assert all(np.ptp(one) < 1e-4 for one in found.discrepancies["clip"])
    assert np.mean(list(peaks_inside(files, found.maps))) > 0.8
    again = AnomalyDetector.from_pretrained(tmp_path / "run" / "model")
    np.testing.assert_allclose(heard(again, pump)[1].scores, found.scores, rtol=1e-4)


def test_the_audioset_network_hears_every_fault(pump, shared, tmp_path, monkeypatch):
    if not (shared / "weights" / "efficientat-mn04" / "mn04_as.safetensors").is_file():
        pytest.skip("needs the weights of EfficientAT mn04 in the shared folder")
    monkeypatch.setenv("ADIFF_WEIGHTS", str(shared / "weights"))
    detector = fit("adiff", pump, tmp_path / "run", preset="instant-audioset", device="cpu")
    files, found = heard(detector, pump)
    assert image_metrics([file.parent.name != "good" for file in files], found.scores)["image_auroc"] > 0.95
    assert np.mean(list(peaks_inside(files, found.maps))) > 0.7
    again = AnomalyDetector.from_pretrained(tmp_path / "run" / "model")
    np.testing.assert_allclose(heard(again, pump)[1].scores, found.scores, rtol=1e-4)


def test_faults_are_heard_for_as_long_as_they_last():
    for fault in sound_faults:
        times = fault_times(fault, 0)
        assert times.shape == (64000,) and times.dtype == bool and times.any()
    assert fault_times("dropout", 0).mean() < 0.2 and fault_times("dropout", 0, seed=1).tolist() != fault_times(
        "dropout", 0).tolist()


def test_the_level_clip_must_learn_and_know_its_arguments():
    z = torch.zeros(1, 2, 4, 4)
    with pytest.raises(InputError, match="learned nothing"):
        FusionDiscrepancy(channels=2, height=4, levels=("clip",))(z, z, None, None, 4)
    with pytest.raises(InputError, match="unknown clip argument"):
        FusionDiscrepancy(levels=("clip",), clip={"estimate": "ideal"})
