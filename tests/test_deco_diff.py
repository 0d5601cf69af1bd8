"""DeCo-Diff's checklist that needs a trained network: a defect is found, the rest of the latent stays where it is."""
import numpy as np
import pytest
import torch

from adiff.data.images import OFFICIAL
from adiff.data.loading import ProcessedFiles
from adiff.data.reading import read_dataset
from adiff.methods.configuration import build_detector
from adiff.methods.registry import resolve_config
from adiff.training.train import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(shared, tmp_path_factory):
    "A detector after 120 updates on real bottles, in TAEF2 latents of 96-pixel images."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADIFF_WEIGHTS", str(shared / "weights"))
        config = resolve_config("deco", "cpu-taef2", {"data": {"image_size": 96}, "training": {
            "length": 120, "learning_rate": 1e-3, "augmentations": [], "validate_every": 120}})
        dataset = read_dataset(shared / "data" / "mvtec_ad", "bottle")
        detector = build_detector(config, dataset.categories, OFFICIAL)
        images = ProcessedFiles(dataset, dataset.select("train").iloc[:32], detector.processor)
        with torch.no_grad():
            detector.codec.fit_scale([detector.resize(torch.stack(list(images)))])
        return detector, dataset, train(detector, dataset, config.training, device="cpu")


def test_loss_falls_below_the_trivial_predictor(trained):
    _, _, log = trained
    trivial = 0.46  # what a network that answers 0 pays on unit-variance latents
    assert np.mean([line["loss"] for line in log[-20:]]) < 0.9 * trivial
    assert log[-1]["validation_loss"] < 0.9 * trivial


def test_a_pasted_defect_stands_out_and_the_rest_hardly_moves(trained):
    detector, dataset, _ = trained
    normal = ProcessedFiles(dataset, dataset.select("validation").iloc[:1], detector.processor)[0][None]
    defective = normal.clone()
    defective[..., 40:90, 40:90] = -normal[..., 40:90, 40:90]
    labels = detector.class_labels("bottle", 1)
    maps, _ = detector.detect_batch(defective, labels)
    row, column = np.unravel_index(int(maps["anomaly"][0].argmax()), maps["anomaly"].shape[1:])
    assert 30 <= row < 100 and 30 <= column < 100

    with torch.no_grad():
        z = detector.codec.encode(detector.resize(defective))
        corrected = detector.correction.correct(z, lambda z, t: detector.network(z, t, labels).sample)
    moved = (corrected - z).abs().mean(1)[0]  # 12 x 12 cells; the defect covers cells 2 to 4
    inside, outside = torch.zeros(12, 12, dtype=bool), torch.ones(12, 12, dtype=bool)
    inside[2:4, 2:4], outside[1:6, 1:6] = True, False
    assert moved[inside].mean() > 2.5 * moved[outside].mean(), (moved[inside].mean(), moved[outside].mean())
