"""ADiff's network: every switch, any size, saving; attention maps of it and of DeCo-Diff's network."""
import pytest
import torch
from torch import nn

from adiff.networks.attention import attention_layers, attention_maps, attention_weights
from adiff.core import InputError
from adiff.networks.multiscale_unet import MULTISCALE_SIZES, MultiScaleUNet
from adiff.scores.semantic import multiscale_difference
from adiff.networks.class_token_unet import ClassTokenUNet
from adiff.codecs.wavelets import WaveletDownsample, WaveletUpsample


pytestmark = pytest.mark.usefixtures("one_thread")


def make(**options):
    "A small network whose output convolution is not zero, so that an answer depends on everything before it."
    torch.manual_seed(0)
    network = MultiScaleUNet(**{"in_channels": 4, "base_channels": 16, "layers_per_block": 1, **options}).eval()
    nn.init.normal_(network.unet.conv_out.weight, std=0.05)
    return network


def latents(height=16, width=16, channels=4):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def samplers(network):
    return [module for module in network.modules() if isinstance(module, (WaveletDownsample, WaveletUpsample))]


# the network


@pytest.mark.parametrize("height, width", [(16, 16), (20, 20), (18, 21), (7, 16), (1, 1)])
@pytest.mark.parametrize("wavelet_sampling", [True, False])
def test_any_size_keeps_its_shape(height, width, wavelet_sampling):
    network, z = make(wavelet_sampling=wavelet_sampling), latents(height, width)
    with torch.no_grad():
        answer = network(z, torch.tensor([3, 900])).sample
    assert answer.shape == z.shape and answer.isfinite().all()


def test_untrained_it_answers_zero_and_learns():
    network, z = MultiScaleUNet(4, base_channels=16), latents()
    answer = network(z, 5).sample
    assert (answer == 0).all()
    (answer - z).square().mean().backward()
    assert network.unet.conv_out.weight.grad.abs().max() > 0


def test_every_parameter_gets_a_gradient():
    network = make()
    network(latents(), torch.tensor([3, 900])).sample.square().sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("levels", [(), (0,), (1,), (2,), (0, 1, 2)])
def test_attention_stands_where_it_was_asked_for(levels):
    layers = attention_layers(make(attention_levels=levels))
    expected = {block for level in levels for block in (f"unet.down_blocks.{level}.", f"unet.up_blocks.{2 - level}.")}
    if levels:
        expected.add("unet.mid_block.")
    assert {name.split("attentions")[0] for name in layers} == expected
    assert {type(layer.processor).__name__ for layer in layers.values()} <= {"AttnProcessor2_0"}


def test_wavelet_sampling_is_a_switch():
    assert len(samplers(make())) == 4 and len(samplers(make(wavelet_sampling=False))) == 0
    with torch.no_grad():
        haar, longer = (make(wavelet=wavelet)(latents(), 3).sample for wavelet in ("haar", "db3"))
    assert not torch.allclose(haar, longer)


@pytest.mark.parametrize("levels", [(), (0,)])
def test_single_scale_has_no_sampling(levels):
    network = make(channel_multipliers=(1,), attention_levels=levels)
    assert samplers(network) == [] and network.unet.down_blocks[0].downsamplers is None
    assert network(latents(9, 5), 3).sample.shape == (2, 4, 9, 5)


@pytest.mark.parametrize("base_channels", [16, 20, 24, 32, 48, 96])
def test_groups_divide_every_width(base_channels):
    network = make(base_channels=base_channels, attention_levels=(2,), head_channels=base_channels)
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert norms and all(norm.num_channels % norm.num_groups == 0 for norm in norms)
    assert network(latents(), 3).sample.isfinite().all()


def test_classes_are_ignored_and_timesteps_matter():
    network, z = make(), latents()
    with torch.no_grad():
        plain, later = network(z, 3).sample, network(z, 800).sample
        labelled = network(z, 3, torch.tensor([0, 1])).sample
        each = network(z, torch.tensor([3, 800])).sample
    assert torch.equal(plain, labelled) and not torch.allclose(plain, later)
    assert torch.allclose(each[0], plain[0], atol=1e-5) and torch.allclose(each[1], later[1], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"wavelet_sampling": False, "attention_levels": ()}, {"wavelet": "sym2"},
                                     {"channel_multipliers": (1,), "attention_levels": (0,)}])
def test_saved_and_loaded_it_answers_the_same(options, tmp_path):
    network, z = make(**options), latents(18, 13)
    network.save_pretrained(tmp_path)
    loaded = MultiScaleUNet.from_pretrained(tmp_path, use_safetensors=True)
    with torch.no_grad():
        assert torch.equal(loaded(z, 7).sample, network(z, 7).sample)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("options, words", [
    ({"attention_levels": (3,)}, "no level 3"), ({"attention_levels": (-1,)}, "no level -1"),
    ({"channel_multipliers": (1,)}, "no level 1"), ({"wavelet": "bior2.2"}, "not orthogonal"),
    ({"base_channels": 24, "attention_levels": (0,)}, "does not divide the 24"),
    ({"attention_levels": (2,), "head_channels": 48}, "does not divide the 64"),
])
def test_unusable_networks_are_refused(options, words):
    with pytest.raises(InputError, match=words) as raised:
        MultiScaleUNet(**{"base_channels": 16, **options})
    assert "\n" not in str(raised.value)


def test_sizes():
    with torch.device("meta"):
        counts = [sum(parameter.numel() for parameter in MultiScaleUNet.of_size(size).parameters())
                  for size in MULTISCALE_SIZES]
    assert counts == sorted(counts) and 3.5e6 < counts[0] < 4.5e6
    with pytest.raises(InputError, match="unknown U-Net size 'XXL'; known: L, M, S, nano"):
        MultiScaleUNet.of_size("XXL")


# attention


@pytest.mark.parametrize("network", ["multiscale", "class token"])
def test_maps_are_the_weights_the_network_used(network):
    labels = torch.tensor([0, 2])
    if network == "multiscale":
        network, z = make(attention_levels=(0, 1, 2)), latents(8, 12)
    else:
        network, z = ClassTokenUNet.of_size("nano", num_classes=3).eval(), latents(8, 8)
    hooked = {}
    for name, module in attention_layers(network).items():
        def remember(module, inputs, options, output, name=name):
            hooked[name] = inputs[0], options.get("encoder_hidden_states"), output
        hook = module.register_forward_hook(remember, with_kwargs=True)
        maps = attention_maps(network, z, torch.tensor([3, 700]), name, labels)
        hook.remove()
        x, asked, output = hooked[name]
        assert maps.ndim == 4 and maps.shape[:2] == (2, module.heads)
        assert torch.allclose(maps.sum(-1), torch.ones(()), atol=1e-5) and (maps >= 0).all()
        with torch.no_grad():
            cells = x.flatten(2) if x.ndim == 4 else x.transpose(1, 2)
            own = (cells if module.group_norm is None else module.group_norm(cells)).transpose(1, 2)
            value = module.to_v(own if asked is None else asked).unflatten(-1, (module.heads, -1)).transpose(1, 2)
            mixed = module.to_out[0]((maps @ value).transpose(1, 2).flatten(2))
            if x.ndim == 4:
                mixed = mixed.transpose(1, 2).view_as(x)
        assert torch.allclose(mixed + x if module.residual_connection else mixed, output, atol=1e-5), name


def test_maps_leave_the_network_alone():
    network, z = make(), latents()
    before = network(z, 3).sample
    layer = next(iter(attention_layers(network)))
    maps = attention_maps(network, z, 3, layer)
    assert maps.shape[2:] == (64, 64) and not maps.requires_grad
    assert torch.equal(network(z, 3).sample, before) and not attention_layers(network)[layer]._forward_hooks
    with pytest.raises(InputError, match="unknown attention layer 'up'"):
        attention_maps(network, z, 3, "up")


def test_weights_are_the_kernels():
    query, key, value = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    kernel = nn.functional.scaled_dot_product_attention(query, key, value)
    assert torch.allclose(attention_weights(query, key) @ value, kernel, atol=1e-6)


# differences at several scales


@pytest.mark.parametrize("height, width", [(32, 32), (33, 18), (5, 64), (1, 3), (2, 2)])
def test_difference_of_any_size(height, width):
    a, b = torch.rand(2, 2, 3, height, width).unbind(0)
    difference = multiscale_difference(a, b, scales=(1, 2, 4, 8))
    assert difference.shape == (2, height, width) and (difference >= 0).all()
    assert torch.equal(difference, multiscale_difference(b, a, scales=(1, 2, 4, 8)))
    assert torch.allclose(multiscale_difference(a, a - 0.25), torch.tensor(0.25), atol=1e-6)
    assert torch.allclose(multiscale_difference(a, b, scales=(1,)), (a - b).abs().mean(1))


def test_difference_by_hand():
    a = torch.zeros(1, 1, 4, 4)
    a[..., 0, 0], a[..., 3, 3] = 4.0, -8.0
    assert torch.allclose(multiscale_difference(a, torch.zeros_like(a), scales=(4,)), torch.tensor(0.25))
    two = multiscale_difference(a, torch.zeros_like(a), scales=(2,))
    assert two[0, 0, 0] == 1 and two[0, 3, 3] == 2 and two[0, 1, 1] == pytest.approx(0.5625 * 1 + 0.0625 * 2)


@pytest.mark.parametrize("scales", [(), (0,), (1.5,), (-2, 1)])
def test_unusable_scales_are_refused(scales):
    a = torch.zeros(1, 3, 8, 8)
    with pytest.raises(InputError, match="scales"):
        multiscale_difference(a, a, scales)
    with pytest.raises(InputError, match="differ in shape"):
        multiscale_difference(a, a[..., :4])
