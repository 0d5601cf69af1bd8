"""Unconditional diffusion: noise, the forward process, the return from partial noise, and every way to be refused."""
import pytest
import torch
from diffusers import DDIMScheduler

from adiff.core import InputError
from adiff.diffusion.gaussian import GaussianForwardProcess
from adiff.diffusion.noise import NOISES, draw_noise
from adiff.diffusion.partial_noising import PartialNoisingCorrection

SCHEDULES, TARGETS = ("linear", "squaredcos_cap_v2"), ("epsilon", "v_prediction")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def z0():
    return torch.randn(6, 4, 16, 16, generator=seeded(9))


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("shape", [(2, 48, 16, 16), (3, 1, 7, 12), (1, 3, 64, 64)])
def test_noise_has_mean_0_and_variance_1_and_follows_the_generator(kind, shape):
    noise = draw_noise(kind, shape, seeded())
    assert noise.shape == shape and noise.dtype == torch.float32 and noise.isfinite().all()
    assert noise.mean().abs() < 0.2 and abs(noise.std() - 1) < 0.2
    assert torch.equal(noise, draw_noise(kind, shape, seeded()))
    assert not torch.equal(noise, draw_noise(kind, shape, seeded(1)))


def test_simplex_noise_is_smooth_continuous_and_the_same_along_both_axes():
    noise = draw_noise("simplex", (64, 2, 48, 48), seeded())
    assert noise.mean((2, 3)).abs().max() < 1e-5
    assert torch.allclose(noise.var((2, 3), correction=0), torch.ones(64, 2), atol=1e-4)
    down, right = noise.diff(dim=2).square().mean(), noise.diff(dim=3).square().mean()
    assert abs(down / right - 1) < 0.1 and down < 0.5                                # white noise: 2
    one_octave = NOISES["simplex"]((8, 1, 256, 256), seeded(), octaves=1)
    assert one_octave.diff(dim=2).abs().max() < 0.35 and one_octave.diff(dim=3).abs().max() < 0.35  # no seams


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("noise", NOISES)
def test_forward_process_can_be_undone_with_its_target(z0, schedule, target, noise):
    drawn = GaussianForwardProcess(400, schedule, target, noise).sample(z0, seeded())
    assert drawn.timesteps.dtype == torch.int64 and drawn.timesteps.shape == (6,) and drawn.timesteps.max() < 400
    assert drawn.mask is None and drawn.weights is None
    a = GaussianForwardProcess(400, schedule).scheduler.alphas_cumprod[drawn.timesteps].double().view(-1, 1, 1, 1)
    if target == "epsilon":
        found = (drawn.noisy - (1 - a).sqrt() * drawn.target) / a.sqrt()
    else:
        found = a.sqrt() * drawn.noisy - (1 - a).sqrt() * drawn.target
    assert torch.allclose(found.float(), z0, atol=1e-3)
    again = GaussianForwardProcess(400, schedule, target, noise).sample(z0, seeded())
    assert torch.equal(drawn.noisy, again.noisy) and torch.equal(drawn.timesteps, again.timesteps)


def test_min_snr_weights(z0):
    timesteps = torch.tensor([0, 200, 500, 999])
    for target, offset in zip(TARGETS, (0, 1)):
        forward = GaussianForwardProcess(prediction_type=target, min_snr_gamma=5.0)
        a = forward.scheduler.alphas_cumprod[timesteps]
        snr = a / (1 - a)
        assert torch.allclose(forward.loss_weights(timesteps), snr.clamp(max=5) / (snr + offset), rtol=1e-4)
        drawn = forward.sample(z0, seeded())
        assert torch.equal(drawn.weights, forward.loss_weights(drawn.timesteps))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
def test_return_from_the_end_takes_the_steps_of_diffusers_ddim(z0, schedule, target):
    """Where DDIMScheduler can go as well (a stride that divides T), both must arrive at the same place."""
    correction = PartialNoisingCorrection(100, schedule, target, strength=0.8, num_inference_steps=8, num_seeds=1)
    ddim = DDIMScheduler(100, beta_schedule=schedule, prediction_type=target, clip_sample=False, set_alpha_to_one=True,
                         timestep_spacing="trailing")
    ddim.set_timesteps(10)
    assert ddim.timesteps[2:].tolist() == correction.timesteps.tolist()
    z = ddim.add_noise(z0, correction.draw(0, z0.shape[1:]).expand_as(z0), ddim.timesteps[2:3].expand(len(z0)))
    for t in ddim.timesteps[2:]:
        z = ddim.step(torch.tanh(z), t, z).prev_sample
    assert torch.allclose(correction.correct(z0, lambda z, t: torch.tanh(z)), z, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("noise", NOISES)
def test_an_answer_depends_on_the_seed_and_not_on_the_batch(z0, noise):
    soften = lambda z, t: 0.5 * z
    correction = PartialNoisingCorrection(noise=noise, num_seeds=3, seed=7)
    together = correction.correct(z0, soften)
    alone = torch.cat([correction.correct(z[None], soften) for z in z0])
    assert torch.allclose(together, alone, atol=1e-6)
    assert not torch.allclose(PartialNoisingCorrection(noise=noise, num_seeds=3, seed=8).correct(z0, soften), together)


def test_callbacks_see_numbers_for_timesteps_and_the_first_seed_only(z0):
    asked, shown = [], []
    correction = PartialNoisingCorrection(100, strength=0.25, num_inference_steps=3, num_seeds=2)

    def predict(z, t):
        asked.append(t)
        return torch.zeros_like(z)

    correction.correct(z0, predict, lambda t, z: shown.append((t, z)))
    assert asked == 2 * correction.timesteps.tolist()
    assert [t for t, _ in shown] == correction.timesteps.tolist() == [24, 16, 7] and shown[0][1].shape == z0.shape


def test_more_strength_pulls_an_outlier_closer_to_normal():
    """Normals N(0, 0.3^2): the best noise estimate is known, and the outlier's remaining deviation falls with t*."""
    left = []
    for strength in (0.1, 0.25, 0.5, 0.8):
        correction = PartialNoisingCorrection(strength=strength, num_inference_steps=5, num_seeds=1)
        a = correction.scheduler.alphas_cumprod

        def best(z, t):
            at = a[t].view(-1, 1, 1, 1)
            return (1 - at).sqrt() * z / (at * 0.09 + 1 - at)

        pair = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
        normal, outlier = correction.correct(pair, best).flatten().tolist()
        left.append(outlier - normal)
    assert left == sorted(left, reverse=True) and left[0] < 0.95 and left[-1] < 0.1


def test_parts_are_saved_and_loaded(tmp_path, z0):
    forward = GaussianForwardProcess(500, "squaredcos_cap_v2", "v_prediction", "simplex", 5.0)
    forward.save_pretrained(tmp_path / "forward")
    loaded = GaussianForwardProcess.from_pretrained(tmp_path / "forward")
    for a, b in zip(forward.sample(z0, seeded()).to_tuple(), loaded.sample(z0, seeded()).to_tuple()):
        assert torch.equal(a, b)
    correction = PartialNoisingCorrection(500, "squaredcos_cap_v2", "v_prediction", "simplex", 0.4, 8, 2, 3)
    correction.save_pretrained(tmp_path / "correction")
    loaded = PartialNoisingCorrection.from_pretrained(tmp_path / "correction")
    assert torch.equal(loaded.correct(z0, lambda z, t: z), correction.correct(z0, lambda z, t: z))


@pytest.mark.parametrize("part, wrong, words", [
    (GaussianForwardProcess, dict(beta_schedule="cosine"), "squaredcos_cap_v2"),
    (GaussianForwardProcess, dict(prediction_type="sample"), "v_prediction"),
    (GaussianForwardProcess, dict(noise="perlin"), "simplex"),
    (GaussianForwardProcess, dict(min_snr_gamma=-1.0), "positive"),
    (PartialNoisingCorrection, dict(noise="perlin"), "simplex"),
    (PartialNoisingCorrection, dict(strength=0.0), r"\(0, 1\]"),
    (PartialNoisingCorrection, dict(strength=1.01), r"\(0, 1\]"),
    (PartialNoisingCorrection, dict(strength=float("nan")), r"\(0, 1\]"),
    (PartialNoisingCorrection, dict(num_inference_steps=0), "from 1 to t"),
    (PartialNoisingCorrection, dict(num_inference_steps=301), "from 1 to t"),
    (PartialNoisingCorrection, dict(strength=0.0001, num_inference_steps=1), "from 1 to t"),
    (PartialNoisingCorrection, dict(num_seeds=0), "num_seeds"),
])
def test_refusals_are_one_line_that_helps(part, wrong, words):
    with pytest.raises(InputError, match=words) as caught:
        part(**wrong)
    assert "\n" not in str(caught.value)
