"""What must hold for any input: loaders, wavelets, the masks of the forward process, metrics, sounds and tables.

Hypothesis looks for what breaks it.
"""
import csv
import io
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from scipy.ndimage import label as label_regions
from sklearn import metrics as reference

from adiff.scores import metrics
from adiff.scores.pixel_counts import counted_metrics, pixel_counts, weighted_image_metrics
from adiff.data.sounds import LogMel, read_sound
from adiff.codecs.pixels import PixelCodec
from adiff.codecs.wavelets import WaveletCodec
from adiff.core import InputError, derive_seed, read_json, write_json
from adiff.data.images import PROTOCOLS, ImageProcessor, read_image, to_array, to_tensor
from adiff.data.reading import read_dataset
from adiff.diffusion.masked import MaskedForwardProcess, official_patches, random_patch_mask, shuffle_patches
from adiff.codecs.wavelets import WaveletPacket2d, orthogonal_wavelets

# the same examples every time, so that a test does not fail by chance for someone who changed something else
settings.register_profile("adiff", derandomize=True, deadline=None, max_examples=150, database=None,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("adiff")
pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = st.integers(0, 2**32 - 1)


def noise(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- pictures

MODES = {"1": bool, "L": np.uint8, "LA": np.uint8, "P": np.uint8, "RGB": np.uint8, "RGBA": np.uint8, "CMYK": np.uint8,
         "YCbCr": np.uint8, "LAB": np.uint8, "HSV": np.uint8, "I": np.int32, "I;16": np.uint16, "F": np.float32}


@st.composite
def pictures(draw):
    "A PIL image of any mode and size, a few with values that are none."
    mode, size = draw(st.sampled_from(sorted(MODES))), (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    rng = np.random.default_rng(draw(SEEDS))
    if mode == "F":
        low, high = draw(st.sampled_from([(0, 1), (0, 2), (-1, 1), (0, math.nan)]))
        return Image.fromarray((rng.random(size[::-1]) * (high - low) + low).astype(np.float32))
    if mode == "I":
        low, high = draw(st.sampled_from([(0, 65536), (0, 70000), (-5, 255)]))
        return Image.fromarray(rng.integers(low, high, size[::-1], np.int32))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, size[::-1], np.uint16))
    return Image.frombytes(mode, size, rng.bytes(len(Image.new(mode, size).tobytes())))


@given(pictures(), st.sampled_from([*PROTOCOLS.values(), ImageProcessor("small", 24, 16)]))
def test_any_picture_becomes_a_frame_or_is_refused(picture, protocol):
    try:
        processor = protocol.load(picture)
    except InputError as error:
        assert picture.mode in ("F", "I") and str(error).isprintable()
        return
    assert processor.shape == (3, protocol.size, protocol.size) and processor.dtype == torch.float32
    assert processor.min() >= -1 and processor.max() <= 1
    rgb = read_image(picture)
    assert rgb.mode == "RGB" and rgb.size == picture.size
    mask = protocol.mask(picture)
    assert mask.shape == (protocol.size, protocol.size) and mask.dtype == bool


@given(arrays.arrays(st.sampled_from([np.bool_, np.uint8, np.uint16, np.int16, np.int64, np.float16, np.float32,
                                      np.float64]),
                     arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=6)))
def test_any_array_becomes_a_picture_or_is_refused(values):
    try:
        rgb = read_image(values)
    except InputError as error:
        assert str(error).isprintable()
        return
    assert values.ndim in (2, 3) and rgb.size == values.shape[1::-1] and rgb.mode == "RGB"
    if values.dtype == np.uint8 and values.ndim == 2:
        assert np.array_equal(np.asarray(rgb)[..., 0], values)


@given(st.binary(max_size=300),
       st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"II*\0", b"BM",
                        b"RIFF\0\0\0\0WEBP"]))
def test_any_bytes_are_a_picture_or_refused(tmp_path, content, start):
    (tmp_path / "x.png").write_bytes(start + content)
    try:
        assert read_image(tmp_path / "x.png").mode == "RGB"
    except InputError as error:
        assert "x.png" in str(error) and str(error).isprintable()


@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20), st.just(3))))
def test_to_array_undoes_to_tensor(values):
    tensor = to_tensor(Image.fromarray(values))
    assert tensor.shape == (3, *values.shape[:2]) and tensor.abs().max() <= 1
    assert np.array_equal(to_array(tensor), values)


@given(st.integers(8, 64), st.data(), st.integers(1, 90), st.integers(1, 90))
def test_a_map_is_placed_where_its_frame_was(resize, data, width, height):
    crop = data.draw(st.none() | st.integers(1, resize))
    protocol = ImageProcessor("any", resize, crop)
    ones = protocol.place(np.ones((protocol.size,) * 2), (width, height))
    assert ones.shape == (height, width) and set(np.unique(ones.round(6))) <= {0, 1}
    for axis, length in ((0, height), (1, width)):  # the centres of the pixels that lie inside the crop, by definition
        margin = (resize - protocol.size) // 2
        centres = (np.arange(length) + 0.5) * resize / length
        inside = (centres >= margin - 1e-9) & (centres <= margin + protocol.size + 1e-9)
        assert np.array_equal(ones.max(axis=1 - axis) > 0, inside & bool(ones.any()))
    values = np.random.default_rng(0).random((protocol.size,) * 2)
    placed = protocol.place(values, (width, height))
    assert placed[ones > 0].size == 0 or (values.min() - 1e-6 <= placed[ones > 0].min()
                                          and placed.max() <= values.max() + 1e-6)
    if (width, height) == (protocol.size,) * 2 and resize == protocol.size:
        assert np.allclose(placed, values)


# ---- wavelets

WAVELETS, SIDES = st.sampled_from(orthogonal_wavelets()), st.integers(1, 70)


@given(WAVELETS, st.integers(0, 4), SIDES, SIDES, SEEDS)
def test_packets_of_any_size_come_back(wavelet, levels, height, width, seed):
    transform, x = WaveletPacket2d(wavelet, levels), noise((2, 2, height, width), seed, torch.float64)
    coefficients = transform(x)
    assert coefficients.shape == (2, 2 * 4**levels, -(-height // 2**levels), -(-width // 2**levels))
    assert torch.allclose(transform.inverse(coefficients, size=(height, width)), x, atol=1e-7)


@given(WAVELETS, st.integers(0, 3), st.integers(1, 8), st.integers(1, 8), SEEDS)
def test_packets_are_orthonormal_and_linear(wavelet, levels, rows, columns, seed):
    transform, shape = WaveletPacket2d(wavelet, levels), (1, 1, rows * 2**levels, columns * 2**levels)
    x, y = noise(shape, seed, torch.float64), noise(shape, seed + 1, torch.float64)
    assert transform(x).numel() == x.numel()
    assert torch.isclose((transform(x) * transform(y)).sum(), (x * y).sum(), atol=1e-6)
    assert torch.allclose(transform(2 * x - 3 * y), 2 * transform(x) - 3 * transform(y), atol=1e-8)


@given(st.sampled_from(["wavelet", "pixels"]), st.integers(0, 3), st.integers(1, 4), SEEDS)
def test_a_codec_with_any_measured_scale_loses_nothing(kind, levels, channels, seed):
    codec = {"wavelet": WaveletCodec, "pixels": PixelCodec}[kind](levels=levels, image_channels=channels)
    images = noise((4, channels, 16, 24), seed).clamp(-1, 1)
    codec.fit_scale([images])
    latents = codec.encode(images)
    assert latents.shape[1:] == codec.latent_shape(16, 24)
    assert torch.allclose(codec.decode(latents), images, atol=1e-5)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4 and (latents.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-3


# ---- masks


@given(st.integers(1, 5), st.integers(1, 33), st.integers(1, 33), st.integers(1, 16), SEEDS)
def test_a_mask_corrupts_the_share_that_it_is_told_in_whole_patches(batch, height, width, patch, seed):
    generator = torch.Generator().manual_seed(seed)
    ratio = torch.rand(batch, generator=generator)
    mask = random_patch_mask(batch, height, width, patch, ratio, generator)
    assert mask.shape == (batch, 1, height, width) and set(mask.unique().tolist()) <= {0.0, 1.0}
    corners = mask[:, 0, ::patch, ::patch]  # one cell of every patch
    count = corners[0].numel()
    assert torch.equal((1 - corners).flatten(1).sum(1), count - torch.floor(count * (1 - ratio)))
    assert torch.equal(corners.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, :height, :width], mask[:, 0])


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.integers(1, 8), SEEDS)
def test_shuffling_moves_whole_patches_and_changes_no_value(batch, channels, height, width, patch, seed):
    height, width = height - height % patch or patch, width - width % patch or patch
    latents = torch.arange(batch * channels * height * width, dtype=torch.float32).view(batch, channels, height, width)
    shuffled = shuffle_patches(latents, patch, torch.Generator().manual_seed(seed))

    def patches(x):
        return x.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    order = patches(shuffled)[:, 0].argsort()
    assert torch.equal(patches(shuffled)[order], patches(latents)[patches(latents)[:, 0].argsort()])


@given(st.integers(1, 6), st.integers(1, 4), st.integers(2, 32), st.sampled_from(["batch", "image"]),
       st.integers(2, 30), SEEDS)
def test_what_is_corrupted_is_the_direction_times_its_step(batch, channels, side, per, steps, seed):
    sizes, probabilities = official_patches(side)
    process = MaskedForwardProcess(steps, sizes, probabilities, patch_size_per=per)
    z0 = noise((batch, channels, side, side), seed)
    drawn = process.sample(z0, torch.Generator().manual_seed(seed))
    assert drawn.mask.shape == (batch, 1, side, side)  # one mask for all channels
    assert set(drawn.mask.unique().tolist()) <= {0.0, 1.0}
    assert drawn.timesteps.min() >= 0 and drawn.timesteps.max() < steps
    s = (1 - process.alphas_cumprod[drawn.timesteps]).sqrt().view(-1, 1, 1, 1)
    assert torch.allclose(drawn.noisy - z0, s * drawn.target, atol=1e-4)
    kept = drawn.mask.expand_as(z0) > 0
    assert torch.equal(drawn.noisy[kept], z0[kept]) and not drawn.target[kept].any()
    assert (1 - drawn.mask).mean((1, 2, 3)).max() <= 1
    assert torch.isfinite(drawn.noisy).all() and torch.isfinite(drawn.target).all()


@given(SEEDS, st.lists(st.integers() | st.text(max_size=8), max_size=2))
@settings(max_examples=20)
def test_derived_seeds_are_seeds(seed, names):
    assert 0 <= derive_seed(seed, *names) < 2**63 and derive_seed(seed, *names) == derive_seed(seed, *names)


# ---- metrics

@st.composite
def ranked(draw, largest=40):
    "Labels of both kinds and scores with many ties or none."
    count = draw(st.integers(2, largest))
    labels = np.array(draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))
    assume(0 < labels.sum() < count)
    values = draw(st.sampled_from([st.integers(-3, 3), st.floats(-1e3, 1e3, width=32), st.floats(0, 1)]))
    return labels, np.array(draw(st.lists(values, min_size=count, max_size=count)), float)


IMAGE = ("image_auroc", "image_ap", "image_f1_max", "image_pauc")


@given(ranked(), SEEDS)
def test_image_metrics_are_the_reference_and_depend_on_the_order_only(made, seed):
    labels, scores = made
    found = metrics.image_metrics(labels, scores)
    assert found["notes"] == [] and all(0 <= found[name] <= 1 for name in IMAGE)
    assert found["image_auroc"] == pytest.approx(reference.roc_auc_score(labels, scores))
    assert found["image_ap"] == pytest.approx(reference.average_precision_score(labels, scores))
    order = np.random.default_rng(seed).permutation(len(labels))
    assert values(metrics.image_metrics(labels[order], scores[order])) == pytest.approx(values(found))
    ranks = np.unique(scores, return_inverse=True)[1]  # any rising function of the scores has these ranks
    assert values(metrics.image_metrics(labels, ranks**3 + 7.0)) == pytest.approx(values(found))
    assert metrics.image_metrics(labels, -ranks)["image_auroc"] == pytest.approx(1 - found["image_auroc"])
    # at least what calling everything anomalous reaches
    assert found["image_f1_max"] >= 2 * labels.mean() / (1 + labels.mean()) - 1e-12


@given(ranked(12), st.integers(1, 5), SEEDS)
def test_weights_are_repetitions(made, most, seed):
    labels, scores = made
    weights = np.random.default_rng(seed).integers(0, most + 1, len(labels))
    repeated = metrics.image_metrics(np.repeat(labels, weights), np.repeat(scores, weights)) if weights.sum() else {}
    found = weighted_image_metrics(labels, scores, weights[None])
    for name in IMAGE:
        wanted = repeated.get(name)
        assert np.isnan(found[name][0]) if wanted is None else found[name][0] == pytest.approx(wanted, abs=1e-9), name


@given(st.integers(0, 1), st.lists(st.floats(-10, 10), min_size=1, max_size=9))
def test_one_kind_alone_is_undefined_with_a_reason(kind, scores):
    found = metrics.image_metrics([kind] * len(scores), scores)
    assert [found[name] for name in IMAGE] == [None] * 4
    assert len(found["notes"]) == 4 and all("no " in note for note in found["notes"])
    masks, maps = np.full((1, 1, len(scores)), kind), np.array(scores)[None, None]
    found = metrics.pixel_metrics(masks, maps)
    assert [found[name] for name in metrics.METRIC_NAMES[3:]] == [None] * 4 and len(found["notes"]) == 4
    with pytest.raises(InputError):
        metrics.aupro(masks, maps)


@st.composite
def judged(draw):
    "Tiny masks with both kinds of pixel, and maps of few or many values."
    count, height, width = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(2, 6))
    masks = draw(arrays.arrays(bool, (count, height, width)))
    assume(masks.any() and not masks.all())
    elements = draw(st.sampled_from([st.integers(0, 3), st.floats(-5, 5, width=32)]))
    maps = draw(arrays.arrays(np.float32, masks.shape, elements=elements))
    return masks, maps


def values(found):
    "The numbers of a result, without its notes."
    return {name: value for name, value in found.items() if name != "notes"}


def brute_force_aupro(masks, maps, limit):
    "The definition: every value as a threshold, every region by itself."
    regions = [(image, regions == number) for image, mask in enumerate(masks)
               for regions, count in [label_regions(mask, np.ones((3, 3)))] for number in range(1, count + 1)]
    fpr, pro = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        fpr.append((maps >= threshold)[~masks].mean())
        pro.append(np.mean([(maps[image] >= threshold)[region].mean() for image, region in regions]))
    grid = np.unique([*(x for x in fpr if x < limit), limit])
    area = sum((min(right, limit) - left) * (np.interp(min(right, limit), [left, right], [low, high]) + low) / 2
               for left, right, low, high in zip(fpr, fpr[1:], pro, pro[1:]) if left < min(right, limit))
    return area / limit if len(grid) else 0.0


@given(judged(), st.floats(0.05, 1))
def test_pixel_metrics_are_their_definitions(made, limit):
    masks, maps = made
    found = metrics.pixel_metrics(masks, maps)
    assert all(0 <= found[name] <= 1 + 1e-12 for name in metrics.METRIC_NAMES[3:])
    assert found["pixel_auroc"] == pytest.approx(reference.roc_auc_score(masks.ravel(), maps.ravel()))
    assert found["pixel_ap"] == pytest.approx(reference.average_precision_score(masks.ravel(), maps.ravel()))
    assert metrics.aupro(masks, maps, limit) == pytest.approx(brute_force_aupro(masks, maps, limit), abs=1e-9)
    fpr, pro = metrics.pro_curve(masks, maps)
    assert (np.diff(fpr) >= 0).all() and (np.diff(pro) >= -1e-12).all()
    assert (fpr[0], pro[0]) == (0, 0) and (fpr[-1], pro[-1]) == pytest.approx((1, 1))
    assert metrics.area_up_to(fpr, pro, limit) == pytest.approx(metrics.aupro(masks, maps, limit), abs=1e-9)


@given(judged(), SEEDS)
def test_pixel_metrics_depend_on_the_order_only(made, seed):
    masks, maps = made
    found = values(metrics.pixel_metrics(masks, maps))
    ranks = np.unique(maps, return_inverse=True)[1].reshape(maps.shape)
    assert values(metrics.pixel_metrics(masks, np.exp(ranks / 50))) == pytest.approx(found)
    order = np.random.default_rng(seed).permutation(len(masks))
    assert values(metrics.pixel_metrics(masks[order], maps[order])) == pytest.approx(found)
    assert values(metrics.pixel_metrics(masks[:, ::-1], maps[:, ::-1])) == pytest.approx(found)
    perfect = metrics.pixel_metrics(masks, masks.astype(float))
    assert [perfect[name] for name in metrics.METRIC_NAMES[3:]] == pytest.approx([1, 1, 1, 1])
    assert metrics.pixel_metrics(masks, np.zeros(masks.shape))["pixel_auroc"] == pytest.approx(0.5)


@given(judged())
def test_counts_of_tiny_maps_are_exact(made):
    masks, maps = made
    exact, counted = metrics.pixel_metrics(masks, maps), counted_metrics(pixel_counts(masks, maps))
    for name, value in counted.items():
        assert value == pytest.approx(exact[name], abs=1e-6), name


# ---- sounds


@given(st.integers(1, 3), st.floats(0.0001, 2),
       st.sampled_from([8000, 16000, 22050, 44100, 48000, 11025, 96000, 7919]), st.floats(0, 1), SEEDS)
@settings(max_examples=25)
def test_any_sound_becomes_a_finite_picture(channels, seconds, rate, loudness, seed):
    length = max(channels, math.ceil(seconds * rate))
    samples = np.random.default_rng(seed).uniform(-loudness, loudness, (length, channels))
    processor = LogMel(seconds=1.0, size=50)
    pictures = [processor.load((samples, rate), window) for window in processor.windows((samples, rate))]
    assert all(picture.shape == (1, 50, 50) for picture in pictures)
    assert all(picture.isfinite().all() and picture.min() >= -1 for picture in pictures)
    waveform = read_sound((samples, rate), 16000)
    assert abs(len(waveform) - len(samples) * 16000 / rate) <= 2 and waveform.isfinite().all()
    starts = processor.windows((samples, rate))
    assert starts[0] == 0 and all(0 < later - earlier <= 0.5 + 1e-9 for earlier, later in zip(starts, starts[1:]))
    assert starts[-1] + 1.0 >= len(samples) / rate - 1 / 16000


@given(st.binary(max_size=200),
       st.sampled_from([b"", b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\x01\0", b"OggS", b"fLaC", b"ID3", b"FORM"]))
def test_any_bytes_are_a_sound_or_refused(tmp_path, content, start):
    (tmp_path / "x.wav").write_bytes(start + content)
    try:
        assert read_sound(tmp_path / "x.wav", 16000, seconds=1.0).ndim == 1
    except InputError as error:
        assert "x.wav" in str(error) and str(error).isprintable()


# ---- tables

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters="/\\"),
                min_size=1, max_size=12).filter(lambda name: name not in (".", "..") and not name.startswith("."))


@given(st.dictionaries(NAMES, st.tuples(st.sampled_from(["train", "val", "test"]), NAMES), min_size=1, max_size=8))
@settings(max_examples=30)
def test_split_tables_say_what_was_written(tmp_path_factory, rows):
    root = tmp_path_factory.mktemp("table")
    rows = {f"{number}{name}.png"[-60:]: row for number, (name, row) in enumerate(rows.items())}
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(["object", "split", "label", "image"])
    for name, (split, category) in rows.items():
        (root / name).write_bytes(b"x")
        writer.writerow([category, split, "normal", name])
    (root / "table.csv").write_text(buffer.getvalue(), encoding="utf-8", newline="")
    samples = read_dataset(root, split_table=root / "table.csv").samples
    assert dict(zip(samples.path, samples.category)) == {name: category for name, (_, category) in rows.items()}
    written = {"train": {"train", "validation"}, "val": {"validation"}, "test": {"test"}}
    assert all(split in written[rows[path][0]] for path, split in zip(samples.path, samples.split))
    samples.to_csv(root / "again.csv", index=False)  # as every table of ours is written
    assert pd.read_csv(root / "again.csv", dtype=str, keep_default_na=False).equals(samples.astype(str))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (st.lists(inner, max_size=3)
                   | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), inner, max_size=3)),
    max_leaves=8)


@given(JSON)
def test_json_comes_back(tmp_path, value):
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value


@given(st.text(max_size=40))
def test_an_input_error_is_one_line(text):
    assert str(InputError(text)).isprintable()
    assert not text.isprintable() or str(InputError(text)) == text
