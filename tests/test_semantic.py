"""Frozen features and what is measured with them, across parts: saved in a detector's folder, frozen, normalised."""
import sys

import pytest
import torch
from torch import nn

from adiff.methods.configuration import build_detector
from adiff.core import InputError
from adiff.data.images import OFFICIAL
from adiff.data.reading import read_dataset
from adiff.data.demo_images import make_demo_data
from adiff.detector.pipeline import AnomalyDetector
from adiff.scores.deviation import DeviationDiscrepancy
from adiff.methods.registry import resolve_config
from adiff.codecs.backbones import BACKBONES, FrozenFeatures, WideResNet50, load_features
from adiff.codecs.features import FeatureCodec
from adiff.scores.semantic import SemanticDiscrepancy
from adiff.training.held_out import held_out_scores, normal_maps, normal_scores


@pytest.fixture
def images():
    "Two smooth images (2, 3, 96, 96) in [-1, 1]: a reference and its reconstruction."
    noise = torch.randn(2, 2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return [nn.functional.interpolate(one, (96, 96), mode="bicubic").clamp(-1, 1) for one in noise]


DISCREPANCIES = {"semantic": lambda: SemanticDiscrepancy.pretrained(depths=(2, 4)),
                 "deviation": lambda: DeviationDiscrepancy.pretrained(levels=("pixel", "latent", "feature"))}


@pytest.mark.parametrize("name", DISCREPANCIES)
@torch.no_grad()
def test_a_saved_folder_needs_no_weights_file(name, images, tmp_path, monkeypatch):
    codec, discrepancy = FeatureCodec.pretrained(), DISCREPANCIES[name]()
    z = torch.zeros(2, 4, 12, 12)
    before = discrepancy(z, z + 0.1, *images, 64)
    discrepancy.fit_normalization([before])
    before = discrepancy(z, z + 0.1, *images, 64)
    AnomalyDetector(codec, None, None, None, discrepancy).save_pretrained(tmp_path)

    def absent():
        raise AssertionError("the wheel's weights were asked for")

    monkeypatch.setattr(BACKBONES["efficientnet-lite0"], "published", staticmethod(absent))
    loaded = AnomalyDetector.from_pretrained(tmp_path)
    after = loaded.discrepancy(z, z + 0.1, *images, 64)
    assert before.keys() == after.keys() and all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)
    assert torch.allclose(loaded.codec.encode(images[0]), codec.encode(images[0]), atol=1e-4)
    assert not any(p.requires_grad for part in (loaded.codec, loaded.discrepancy) for p in part.parameters())


def test_frozen_whatever_the_parent_does(images):
    discrepancy = DISCREPANCIES["semantic"]().train()
    statistics = {name: value.clone() for name, value in discrepancy.state_dict().items()}
    differentiable = images[1].clone().requires_grad_()
    z = torch.zeros(2, 4, 12, 12)
    discrepancy(z, z, images[0], differentiable, 64)["semantic"].mean().backward()
    assert differentiable.grad.abs().sum() > 0
    assert all(torch.equal(value, statistics[name]) for name, value in discrepancy.state_dict().items())
    assert not any(module.training for module in discrepancy.features.modules())


@pytest.mark.parametrize("channels", [1, 3])
@torch.no_grad()
def test_equal_images_have_no_distance(channels, images):
    image, z = images[0][:, :channels], torch.randn(2, 4, 12, 12)
    assert all((one == 0).all() for make in DISCREPANCIES.values() for one in make()(z, z, image, image, 64).values())


@torch.no_grad()
def test_normalisation_comes_from_the_normals_given(images):
    discrepancy, z = SemanticDiscrepancy.pretrained(semantic_weight=0.25, grid=1), torch.zeros(2, 4, 12, 12)
    maps = discrepancy(z, z, *images, 64)
    # before any normals
    assert torch.allclose(maps["anomaly"], 0.75 * maps["reconstruction"] + 0.25 * maps["semantic"])
    discrepancy.fit_normalization([maps])
    fitted = discrepancy(z, z, *images, 64)
    by_hand = [(maps[name] - maps[name].mean()) / maps[name].std(correction=0)
               for name in ("reconstruction", "semantic")]
    assert torch.allclose(fitted["anomaly"], 0.75 * by_hand[0] + 0.25 * by_hand[1], atol=1e-4)
    assert all(torch.equal(fitted[name], maps[name]) for name in ("reconstruction", "semantic"))
    # a network that has learned nothing yet
    discrepancy.fit_normalization([{name: torch.zeros(1, 8, 8) for name in maps}])
    assert discrepancy(z, z, *images, 64)["anomaly"].isfinite().all()


@torch.no_grad()
def test_normalisation_knows_where(images):
    "A place that is always badly redrawn is forgiven there and nowhere else; many normals outweigh the prior."
    discrepancy = SemanticDiscrepancy(semantic_weight=0, grid=2)
    maps = torch.ones(400, 64, 64) * 0.1 + 0.01 * torch.rand(400, 64, 64, generator=torch.Generator().manual_seed(0))
    maps[:, :32, :32] += 1
    discrepancy.fit_normalization({"reconstruction": batch} for batch in maps.split(100))
    assert torch.allclose(discrepancy.mean[0], torch.tensor([[1.105, 0.105], [0.105, 0.105]]), atol=0.01)
    few = SemanticDiscrepancy(semantic_weight=0, grid=2)
    few.fit_normalization([{"reconstruction": maps[:1]}])
    assert 0.3 < few.mean[0, 0, 0] < 0.8  # one normal moves it a fifth of the way
    assert (few.mean[1] == 0).all() and (few.std[1] == 1).all()  # no semantic term, nothing learned


def test_folders_of_two_levels_stay_as_they_were(tmp_path):
    DeviationDiscrepancy(pixel_cap=0.3).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    # as an earlier version wrote it
    lines = [line for line in config.read_text().splitlines() if "feature_" not in line and "extractor" not in line]
    config.write_text("\n".join(lines))
    loaded = DeviationDiscrepancy.from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == ["caps"] and loaded.caps.tolist() == pytest.approx([0.3, 0.2])


# the extractors


def test_photographs_are_recognised():
    "The whole of EfficientNet-Lite0 with our normalisation names a cup of coffee (ImageNet class 967, espresso)."
    import skimage
    from efficientnet_lite_pytorch import EfficientNet

    coffee = torch.tensor(skimage.data.coffee()[:400, 100:500].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    features = load_features(depths=(15,))
    whole = EfficientNet.from_name("efficientnet-lite0", image_size=224).eval()
    whole.load_state_dict(BACKBONES["efficientnet-lite0"].published())
    with torch.no_grad():
        head = whole._swish(whole._bn1(whole._conv_head(features(coffee)[0]))).mean((2, 3))
        probabilities = whole._fc(head).softmax(1)
    assert probabilities.argmax() == 967 and probabilities.max() > 0.8


@torch.no_grad()
def test_wide_resnet_from_a_weights_file(images, tmp_path, monkeypatch):
    torch.manual_seed(0)
    folder = tmp_path / "wide-resnet50"
    folder.mkdir()
    state = WideResNet50((1, 2), 224).state_dict()
    torch.save({**state, "fc.bias": torch.zeros(1000)}, folder / WideResNet50.file)
    monkeypatch.setenv("ADIFF_WEIGHTS", str(tmp_path))
    features = load_features("wide-resnet50", depths=(1, 2), input_size=96)
    assert [tuple(one.shape) for one in features(images[0])] == [(2, *shape) for shape in features.shapes]
    assert torch.equal(features.network.conv1.weight, state["conv1.weight"])
    with pytest.raises(InputError, match="not its own .* first layer3"):
        load_features("wide-resnet50", depths=(3,))


@torch.no_grad()
def test_dinov2_with_random_weights(images, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    try:
        features = FrozenFeatures("dinov2", depths=(1, 3), input_size=98)
    except InputError as error:
        pytest.skip(str(error))
    maps = features(images[0])
    assert [tuple(one.shape) for one in maps] == [(2, 384, 7, 7)] * 2
    features.network.model.save_pretrained(tmp_path / "dinov2")
    names = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value",
             "o_proj": "output.dense"}
    state = load_file(tmp_path / "dinov2" / "model.safetensors")
    for new, published in names.items():  # the names in the hub's file, which newer versions of transformers translate
        state = {name.replace(f"attention.{new}.", f"attention.{published}."): value for name, value in state.items()}
    save_file(state, tmp_path / "dinov2" / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setenv("ADIFF_WEIGHTS", str(tmp_path))
    loaded = load_features("dinov2", depths=(1, 3), input_size=98)
    assert all(torch.equal(a, b) for a, b in zip(loaded(images[0]), maps))
    with pytest.raises(InputError, match="not its own .* first model.encoder.layer.3"):
        load_features("dinov2", depths=(1, 4), input_size=98)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"dinov2.*pip install 'adiff\[backbones\]'") as raised:
        FrozenFeatures("dinov2")
    assert "\n" not in str(raised.value)


def test_thresholds_come_from_normalisations_that_have_not_seen_the_file(tmp_path, one_thread):
    "Under its own normalisation a held-out normal looks more normal than a new one: thresholds would be too low."
    data = make_demo_data(tmp_path / "demo", categories=("cup",), train=16, good=1, per_defect=1)
    dataset = read_dataset(data)
    config = resolve_config("adiff", overrides={"data": {"image_size": 64}, "correction": {"num_seeds": 1},
                                                "discrepancy": {"kind": "semantic", "input_size": 64}})
    detector = build_detector(config, dataset.categories, OFFICIAL)
    rows = dataset.select("train").head(8)
    fair, _ = held_out_scores(detector, dataset, rows)
    seen = normal_scores(detector, dataset, rows)
    assert fair.mean() > seen.mean() + 0.2 * seen.std()
    again = detector.discrepancy.mean.clone()
    detector.discrepancy.fit_normalization(normal_maps(detector, dataset, rows))
    assert (detector.discrepancy.mean == again).all()  # the one that stays has seen all
