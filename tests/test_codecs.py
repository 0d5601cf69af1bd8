"""Codecs and the wavelets below them: exactness, saving and loading, real weights, and every way to be refused."""
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import pywt
import torch
from PIL import Image

from adiff.codecs.autoencoders import KLCodec, TinyCodec
from adiff.codecs.codec import Codec
from adiff.codecs.load import load_codec
from adiff.codecs.wavelets import WaveletCodec
from adiff.core import InputError
from adiff.codecs.wavelets import WaveletPacket2d, band_names, orthogonal_wavelets

KL_CONFIG = dict(block_out_channels=[8, 8, 8, 8], norm_num_groups=4, layers_per_block=1,
                 down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
TINY_CONFIG = dict(encoder_block_out_channels=[16] * 4, decoder_block_out_channels=[16] * 4)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    "No ADIFF_WEIGHTS, an empty hub cache and a network that fails the test when it is touched."
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.delenv("ADIFF_WEIGHTS", raising=False)
    monkeypatch.setattr("adiff.codecs.load.try_to_load_from_cache", lambda repository, file: None)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# wavelets


def test_every_orthogonal_family_is_exact_and_keeps_energy():
    images = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    names = orthogonal_wavelets()
    assert len(names) > 70
    for name in names:
        module = WaveletPacket2d(name)
        bands = module(images)
        assert bands.shape == (1, 4, 16, 16)
        assert torch.allclose(module.inverse(bands), images, atol=1e-5), name
        assert torch.isclose(bands.square().sum(), images.square().sum(), rtol=1e-5), name
        expected = pywt.dwt2(images[0, 0].double().numpy(), name, mode="periodization")
        assert np.allclose(bands[0].numpy(), [expected[0], *expected[1]], atol=1e-5), name


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["haar", "db4", "coif3"])
def test_packets_of_every_depth(name, levels, images):
    module = WaveletPacket2d(name, levels)
    bands = module(images[..., :32, :48])
    assert bands.shape == (2, 3 * 4**levels, 32 // 2**levels, 48 // 2**levels)
    assert len(band_names(levels)) == 4**levels
    assert torch.allclose(module.inverse(bands), images, atol=1e-5)


def test_filters_longer_than_the_image():
    images = torch.randn(1, 1, 4, 8)
    module = WaveletPacket2d("coif5", 2)
    assert torch.allclose(module.inverse(module(images)), images, atol=1e-5)


def test_gradients_are_the_transpose():
    module = WaveletPacket2d("db3", 2)
    x = torch.randn(1, 2, 16, 16, requires_grad=True)
    bands = module(x)
    direction = torch.randn_like(bands)
    bands.backward(direction)
    assert torch.allclose(x.grad, module.inverse(direction), atol=1e-5)


@pytest.mark.parametrize("wavelet, levels, words", [
    ("bior2.2", 1, "not orthogonal"), ("dmey", 1, "not orthogonal"), ("hair", 1, "unknown wavelet"),
    ("haar", -1, "levels"), ("haar", 1.5, "levels"), (None, 1, "wavelet"),
])
def test_unusable_wavelets_are_refused(wavelet, levels, words):
    with pytest.raises(InputError, match=words):
        WaveletPacket2d(wavelet, levels)


def test_the_wavelet_codec_refuses_sizes_that_cannot_be_halved():
    with pytest.raises(InputError, match="30x48.*multiples of 4"):
        WaveletCodec("haar", 2).encode(torch.zeros(1, 3, 30, 48))


# the contract, for each codec


def make_codec(kind):
    torch.manual_seed(0)
    codec = {"wavelet": lambda: WaveletCodec("db2", levels=2), "kl": lambda: KLCodec(KL_CONFIG),
             "taesd": lambda: TinyCodec(TINY_CONFIG),
             "taef2": lambda: TinyCodec({**TINY_CONFIG, "latent_channels": 32}, pooled=True)}[kind]()
    return codec.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["wavelet", "kl", "taesd", "taef2"])
def test_contract_scale_and_round_trip(kind, images, tmp_path):
    codec = make_codec(kind).fit_scale([images[:1], images[1:]])
    latents = codec.encode(images)
    assert latents.shape[1:] == codec.latent_shape(32, 48) and codec.decode(latents).shape == images.shape
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    assert torch.allclose(latents.std((0, 2, 3), correction=0), torch.ones(codec.latent_channels), atol=1e-3)
    raw = codec._encode_raw(images)[0]
    assert torch.allclose(latents / codec.scale[:, None, None] + codec.shift[:, None, None], raw, atol=1e-5)

    codec.save_pretrained(tmp_path / "codec")
    assert {path.suffix for path in (tmp_path / "codec").iterdir()} == {".json", ".safetensors"}
    loaded = load_codec(tmp_path / "codec")
    assert type(loaded) is type(codec) and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded.encode(images), latents)
    assert torch.equal(loaded.decode(latents), codec.decode(latents))


@pytest.mark.parametrize("kind", ["wavelet", "kl", "taef2"])
def test_gradients_flow_through_both_directions(kind, images):
    codec = make_codec(kind)
    x = images.clone().requires_grad_()
    codec(x).square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0


def test_only_kl_has_a_standard_deviation(images):
    codec = make_codec("kl")
    mean, std = codec.posterior(images)
    raw_mean, raw_std = codec._encode_raw(images)
    assert torch.allclose(mean, raw_mean * 0.18215) and torch.allclose(std, raw_std * 0.18215)
    assert make_codec("wavelet").posterior(images)[1] is None and make_codec("taesd").posterior(images)[1] is None


def test_constant_channels_are_only_shifted():
    codec = WaveletCodec(levels=1).fit_scale([torch.full((1, 3, 8, 8), 0.5)])
    assert torch.equal(codec.scale, torch.ones(12))
    assert torch.allclose(codec.encode(torch.full((1, 3, 8, 8), 0.5)), torch.zeros(1, 12, 4, 4), atol=1e-6)
    with pytest.raises(InputError, match="no images"):
        codec.fit_scale([])


def test_sizes_and_missing_decoders_are_refused(images):
    with pytest.raises(InputError, match="100x96.*multiples of 8"):
        make_codec("taef2").encode(torch.zeros(1, 3, 100, 96))

    class Features(Codec):
        has_decoder = False

    with pytest.raises(InputError, match="has no decoder"):
        Features().decode(torch.zeros(1, 3, 4, 4))


def test_codec_inside_a_pipeline(images, tmp_path):
    from diffusers import DiffusionPipeline

    class Holder(DiffusionPipeline):
        def __init__(self, codec):
            super().__init__()
            self.register_modules(codec=codec)

    codec = make_codec("taef2").fit_scale([images])
    Holder(codec).save_pretrained(tmp_path)
    assert torch.equal(Holder.from_pretrained(tmp_path).codec.encode(images), codec.encode(images))


# folders of others


@pytest.mark.parametrize("kind", ["kl", "taesd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_diffusers_folder_by_name_and_path(kind, dtype, images, tmp_path, monkeypatch, no_weights):
    codec, name = make_codec(kind), {"kl": "sd-vae-ft-ema", "taesd": "taesd"}[kind]
    codec.autoencoder.to(dtype).save_pretrained(tmp_path / name)
    codec.autoencoder.float()
    monkeypatch.setenv("ADIFF_WEIGHTS", str(tmp_path))
    for loaded in (load_codec(name), load_codec(tmp_path / name)):
        assert loaded.dtype == torch.float32
        assert torch.allclose(loaded.encode(images), codec.encode(images), atol=1e-6)
        assert str(tmp_path) not in str(dict(loaded.config))


def write_author_files(codec, folder, name="taef2"):
    folder.mkdir(exist_ok=True)
    encoder = {key: tensor.half() for key, tensor in codec.autoencoder.encoder.layers.state_dict().items()}
    decoder = {f"{int(key.split('.')[0]) + 1}.{key.split('.', 1)[1]}": tensor.half()
               for key, tensor in codec.autoencoder.decoder.layers.state_dict().items()}
    torch.save(encoder, folder / f"{name}_encoder.pth")
    torch.save(decoder, folder / f"{name}_decoder.pth")
    return encoder, decoder


@pytest.mark.parametrize("channels, pooled", [(32, True), (4, False)])
def test_author_files_and_saving_them(channels, pooled, images, tmp_path):
    codec = TinyCodec({"latent_channels": channels}, pooled=pooled)
    write_author_files(codec, tmp_path / "weights")
    loaded = load_codec(tmp_path / "weights")
    assert loaded.config.pooled is pooled and loaded.latent_channels == channels and loaded.dtype == torch.float32
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_codec(tmp_path / "saved").encode(images), loaded.encode(images))


def test_safetensors_as_on_the_hub(images, tmp_path):
    from safetensors.torch import save_file

    codec = TinyCodec({"latent_channels": 32}, pooled=True).eval()
    save_file({key: tensor.contiguous() for key, tensor in codec.autoencoder.state_dict().items()},
              tmp_path / "taef2.safetensors")
    with torch.no_grad():
        assert torch.equal(load_codec(tmp_path).encode(images), codec.encode(images))


class Malicious:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_broken_author_files_name_the_file(tmp_path):
    folder = tmp_path / "weights"
    encoder, decoder = write_author_files(TinyCodec({"latent_channels": 4}), folder)

    def message():
        with pytest.raises(InputError) as raised:
            load_codec(folder)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    torch.save({**encoder, "0.weight": Malicious(tmp_path / "ran")}, folder / "taef2_encoder.pth")
    assert "taef2_encoder.pth: refused" in message() and not (tmp_path / "ran").exists()
    for content in (b"", b"not a zip", b"PK\x03\x04 cut"):
        (folder / "taef2_encoder.pth").write_bytes(content)
        assert "taef2_encoder.pth: " in message()
    torch.save([1, 2], folder / "taef2_encoder.pth")
    assert "not a dictionary of tensors" in message()
    torch.save({**encoder, "99.weight": torch.zeros(1)}, folder / "taef2_encoder.pth")
    assert "taef2_encoder.pth: not the weights" in message() and "99.weight" in message()
    torch.save(encoder, folder / "taef2_encoder.pth")
    torch.save(encoder, folder / "taef2_decoder.pth")  # the wrong half
    assert "taef2_decoder.pth: not the weights" in message()
    (folder / "taef2_decoder.pth").unlink()
    assert "taef2_decoder.pth: no such file" in message()


def test_broken_saved_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="no codec here"):
        load_codec(tmp_path)
    make_codec("kl").save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be loaded as KLCodec"):
        load_codec(tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match="cannot be loaded as KLCodec"):
        load_codec(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(InputError, match="UNet2DModel, not a codec"):
        load_codec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load_codec(tmp_path)


# names


@pytest.mark.parametrize("make, size, channels", [
    (lambda: load_codec("wavelet", levels=2, image_channels=1), 64, (1,)),
    (lambda: load_codec("pixels", levels=0), 240, (3,)),
    (lambda: load_codec("features"), 240, (1, 3)), (lambda: make_codec("taef2"), 128, (3,)),
])
def test_each_codec_names_a_suitable_size(make, size, channels):
    codec = make()
    assert codec.suitable_size(240) == size and codec.accepted_channels == channels
    assert codec.latent_shape(size, size)[0] == codec.latent_channels


def test_features_are_a_kind_and_come_back_from_a_folder(tmp_path, images):
    codec = load_codec("features", depths=(4,), input_size=64)
    codec.save_pretrained(tmp_path)
    assert torch.equal(load_codec(tmp_path).encode(images), codec.encode(images))
    with pytest.raises(InputError, match="known: backbone, depths, input_size"):
        load_codec("features", levels=2)


def test_wavelet_never_touches_the_network(no_weights, images):
    codec = load_codec("wavelet", wavelet="sym4", levels=1, image_channels=1)
    assert codec.latent_channels == 4 and codec.downsample == 2


def test_unknown_names_and_options():
    with pytest.raises(InputError, match="unknown codec 'wavelte'.*taef2"):
        load_codec("wavelte")
    with pytest.raises(InputError, match="no option 'depth'; known: wavelet, levels, image_channels"):
        load_codec("wavelet", depth=2)
    with pytest.raises(InputError, match="known: none"):
        load_codec("taef2", levels=2)


@pytest.mark.parametrize("name", ["taef2", "taesd", "sd-vae-ft-ema", "sd-vae-ft-mse"])
def test_not_found_names_all_three_places(name, no_weights, monkeypatch, tmp_path):
    monkeypatch.setenv("ADIFF_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as raised:
        load_codec(name)
    text = str(raised.value)
    assert str(tmp_path / name) in text and "hub's cache" in text and "on the hub" in text and "\n" not in text


def test_the_hubs_cache_comes_second(no_weights, monkeypatch, tmp_path, images):
    codec = make_codec("kl")
    codec.autoencoder.save_pretrained(tmp_path / "cached")
    monkeypatch.setenv("ADIFF_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("adiff.codecs.load.try_to_load_from_cache",
                        lambda repository, file: str(tmp_path / "cached" / file))
    assert torch.equal(load_codec("sd-vae-ft-mse").encode(images), codec.encode(images))


@pytest.mark.slow
def test_no_network_is_found_out_quickly_and_quietly(tmp_path):
    code = ("import time; from adiff.codecs.load import load_codec, InputError; start = time.time()\n"
            "try: load_codec('taesd')\n"
            "except InputError as error: print(error)\n"
            "assert time.time() - start < 8")
    environment = {key: value for key, value in os.environ.items() if key not in ("ADIFF_WEIGHTS", "HF_HUB_OFFLINE")}
    environment |= {"HF_HUB_CACHE": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}  # a port nobody listens on
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.startswith("codec 'taesd': no weights") and ran.stderr == ""


# the real thing


def test_taef2_weights_on_real_images(shared, monkeypatch, no_weights):
    weights, bottles = shared / "weights" / "taef2", shared / "data" / "mvtec_ad" / "bottle" / "train" / "good"
    if not weights.is_dir() or not bottles.is_dir():
        pytest.skip("needs the TAEF2 weights and MVTec bottle in the shared folder")
    monkeypatch.setenv("ADIFF_WEIGHTS", str(shared / "weights"))
    codec = load_codec("taef2")
    paths = sorted(bottles.glob("*.png"))[:4]
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB").crop((16, 16, 272, 272))) for path in paths])
    images = torch.tensor(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = codec.encode(images)
        error = (codec.decode(latents).clip(-1, 1) - images).square().mean((1, 2, 3))
    psnr = (10 * torch.log10(4 / error)).mean()
    assert latents.shape == (4, 32, 32, 32)
    assert 34 < psnr < 36 and 0.75 < latents.std() < 0.85
