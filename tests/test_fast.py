"""The faster way through a network: the same answers and gradients, the same parameters, whatever the size and mode."""
import pytest
import torch
from torch import nn

from adiff.networks.class_token_unet import ClassTokenUNet
from adiff.networks.fast_cpu import FastNetwork, fast
from adiff.networks.load import NETWORKS
from adiff.networks.multiscale_unet import MultiScaleUNet

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["class token", "multiscale", "strided"]


def make(name):
    "A small network whose output convolution is not zero."
    torch.manual_seed(0)
    network = {
        "class token": lambda: ClassTokenUNet(4, 3, base_channels=32, num_heads=2, class_embedding_dim=16, dropout=0.2),
        "multiscale": lambda: MultiScaleUNet(4, base_channels=16, dropout=0.2),
        "strided": lambda: MultiScaleUNet(4, base_channels=16, wavelet_sampling=False, attention_levels=()),
    }[name]()
    nn.init.normal_(network.unet.conv_out.weight, std=0.05)
    return network


def question(height=16, width=16):
    z = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(1))
    return z, torch.tensor([3, 8]), torch.tensor([0, 2])


@pytest.mark.parametrize("height, width", [(16, 16), (18, 13), (8, 20)])
@pytest.mark.parametrize("name", NAMES)
def test_answers_agree(name, height, width):
    network = make(name).eval()
    quick, (z, t, labels) = fast(network), question(height, width)
    assert type(quick) is not FastNetwork
    with torch.no_grad():
        assert torch.allclose(quick(z, t, labels).sample, network(z, t, labels).sample, atol=1e-5)
        with quick.packed_weights(), quick.packed_weights():
            predict = quick.predictor(labels)
            for step in (8, 3, 8):
                assert torch.allclose(predict(z, step), network(z, step, labels).sample, atol=1e-5)
            assert torch.allclose(quick(z[:1], t[:1], labels[:1]).sample, network(z, t, labels).sample[:1], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_and_reach_the_network(name):
    network, gradients = make(name).eval(), []
    for way in (network, fast(network)):
        way(*question()).sample.square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.requires_grad])
        network.zero_grad()
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*gradients))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_shared(name):
    network = make(name)
    names = list(network.state_dict())
    quick = fast(network)
    own = list(network.parameters())
    assert all(a is b for a, b in zip(own, quick.parameters(), strict=True)) and list(network.state_dict()) == names
    network.load_state_dict({key: torch.zeros_like(value) for key, value in network.state_dict().items()})
    with torch.no_grad():
        assert (quick(*question()).sample == 0).all()


@pytest.mark.parametrize("name", ["class token", "multiscale"])
def test_the_networks_mode_rules(name):
    network = make(name)
    quick = fast(network)
    network.eval()
    with torch.no_grad():
        assert torch.equal(quick(*question()).sample, quick(*question()).sample)
        quick.train()
        assert network.training and not torch.equal(quick(*question()).sample, quick(*question()).sample)  # dropout


def test_other_networks_are_called_as_they_are():
    class Mine(ClassTokenUNet):
        def forward(self, sample, timestep, class_labels):
            return super().forward(2 * sample, timestep, class_labels)

    torch.manual_seed(0)
    network = Mine(4, 3, 32, 2, 16, (1,)).eval()
    nn.init.normal_(network.unet.conv_out.weight)
    quick, (z, t, labels) = fast(network), question()
    with torch.no_grad(), quick.packed_weights():
        assert torch.equal(quick(z, t, labels).sample, network(z, t, labels).sample)
        assert torch.equal(quick.predictor(labels)(z, 3), network(z, 3, labels).sample)


@pytest.mark.parametrize("kind", ["class-token-unet", "multiscale-unet", "autoencoder", "dense-autoencoder"])
def test_every_kind_says_how_often_it_halves(kind):
    with torch.device("meta"):
        network = NETWORKS[kind]()
    assert network.halvings == (2 if "unet" in kind else 0)
