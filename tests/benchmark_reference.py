"""The same maths as the package's, written down plainly from the papers.

test_benchmark.py compares detections with it. Nothing here is slow on purpose, and nothing is clever.
"""
import math

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from scipy.ndimage import gaussian_filter, map_coordinates


def plain_network(network):
    """A `ClassTokenUNet` as a function (z, timesteps, class labels) -> answer: diffusers' U-Net with the softmax of
    every attention in full."""
    unet = UNet2DConditionModel.from_config(network.unet.config)
    unet.load_state_dict(network.unet.state_dict())
    unet.set_attn_processor(AttnProcessor())
    unet.eval()

    @torch.no_grad()
    def answer(z, timesteps, class_labels):
        return unet(z, timesteps, encoder_hidden_states=network.class_embedding(class_labels)[:, None]).sample
    return answer


def plain_correction(answer, z, class_labels, steps=5, total=10):
    """DeCo-Diff's correction of z (N, C, h, w) as a loop over t = 8, 6, 4, 2, 0: z <- z - s_t h + s_t' h, where h is
    the answer at t.
    s_t = sqrt(1 - abar_t) of the cosine schedule; the last step goes to s = 0.
"""
    def remaining(u):
        return math.cos((u / total + 0.008) / 1.008 * math.pi / 2)**2

    betas = [min(1 - remaining(t + 1) / remaining(t), 0.999) for t in range(total)]
    s = np.sqrt(1 - np.cumprod(1 - np.array(betas)))
    visited = list(range(0, total, total // steps))[::-1]
    for t, below in zip(visited, [*visited[1:], None]):
        h = answer(z, torch.full((len(z),), t), class_labels)
        z = z - float(s[t]) * h + (0.0 if below is None else float(s[below])) * h
    return z


def plain_maps(z, corrected, reference, reconstruction, size, pixel_cap=0.4, latent_cap=0.2, pixel_sigma=3.0,
               latent_sigma=1.0):
    """DeCo-Diff's maps, name -> array (N, size, size), picture by picture: capped differences, a Gaussian, a resize,
    the geometric mean.
    z, corrected: (N, C, h, w); reference, reconstruction: (N, 3 or 1, H, W); tensors. Sigmas in cells and pixels.
"""
    maps = {"pixel": [], "latent": [], "anomaly": []}
    for one in zip(z, corrected, reference, reconstruction):
        before, after, image, repaired = (tensor.numpy() for tensor in one)
        pixel = np.minimum(np.abs(repaired - image).max(0) / pixel_cap, 1)
        latent = np.minimum(np.abs(after - before).mean(0) / latent_cap, 1)
        pixel = plain_resize(gaussian_filter(pixel, pixel_sigma), size)
        latent = plain_resize(gaussian_filter(latent, latent_sigma), size)
        for name, one_map in {"pixel": pixel, "latent": latent, "anomaly": np.sqrt(pixel * latent)}.items():
            maps[name].append(one_map)
    return {name: np.stack(found) for name, found in maps.items()}


def plain_resize(one_map, size):
    "A map (h, w) resized to (size, size) bilinearly, mirrored beyond the edge."
    at = [(np.arange(size) + 0.5) * length / size - 0.5 for length in one_map.shape]
    return map_coordinates(one_map, np.meshgrid(*at, indexing="ij"), order=1, mode="mirror").clip(0, 1)
