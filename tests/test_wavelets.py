"""Wavelets: exact in every family, at every size, for signals and images; rotations; statistics, weights, samplers."""
import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from adiff.codecs.wavelets import WaveletCodec
from adiff.core import InputError
from adiff.codecs.wavelets import (WaveletDownsample, WaveletPacket1d, WaveletPacket2d, WaveletUpsample, band_names,
    band_statistics, orthogonal_wavelets, wavelet_decompose, wavelet_reconstruct, weight_bands)


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
    images = [uniform(1, 2, *size) for size in [(16, 24), (21, 13)]]
    signals = [uniform(2, 1, size) for size in (64, 127, 1)]
    for name in pywt.wavelist(family):
        for module, batches in [(WaveletPacket2d(name, levels), images), (WaveletPacket1d(name, levels), signals)]:
            for x in batches:
                size = x.shape[2:]
                coefficients = module(x)
                assert coefficients.shape[2:] == tuple(-(-n // 2**levels) for n in size)
                assert (module.inverse(coefficients, size=size) - x).abs().max() < 1e-5, (name, tuple(size))


def test_every_family_of_pyramids_comes_back():
    for name in orthogonal_wavelets():
        for x in [uniform(1, 1, 21, 40), uniform(1, 1, 127)]:
            pyramid = wavelet_decompose(x, name, levels=3)
            assert (wavelet_reconstruct(pyramid, name, x.shape[2:]) - x).abs().max() < 1e-5, name


@pytest.mark.parametrize("levels", [1, 3])
def test_even_sizes_keep_the_energy_of_every_family(levels):
    image, signal = uniform(1, 1, 24, 32), uniform(1, 1, 128)
    for name in orthogonal_wavelets():
        for coefficients, x in [(WaveletPacket2d(name, levels)(image), image),
                                (WaveletPacket1d(name, levels)(signal), signal)]:
            assert coefficients.numel() == x.numel()
            assert torch.isclose(coefficients.square().sum(), x.square().sum(), rtol=1e-5), name


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
def test_pyramids_are_those_of_pywavelets(size):
    image, signal = uniform(1, 1, *size), uniform(1, 1, size[0] * 3)
    for name in ["haar", "db4", "sym7", "coif2"]:
        low, *details = pywt.wavedec2(image[0, 0].double().numpy(), name, mode="periodization", level=2)
        pyramid = wavelet_decompose(image, name, 2)
        assert np.allclose(pyramid[0][0, 0], low, atol=1e-5)
        assert all(np.allclose(a[0, 0], b, atol=1e-5) for a, b in zip(pyramid[1:], details, strict=True))
        theirs = pywt.wavedec(signal[0, 0].double().numpy(), name, mode="periodization", level=2)
        ours = wavelet_decompose(signal, name, 2)
        assert all(np.allclose(a.flatten(), b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_rows_of_an_image_are_signals():
    image = uniform(1, 1, 8, 33)
    rows = WaveletPacket1d("db3")(image[:, 0].transpose(0, 1))
    columns = WaveletPacket1d("db3")(rows.permute(2, 1, 0))  # (17, 2, 8) to (17, 4, 4): low, high of each
    assert torch.allclose(WaveletPacket2d("db3")(image)[0], columns.permute(1, 2, 0), atol=1e-6)


@pytest.mark.parametrize("kind, shape", [(WaveletPacket1d, (1, 2, 9)), (WaveletPacket2d, (1, 1, 5, 6))])
def test_gradients_are_exact_for_odd_sizes(kind, shape):
    module, x = kind("db2", 2), uniform(*shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(module, x)
    assert torch.autograd.gradcheck(lambda c: module.inverse(c, size=shape[2:]), module(x).detach().requires_grad_())


@pytest.mark.parametrize("call, words", [
    (lambda: WaveletPacket2d()(torch.zeros(3, 8, 8)), "3 axes"),
    (lambda: WaveletPacket1d()(torch.zeros(1, 3, 8, 8)), "signals"),
    (lambda: WaveletPacket2d("haar", 1).inverse(torch.zeros(1, 6, 4, 4)), "multiple of 4"),
    (lambda: WaveletPacket1d("haar", 3).inverse(torch.zeros(1, 12, 4)), "multiple of 8"),
    (lambda: WaveletPacket2d("haar", 1).inverse(torch.zeros(1, 4, 4, 4), size=(6, 8)), "size"),
    (lambda: WaveletPacket1d("haar", 1).inverse(torch.zeros(1, 2, 4), size=(8, 8)), "size"),
    (lambda: wavelet_decompose(torch.zeros(1, 1, 8), "dmey"), "not orthogonal"),
    (lambda: wavelet_decompose(torch.zeros(1, 1, 8), "haar", -1), "levels"),
    (lambda: wavelet_decompose(torch.zeros(8, 8)), "axes"),
    (lambda: WaveletDownsample(4, "bior2.2"), "not orthogonal"),
    (lambda: WaveletUpsample(4)(torch.zeros(1, 4, 4, 4), (6, 8)), "size"),
    (lambda: wavelet_reconstruct(wavelet_decompose(torch.zeros(1, 1, 9)), size=16), "size"),
    (lambda: weight_bands(torch.zeros(1, 12, 4, 4), [1, 2, 3], 1), "each of the 4 bands"),
    (lambda: band_statistics(torch.zeros(1, 6, 4, 4), 1), "multiple of 4"),
])
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()


# statistics and weights


def test_statistics_count_every_value_once():
    images = uniform(3, 3, 32, 32)
    packet = WaveletPacket2d("db2", 2)
    table = band_statistics(packet(images), 2)
    assert list(table.index) == band_names(2) and np.isclose(table["energy"].sum(), 1)
    low = packet(images).unflatten(1, (3, 16))[:, :, 0]
    assert np.isclose(table["mean"]["LL.LL"], low.mean(), atol=1e-6)
    assert np.isclose(table["std"]["LL.LL"], low.std(correction=0), atol=1e-6)
    assert list(band_statistics(WaveletPacket1d("haar", 2)(images[0]), 2).index) == band_names(2, axes=1)


def test_a_codecs_scale_is_a_weight_for_each_band():
    images = uniform(8, 1, 32, 32) + torch.linspace(-1, 1, 32)
    codec = WaveletCodec("haar", levels=1, image_channels=1).fit_scale([images])
    shifted = codec.transform(images) - codec.shift[:, None, None]
    assert torch.allclose(codec.encode(images), weight_bands(shifted, codec.scale, 1), atol=1e-6)
    assert np.allclose(1 / codec.scale, band_statistics(codec.transform(images), 1)["std"], rtol=1e-4)


# samplers of a U-Net


@pytest.mark.parametrize("size", [(8, 8), (9, 12), (7, 5)])
@pytest.mark.parametrize("wavelet", ["haar", "db2", "sym4"])
def test_an_untrained_pair_keeps_the_low_band(wavelet, size):
    maps = uniform(2, 6, *size)
    low = WaveletDownsample(6, wavelet)(maps, temb=None)
    assert low.shape == (2, 6, -(-size[0] // 2), -(-size[1] // 2))
    assert torch.allclose(2 * low, wavelet_decompose(maps, wavelet)[0], atol=1e-6)
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
