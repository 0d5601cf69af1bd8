"""Baselines: what they learn, that it survives saving, and what they refuse."""
import numpy as np
import pytest
import torch
from sklearn.ensemble import IsolationForest
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM

from adiff.diffusion.identity import IdentityForwardProcess, SinglePassCorrection
from adiff.networks.coreset import greedy_coreset
from adiff.networks.autoencoders import ConvolutionalAutoencoder, DenseAutoencoder
from adiff.scores.memories import MahalanobisDiscrepancy, NearestNeighborDiscrepancy
from adiff.scores.pooled import PooledStatisticsDiscrepancy, SingleGaussian, pooled_statistics
from adiff.scores.reconstruction import ReconstructionErrorDiscrepancy
from adiff.core import InputError

FITTED = {
    "mahalanobis": lambda: MahalanobisDiscrepancy(12, 6, 6, kept_channels=5),
    "all channels": lambda: MahalanobisDiscrepancy(12, 6, 6),
    "neighbor": lambda: NearestNeighborDiscrepancy(12, memory_size=50, neighbors=3),
    "memory not full": lambda: NearestNeighborDiscrepancy(12, memory_size=5000, neighbors=3),
    "one-class-svm": lambda: PooledStatisticsDiscrepancy(12, 6, "one-class-svm"),
    "isolation-forest": lambda: PooledStatisticsDiscrepancy(12, 6, "isolation-forest"),
    "gaussian": lambda: PooledStatisticsDiscrepancy(12, 6, "gaussian"),
    "mean of channels": lambda: PooledStatisticsDiscrepancy(12, 6, "gaussian", statistics="mean"),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def latents(count, seed=0, shape=(12, 6, 6)):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("build", FITTED.values(), ids=FITTED)
def test_what_was_learned_is_saved(build, tmp_path):
    part, z = build(), latents(3, seed=1)
    with pytest.raises(InputError, match="call fit"):
        part(z, z, None, None, 24)
    with pytest.raises(InputError, match="normals"):
        part.fit([])
    part.fit(latents(40).split(16))
    maps = part(z, z, None, None, 24)
    assert maps["anomaly"].shape == (3, 24, 24) and maps["anomaly"].dtype == torch.float32
    assert all(one.isfinite().all() and one.min() >= 0 for one in maps.values())
    part.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".json", ".safetensors")]
    again = type(part).from_pretrained(tmp_path)
    for name, one in again(z, z, None, None, 24).items():
        assert torch.equal(one, maps[name])


@pytest.mark.parametrize("build", FITTED.values(), ids=FITTED)
def test_anomalies_score_higher_and_refitting_forgets(build):
    part = build()
    part.fit([5 + latents(40)])
    part.fit(latents(40).split(7))
    normal, anomalous = (part(z, z, None, None, 6)["anomaly"].amax((1, 2)) for z in (latents(8, 1), 5 + latents(8, 2)))
    assert anomalous.min() > normal.max()
    twin = build()
    twin.fit(latents(40).split(7))
    assert torch.equal(twin(latents(8, 1), None, None, None, 6)["anomaly"].amax((1, 2)), normal)


@pytest.mark.parametrize("network", [ConvolutionalAutoencoder(1, height=16, base_channels=4, bottleneck_channels=6),
                                     DenseAutoencoder(height=16, hidden_channels=8)])
def test_autoencoders_are_saved(network, tmp_path):
    z = latents(2, shape=(1, 16, 16))
    network(z)  # moves the running statistics of batch normalisation
    expected = network.eval()(z, torch.zeros(2), class_labels=None).sample
    network.save_pretrained(tmp_path)
    assert expected.shape == z.shape
    assert torch.equal(type(network).from_pretrained(tmp_path).eval()(z).sample, expected)


def test_schedulers_and_reconstruction_error_are_saved(tmp_path):
    for part in (IdentityForwardProcess(), SinglePassCorrection(), ReconstructionErrorDiscrepancy(power=1, sigma=2.0)):
        part.save_pretrained(tmp_path / type(part).__name__)
        again = type(part).from_pretrained(tmp_path / type(part).__name__)
        assert {**again.config, "_name_or_path": ""} == {**part.config, "_name_or_path": ""}
    z = latents(2, shape=(3, 16, 16))
    assert torch.allclose(again(z, 0 * z, None, None, 16)["anomaly"], part(z, z, z, 2 * z, 16)["pixel"])


@pytest.mark.parametrize("build", [lambda: ConvolutionalAutoencoder(height=16, base_channels=8),
                                   lambda: DenseAutoencoder(channels=3, height=16)])
def test_an_autoencoder_learns_through_the_sockets(build):
    torch.manual_seed(0)
    network, forward_process, z0 = build(), IdentityForwardProcess(), 0.3 * latents(8, shape=(3, 16, 16))
    optimizer, losses = torch.optim.Adam(network.parameters(), lr=5e-3), []
    for _ in range(60):
        drawn = forward_process.sample(z0)
        losses.append(torch.nn.functional.mse_loss(network(drawn.noisy, drawn.timesteps).sample, drawn.target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    steps = []
    network.eval()
    corrected = SinglePassCorrection().correct(z0, lambda z, t: network(z, t).sample, lambda t, z: steps.append((t, z)))
    assert len(steps) == 1 and steps[0][0] == 0 and steps[0][1] is corrected


def test_mahalanobis_is_the_formula():
    z, x = latents(60), latents(4, seed=3)
    part = MahalanobisDiscrepancy(12, 6, 6, kept_channels=5, sigma=0)
    part.fit((100 + z).split(7))  # far from zero: sums of squares must not lose the variance
    distances = part(100 + x, None, None, None, 6)["anomaly"]
    for row, column in ((0, 0), (2, 5)):
        train, test = (one[:, part.chosen, row, column].double().numpy() for one in (z, x))
        inverse, centred = np.linalg.inv(np.cov(train.T) + 0.01 * np.eye(5)), test - train.mean(0)
        expected = np.sqrt(((centred @ inverse) * centred).sum(1))
        np.testing.assert_allclose(distances[:, row, column], expected, rtol=1e-3)
    with pytest.raises(InputError, match="do not fit"):
        part.fit([latents(3, shape=(12, 4, 6))])


def test_neighbor_distance_is_to_the_memory(monkeypatch):
    z = latents(3)
    part = NearestNeighborDiscrepancy(12, memory_size=1000, sigma=0)
    part.fit(z[:2].split(1))
    assert int(part.count) == 72 and part(z[:2], None, None, None, 6)["anomaly"].max() < 0.01
    patches = z[2].flatten(1).T
    expected = (patches[:, None] - part.memory[:72]).norm(dim=2).amin(1).view(6, 6)
    assert torch.allclose(part(z[2:], None, None, None, 6)["anomaly"][0], expected, atol=1e-3)
    monkeypatch.setattr(NearestNeighborDiscrepancy, "candidates", 50)
    part.fit(latents(40).split(3))
    assert int(part.count) == 50
    with pytest.raises(InputError, match="neighbors"):
        NearestNeighborDiscrepancy(12, memory_size=3, neighbors=4)


def test_greedy_coreset_covers():
    points = torch.cat([torch.zeros(50, 2), torch.eye(2) * 9])
    assert set(greedy_coreset(points, 3).tolist()) >= {50, 51}
    assert sorted(greedy_coreset(points, 100).tolist()) == list(range(52))


@pytest.mark.parametrize("name", ["one-class-svm", "isolation-forest"])
def test_pooled_scores_order_as_scikit_learn(name):
    part = PooledStatisticsDiscrepancy(12, 6, name)
    part.fit([latents(40)])
    z = latents(20, seed=1) * torch.linspace(0.5, 2, 20).view(-1, 1, 1, 1)
    train, test = (pooled_statistics(one).double().numpy() for one in (latents(40), z))
    scaler = StandardScaler().fit(train)
    estimator = {"one-class-svm": OneClassSVM(nu=0.1), "isolation-forest": IsolationForest(random_state=0)}[name]
    expected = -estimator.fit(scaler.transform(train)).decision_function(scaler.transform(test))
    assert (np.argsort(part.score(z).numpy()) == np.argsort(expected.astype(np.float32))).mean() > 0.8


def test_the_single_gaussian_is_what_ideal_denoising_moves():
    "sigma^2 (Sigma + sigma^2 I)^-1 (x - mu), the posterior mean of a Gaussian, in units of the variance."
    train, test = (part.double().numpy() for one in (latents(300), latents(5, seed=1))
                   for part in [pooled_statistics(one * torch.linspace(0.2, 2, 12).view(-1, 1, 1), "mean")])
    part = SingleGaussian(noise=0.1).fit(train)
    sigma = np.cov(train.T, bias=True)
    noise = 0.1 * np.trace(sigma) / 12
    precise = np.linalg.inv(np.linalg.inv(sigma) + np.eye(12) / noise)  # covariance of the posterior
    posterior = (precise @ (np.linalg.inv(sigma) @ train.mean(0)[:, None] + test.T / noise)).T
    moved = np.linalg.norm(test - posterior, axis=1)
    assert np.allclose(-part.score_samples(test) * 0.1, moved)


def test_a_gaussian_of_fewer_clips_than_numbers():
    part = PooledStatisticsDiscrepancy(12, 6, "gaussian")
    part.fit([latents(5)])
    assert part.score(latents(5, seed=1)).min() > part.score(latents(5)).max() > 0


def test_unknown_names_are_refused():
    for build in (lambda: ReconstructionErrorDiscrepancy(power=3), lambda: PooledStatisticsDiscrepancy(12, 6, "svm"),
                  lambda: PooledStatisticsDiscrepancy(12, 6, statistics="median"),
                  lambda: ConvolutionalAutoencoder(height=100)):
        with pytest.raises(InputError) as error:
            build()
        assert "\n" not in str(error.value)
