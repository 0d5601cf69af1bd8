"""Parity with values computed by the official DeCo-Diff code (float32, CPU), within the tolerances beside them."""
import pytest
import torch
from safetensors.torch import load_file

from adiff.diffusion.deviation_correction import DeviationCorrection
from adiff.diffusion.masked import MaskedForwardProcess
from adiff.scores.deviation import DeviationDiscrepancy, combine_maps
from adiff.methods.official import convert_official_checkpoint, convert_official_unet, read_official_checkpoint
from adiff.networks.class_token_unet import ClassTokenUNet


@pytest.fixture(scope="module")
def checkpoint(shared):
    return shared / "golden" / "official_deco" / "official_layout.pt"


@pytest.fixture(scope="module")
def golden(shared):
    return load_file(shared / "golden" / "official_deco" / "golden.safetensors")


@pytest.fixture(scope="module")
def network(checkpoint):
    return convert_official_unet(read_official_checkpoint(checkpoint))


def close(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance


def test_schedule(golden):
    close(MaskedForwardProcess().alphas_cumprod, golden["alphas_cumprod"], 1e-5)


def test_forward_process_and_target(golden):
    forward, parts = MaskedForwardProcess(), [golden[name] for name in ("z0", "noise", "mask_keep", "t")]
    close(forward.add_deviation(*parts), golden["z_t"], 1e-5)
    close(forward.direction_of_deviation(*parts), golden["direction_of_deviation"], 1e-5)


@torch.no_grad()
def test_network_and_loss(golden, network):
    out = network(golden["z_t"], golden["t"], golden["class_id"]).sample
    close(out, golden["unet_out"], 1e-4)
    close((out - golden["direction_of_deviation"]).square().mean((1, 2, 3)), golden["loss_per_sample"], 1e-4)


@pytest.mark.parametrize("steps", [10, 5, 2])
@torch.no_grad()
def test_correction(golden, network, steps):
    correction = DeviationCorrection(num_inference_steps=steps)
    assert correction.timesteps.tolist() == golden[f"timesteps_steps{steps}"].tolist()
    corrected = correction.correct(golden["z0"], lambda z, t: network(z, t, golden["class_id"]).sample)
    close(corrected, golden[f"corrected_latent_steps{steps}"], 1e-4)


def test_maps(golden):
    maps = DeviationDiscrepancy()(golden["map_in_latent"], golden["map_in_latent_corrected"],
                                  golden["map_in_reference"], golden["map_in_reconstruction"], 256)
    close(maps["pixel"], golden["map_out_image_discrepancy"], 1e-3)
    close(maps["latent"], golden["map_out_latent_discrepancy"], 1e-3)
    close(maps["anomaly"], golden["map_out_anomaly_geometric"], 1e-3)
    close(combine_maps([maps["pixel"], maps["latent"]], "arithmetic"), golden["map_out_anomaly_aritmetic"], 1e-3)


@torch.no_grad()
def test_converted_folder_answers_alike(golden, network, checkpoint, tmp_path):
    convert_official_checkpoint(checkpoint, tmp_path / "unet", codec=None)
    loaded = ClassTokenUNet.from_pretrained(tmp_path / "unet", use_safetensors=True)
    close(loaded(golden["z_t"], golden["t"], golden["class_id"]).sample, golden["unet_out"], 1e-4)
