"""Wavelets: exact in every family, at every size; rotations; scale; samplers of a U-Net."""
import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from adiff.codecs.wavelets import (WaveletCodec, WaveletDownsample, WaveletPacket2d, WaveletUpsample, band_names,
                                   orthogonal_wavelets)
from adiff.core import InputError


pytestmark = pytest.mark.usefixtures("one_thread")


def uniform(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


# perfect reconstruction


def test_the_families_are_all_that_pywavelets_calls_orthogonal_but_dmey():
    named = {name for name in pywt.wavelist(kind="discrete") if pywt.Wavelet(name).orthogonal}
    assert set(orthogonal_wavelets()) == named - {"dmey"}
    assert {"haar", "db38", "sym20", "coif17"} <= named


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("family", ["haar", "db", "sym", "coif"])
def test_every_family_comes_back_from_every_size(family, levels):
    for name in pywt.wavelist(family):
        module = WaveletPacket2d(name, levels)
        for x in [uniform(1, 2, *size) for size in [(16, 24), (21, 13)]]:
            size = x.shape[2:]
            coefficients = module(x)
            assert coefficients.shape[2:] == tuple(-(-n // 2**levels) for n in size)
            assert (module.inverse(coefficients, size=size) - x).abs().max() < 1e-5, (name, tuple(size))


@pytest.mark.parametrize("levels", [1, 3])
def test_even_sizes_keep_the_energy_of_every_family(levels):
    image = uniform(1, 1, 24, 32)
    for name in orthogonal_wavelets():
        coefficients = WaveletPacket2d(name, levels)(image)
        assert coefficients.numel() == image.numel()
        assert torch.isclose(coefficients.square().sum(), image.square().sum(), rtol=1e-5), name


def test_double_precision_is_kept():
    for name in ["haar", "db20", "coif17"]:
        module, x = WaveletPacket2d(name, 2), uniform(1, 1, 33, 40, dtype=torch.float64)
        assert (module.inverse(module(x), size=(33, 40)) - x).abs().max() < 1e-9, name
    assert WaveletPacket2d("db2")(x.bfloat16()).dtype == torch.bfloat16


def test_an_image_is_transformed_alike_alone_and_in_a_batch():
    images = uniform(5, 3, 32, 32)
    module = WaveletPacket2d("db3", 2)
    assert torch.equal(module(images)[3:4], module(images[3:4]))


@pytest.mark.parametrize("size", [(32, 48), (31, 45)])
def test_low_bands_are_those_of_pywavelets(size):
    image = uniform(1, 1, *size)
    for name in ["haar", "db4", "sym7", "coif2"]:
        low = pywt.wavedec2(image[0, 0].double().numpy(), name, mode="periodization", level=2)[0]
        assert np.allclose(WaveletPacket2d(name, 2)(image)[0, 0], low, atol=1e-5)


def test_gradients_are_exact_for_odd_sizes():
    module, x = WaveletPacket2d("db2", 2), uniform(1, 1, 5, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(module, x)
    assert torch.autograd.gradcheck(lambda c: module.inverse(c, size=(5, 6)), module(x).detach().requires_grad_())


@pytest.mark.parametrize("call, words", [
    (lambda: WaveletPacket2d()(torch.zeros(3, 8, 8)), "3 axes"),
    (lambda: WaveletPacket2d("haar", 1).inverse(torch.zeros(1, 6, 4, 4)), "multiple of 4"),
    (lambda: WaveletPacket2d("haar", 1).inverse(torch.zeros(1, 4, 4, 4), size=(6, 8)), "size"),
    (lambda: WaveletPacket2d("haar", -1), "levels"),
    (lambda: WaveletDownsample(4, "bior2.2"), "not orthogonal"),
    (lambda: WaveletUpsample(4)(torch.zeros(1, 4, 4, 4), (6, 8)), "size"),
])
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()


# scale


def test_a_codecs_scale_is_a_weight_for_each_band():
    images = uniform(8, 1, 32, 32) + torch.linspace(-1, 1, 32)
    codec = WaveletCodec("haar", levels=1, image_channels=1).fit_scale([images])
    raw = codec.transform(images)
    assert len(band_names(1)) == codec.latent_channels
    assert torch.allclose(1 / codec.scale, raw.std((0, 2, 3), correction=0), rtol=1e-4)
    scaled = (raw - codec.shift[:, None, None]) * codec.scale[:, None, None]
    assert torch.allclose(codec.encode(images), scaled, atol=1e-6)


# samplers of a U-Net


@pytest.mark.parametrize("size", [(8, 8), (9, 12), (7, 5)])
@pytest.mark.parametrize("wavelet", ["haar", "db2", "sym4"])
def test_an_untrained_pair_keeps_the_low_band(wavelet, size):
    maps = uniform(2, 6, *size)
    low = WaveletDownsample(6, wavelet)(maps, temb=None)
    assert low.shape == (2, 6, -(-size[0] // 2), -(-size[1] // 2))
    assert torch.allclose(2 * low, WaveletPacket2d(wavelet)(maps)[:, ::4], atol=1e-6)
    back = WaveletUpsample(6, wavelet)(low, torch.Size(size))
    assert back.shape == maps.shape
    constant = torch.full_like(maps, 0.7)
    back = WaveletUpsample(6, wavelet)(WaveletDownsample(6, wavelet)(constant), size)
    assert torch.allclose(back, constant, atol=1e-5)


def test_haar_samplers_start_as_means_and_copies():
    maps = uniform(1, 4, 10, 12)
    assert torch.allclose(WaveletDownsample(4)(maps), F.avg_pool2d(maps, 2), atol=1e-6)
    assert torch.allclose(WaveletUpsample(4)(maps), F.interpolate(maps, scale_factor=2), atol=1e-6)
    assert WaveletDownsample(4, out_channels=8)(maps).shape == (1, 8, 5, 6)
    pairs = (maps[:, :2] + maps[:, 2:]) / 2
    assert torch.allclose(WaveletUpsample(4, out_channels=2)(maps), F.interpolate(pairs, scale_factor=2), atol=1e-6)


def test_samplers_take_their_places_in_a_unet_and_learn():
    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    network = UNet2DModel(in_channels=3, out_channels=3, block_out_channels=(16, 16), layers_per_block=1,
                          norm_num_groups=8, attention_head_dim=8, **blocks)
    down, up = WaveletDownsample(16), WaveletUpsample(16, "db2")
    network.down_blocks[0].downsamplers[0], network.up_blocks[0].upsamplers[0] = down, up
    answer = network(uniform(2, 3, 16, 16), torch.tensor([3, 5])).sample
    assert answer.shape == (2, 3, 16, 16)
    answer.square().mean().backward()
    for mix, details in [(down.mix, down.mix.weight.grad.unflatten(1, (16, 4))[:, :, 1:]),
                         (up.mix, up.mix.weight.grad.unflatten(0, (16, 4))[:, 1:])]:
        assert mix.weight.grad.isfinite().all() and details.abs().max() > 0
    assert {"mix.weight", "mix.bias"} == set(down.state_dict())
