"""The ideal denoiser: against brute force, its limits, every question it is asked, memory of each class, saving."""
import itertools

import numpy as np
import pytest
import torch

from adiff import AnomalyDetector, evaluate, fit
from adiff.core import InputError
from adiff.data.demo_images import make_demo_data
from adiff.diffusion.deviation_correction import DeviationCorrection
from adiff.diffusion.gaussian import GaussianForwardProcess
from adiff.diffusion.partial_noising import PartialNoisingCorrection
from adiff.networks.ideal import GaussianDenoiser, IdealDenoiser, posterior_mean
from adiff.scores.memories import NearestNeighborDiscrepancy

pytestmark = pytest.mark.usefixtures("one_thread")


def latents(count, seed=0, shape=(5, 6, 6)):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def labels(count, classes=1):
    return torch.arange(count) % classes


def fitted(classes=1, **options):
    network = IdealDenoiser(5, num_classes=classes, memory_size=60, **options)
    z = latents(12)
    network.fit(zip(z.split(5), labels(12, classes).split(5)), [(latents(4, 1), labels(4, classes))])
    return network


def brute_force(network, z, label, variance):
    "The posterior mean of latents (C, h, w) with numpy, patch by patch."
    used = network.log_prior[label] == 0
    memory, places = (one[label][used].double().numpy() for one in (network.memory, network.places))
    axes, spread = network.axes.double().numpy(), network.variances.double().numpy()
    size, result = network.config.patch_size, np.zeros(z.shape)
    padded = np.pad(z.double().numpy(), ((0, 0), (size // 2,) * 2, (size // 2,) * 2), mode="edge")
    for row, column in itertools.product(*map(range, z.shape[1:])):
        patch = padded[:, row:row + size, column:column + size].reshape(-1)
        difference = (patch - memory) @ axes / np.sqrt(variance(spread))
        logits = -np.square(difference).sum(1) / 2
        if network.config.position is not None:
            logits -= np.square(places - [row, column]).sum(1) / (2 * network.config.position**2)
        weights = np.exp(logits - logits.max())
        mean = weights @ memory / weights.sum()
        result[:, row, column] = mean.reshape(len(z), -1)[:, size * size // 2]
    return torch.tensor(result)


@pytest.mark.parametrize("options", [{}, {"position": None}, {"position": 1.0, "bandwidth": 0.2}, {"patch_size": 3},
                                     {"shrinkage": 0.3}, {"shrinkage": 0.3, "patch_size": 3}], ids=str)
def test_the_mean_is_the_formula(options):
    network, x = fitted(**options), latents(2, 5)
    level = torch.tensor([0.3, 0.9]).view(2, 1, 1, 1)
    found = network.denoise(x, level, labels(2))
    width = (network.config.bandwidth * float(network.spread[0]))**2
    for one, answer, noise in zip(x, found, (0.3, 0.9)):
        expected = brute_force(network, one, 0, lambda spread: noise**2 + width * spread)
        torch.testing.assert_close(answer.double(), expected, rtol=1e-4, atol=1e-4)


def test_batches_and_chunks_give_the_same(monkeypatch):
    network, x = fitted(classes=2), latents(7, 5)
    whole = network(x, 3, labels(7, 2)).sample
    monkeypatch.setattr(IdealDenoiser, "entries", 1)
    torch.testing.assert_close(network(x, 3, labels(7, 2)).sample, whole, rtol=1e-5, atol=1e-5)


def test_without_noise_it_is_the_nearest_neighbour():
    z, x = latents(2), latents(3, 5)
    memory = NearestNeighborDiscrepancy(5, memory_size=1000, sigma=0)
    memory.fit([z])
    network = IdealDenoiser(5, memory_size=1000, bandwidth=0.0, position=None)
    network.fit([(z, labels(2))])
    expected = memory(x, None, None, None, 6)["anomaly"]
    torch.testing.assert_close(network.distance(x, labels(3)), expected, rtol=1e-3, atol=1e-3)


def test_with_all_noise_it_is_the_mean_patch():
    network, x = fitted(position=None), latents(2, 5)
    mean = network.memory[0].mean(0)
    found = network.denoise(x, torch.full((1, 1, 1, 1), 1e3), labels(2))
    torch.testing.assert_close(found, mean.view(1, 5, 1, 1).expand_as(found), rtol=1e-2, atol=1e-3)


def test_place_matters_as_far_as_tau():
    z = torch.zeros(4, 2, 4, 4)
    z[:, :, :, 2:] = 5.0  # the left half is always 0, the right half always 5
    x = z[:1].clone()
    x[:, :, 1, 0] = 5.0  # normal, but not here
    apart = {}
    for tau in (None, 0.1):
        network = IdealDenoiser(2, memory_size=64, position=tau, bandwidth=3.0)
        network.fit([(z + latents(4, shape=(2, 4, 4)), labels(4))], [(z + latents(4, 1, (2, 4, 4)), labels(4))])
        apart[tau] = float(network.distance(x, labels(1))[0, 1, 0])
    assert apart[None] < 3 and apart[0.1] > 5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_it_answers_what_the_forward_process_asks(prediction_type):
    process = GaussianForwardProcess(1000, prediction_type=prediction_type)
    network = fitted(num_train_timesteps=1000, beta_schedule="linear", prediction_type=prediction_type)
    drawn = process.sample(latents(3, 5), torch.Generator().manual_seed(0))
    answer = network(drawn.noisy, drawn.timesteps, labels(3)).sample
    alpha = process.scheduler.alphas_cumprod[drawn.timesteps].view(-1, 1, 1, 1)
    level = ((1 - alpha) / alpha).sqrt()
    z0 = network.denoise(drawn.noisy / alpha.sqrt(), level, labels(3))
    noise = (drawn.noisy - alpha.sqrt() * z0) / (1 - alpha).sqrt()
    expected = {"epsilon": noise, "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * z0}[prediction_type]
    torch.testing.assert_close(answer, expected, rtol=1e-3, atol=1e-3)
    correction = PartialNoisingCorrection(1000, prediction_type=prediction_type, num_inference_steps=1, num_seeds=1)
    assert correction.correct(latents(2, 6), lambda z, t: network(z, t).sample).isfinite().all()


def test_one_step_of_deco_diff_goes_to_the_posterior_mean():
    network, z = fitted(), latents(2, 5)
    correction = DeviationCorrection(10, 1, starting_step=0)
    corrected = correction.correct(z, lambda z, t: network(z, t).sample)
    level = (1 / correction.alphas_cumprod[0] - 1).sqrt().view(1, 1, 1, 1)
    torch.testing.assert_close(corrected, network.denoise(z, level, labels(2)), rtol=1e-4, atol=1e-4)


def test_the_gate_tells_corrupted_from_kept():
    network, z, noise = IdealDenoiser(5, memory_size=60, gate=True), 2 + 0.1 * latents(12), latents(2, 7)
    network.fit([(z, labels(12))])
    z = z[:2]
    mask = (latents(2, 8)[:, :1] > 0).float()
    root, s = network._levels(7)
    noisy = mask * z + (1 - mask) * (root * z + s * noise)
    gate = network._gate(noisy, labels(2), root, s)
    assert ((gate >= 0) & (gate <= 1)).all() and gate[mask == 0].mean() > gate[mask == 1].mean() + 0.1
    assert (network(noisy, 7).sample.abs() <= network.deviation(noisy, root, s, labels(2)).abs() + 1e-6).all()


def test_a_class_has_its_own_memory_and_tells_itself():
    z = latents(12) + 3 * labels(12, 3).view(-1, 1, 1, 1)
    network = IdealDenoiser(5, num_classes=3, memory_size=40)
    network.fit([(z, labels(12, 3))], [(latents(3, 1) + 3 * labels(3, 3).view(-1, 1, 1, 1), labels(3, 3))])
    assert network.nearest_class(z + 0.01).tolist() == labels(12, 3).tolist()
    common = IdealDenoiser(5, num_classes=3, memory_size=40, per_class=False)
    common.fit([(z, labels(12, 3))])
    assert common.classes == 1 and torch.equal(common(z, 2, labels(12, 3)).sample, common(z, 2).sample)
    with pytest.raises(InputError, match="class 1"):
        network.fit([(z[:1], labels(1))])


def test_the_gaussian_is_wieners_filter():
    z, x = latents(200, shape=(3, 4, 4)), latents(2, 5, shape=(3, 4, 4))
    z = torch.einsum("nchw,cd->ndhw", z, torch.tensor([[2.0, 0.5, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 0.2]])) + 1
    network = GaussianDenoiser(3, prediction_type="sample", noise_floor=0.7)
    network.fit([(z, labels(200))])
    rows = z.movedim(1, -1).reshape(-1, 3).double()
    covariance, mean = torch.cov(rows.T, correction=0), rows.mean(0)
    centred = x.movedim(1, -1).reshape(-1, 3).double() - mean
    expected = mean + centred @ torch.linalg.inv(covariance + 0.49 * torch.eye(3)) @ covariance
    found = network(x, 0).sample.movedim(1, -1).reshape(-1, 3).double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_wide_memory_of_a_gaussian_approaches_the_gaussian():
    generator = torch.Generator().manual_seed(0)
    memory, x = 2 * torch.randn(1, 200_000, 1, generator=generator), torch.tensor([[[-3.0], [0.5], [2.0]]])
    found = posterior_mean(x, memory, torch.zeros(1, 1, 200_000), 1.0)[0]
    torch.testing.assert_close(found, x * 4 / 5, rtol=0.02, atol=0.02)


def test_no_gradient_is_kept_and_folders_hold_everything(tmp_path):
    network, x = fitted(classes=2, shrinkage=0.2), latents(3, 5).requires_grad_()
    assert all(one.isfinite().all() for one in IdealDenoiser(5).state_dict().values())  # others are refused when loaded
    answer = network(x, 4, labels(3, 2)).sample
    assert not answer.requires_grad and not list(network.parameters())
    network.save_pretrained(tmp_path)
    again = IdealDenoiser.from_pretrained(tmp_path)
    assert torch.equal(again(x, 4, labels(3, 2)).sample, answer)


def test_what_it_refuses():
    with pytest.raises(InputError, match="call fit"):
        IdealDenoiser(5)(latents(1), 0)
    with pytest.raises(InputError, match="patch_size"):
        IdealDenoiser(5, patch_size=2)
    with pytest.raises(InputError, match="no latents"):
        IdealDenoiser(5).fit([])


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(IdealDenoiser, "candidates", 50)
    network = IdealDenoiser(5, memory_size=100)
    network.fit((z[None], labels(1)) for z in latents(20))
    assert int((network.log_prior == 0).sum()) == 50


# ---- in a detector

@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_demo_data(tmp_path_factory.mktemp("data") / "demo", categories=("brick", "cup"), train=12, good=4,
                          per_defect=1)


@pytest.mark.parametrize("method", ["deco", "adiff"])
def test_instant_needs_no_training(images, tmp_path, method):
    detector = fit(method, images, tmp_path / "run", preset="instant", categories="cup", device="cpu",
                   overrides={"network": {"memory_size": 300}})
    assert not list(detector.network.parameters())
    metrics = evaluate(tmp_path / "run", device="cpu")
    assert metrics["mean"]["image_auroc"] > 0.9 and metrics["parameters"] == 0
    again = AnomalyDetector.from_pretrained(tmp_path / "run/model")
    picture = images / "cup/test/hole/000.png"
    assert np.array_equal(again(picture).maps, detector(picture).maps)
    with pytest.raises(InputError, match="holds a run"):
        fit(method, images, tmp_path / "run", preset="instant", categories="cup", device="cpu")


def test_the_category_need_not_be_told(images, tmp_path):
    detector = fit("deco", images, tmp_path / "run", preset="instant", device="cpu",
                   overrides={"network": {"memory_size": 300}})
    files = sorted(images.glob("*/test/good/*.png"))
    told = detector(files, category=[file.parts[-4] for file in files])
    untold = detector(files)
    assert untold.categories == told.categories == [file.parts[-4] for file in files]
    assert np.allclose(untold.maps, told.maps, atol=1e-4)
    metrics = evaluate(tmp_path / "run", device="cpu")
    found = metrics["category_not_told"]
    assert found["mean"]["category_accuracy"] > 0.9 and set(found["categories"]) == {"brick", "cup"}
    assert found["mean"]["image_auroc"] == pytest.approx(metrics["mean"]["image_auroc"], abs=0.1)


@pytest.mark.parametrize("method", ["deco", "adiff"])
def test_trained_and_ideal_are_fused(images, tmp_path, method):
    length = {"length": 2, "batch_size": 4, "augmentations": [], "validate_every": 2, "checkpoint_every": 2}
    detector = fit(method, images, tmp_path / "run", categories="cup", device="cpu", overrides={
        "training": length, "discrepancy": {"ideal_denoiser": {"memory_size": 300}}})
    first, other = detector.config.calibration["cup"], detector(images / "cup/test/hole/000.png")
    levels, (mean, std) = list(other.discrepancies), (detector.discrepancy.mean, detector.discrepancy.std)
    assert levels[-1] == "ideal" and first["threshold"] and (std != 1).all()
    maps = [(other.discrepancies[name] - mean[k].item()) / std[k].item() for k, name in enumerate(levels)]
    limited = np.minimum(*maps) if detector.discrepancy.config.limited else maps[0]
    assert np.allclose(other.maps, limited + 4 * maps[1], atol=1e-3)
