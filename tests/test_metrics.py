"""The metrics against scikit-learn, a brute-force AUPRO and the official code's value; memory, and what is refused."""
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, label
from scipy.stats import hmean
from sklearn import metrics as reference

from adiff.scores import metrics
from adiff.scores.pixel_counts import (bootstrap_weights, counted_metrics, counted_pro_curve, pixel_counts,
                                       weighted_image_metrics)
from adiff.core import InputError

IMAGE_NAMES = (*metrics.METRIC_NAMES[:3], "image_pauc")
PIXEL_NAMES = metrics.METRIC_NAMES[3:]


def f1_max(labels, scores):
    precision, recall, _ = reference.precision_recall_curve(labels, scores)
    return np.max(2 * precision * recall / np.maximum(precision + recall, 1e-300))


def brute_force_curve(masks, maps):
    "Every distinct score as a threshold, every region, every pixel."
    regions = []
    for index, mask in enumerate(masks):
        labels, number = label(mask, np.ones((3, 3)))
        regions += [(index, labels == k) for k in range(1, number + 1)]
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        above = maps >= threshold
        points.append((above[masks == 0].mean(), np.mean([above[index][region].mean() for index, region in regions])))
    return np.array(points).T


def brute_force_aupro(masks, maps, limit):
    fpr, pro = brute_force_curve(masks, maps)
    inside = fpr <= limit
    return reference.auc([*fpr[inside], limit], [*pro[inside], np.interp(limit, fpr, pro)]) / limit


@pytest.mark.parametrize("seed", range(60))
def test_pixel_metrics_equal_their_definitions(seed):
    rng = np.random.default_rng(seed)
    masks = rng.random((rng.integers(1, 5), *rng.integers(3, 14, 2))) < rng.choice([0.02, 0.15, 0.7])
    masks.flat[[0, -1]] = True, False
    maps = rng.random(masks.shape) + rng.choice([-0.5, 0, 0.5]) * masks
    maps = np.round(maps, rng.integers(0, 4)).astype(rng.choice([np.float32, np.float64]))  # few values: many ties
    found = metrics.pixel_metrics(masks, maps)
    flat = masks.ravel(), maps.ravel()
    expected = [reference.roc_auc_score(*flat), reference.average_precision_score(*flat), f1_max(*flat),
                brute_force_aupro(masks, maps, 0.3)]
    assert [found[name] for name in PIXEL_NAMES] == pytest.approx(expected, abs=1e-12)
    limit = rng.uniform(0.01, 1)
    assert metrics.aupro(masks, maps, limit) == pytest.approx(brute_force_aupro(masks, maps, limit), abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_pro_curve_passes_through_every_threshold(seed):
    rng = np.random.default_rng(seed)
    masks = rng.random((2, 8, 8)) < 0.2
    maps = np.round(rng.random(masks.shape), 1)
    fpr, pro = metrics.pro_curve(masks, maps)
    assert (fpr[0], pro[0], fpr[-1]) == (0, 0, 1) and pro[-1] == pytest.approx(1)
    assert (np.diff(fpr) >= 0).all() and (np.diff(pro) >= 0).all()
    for x, y in brute_force_curve(masks, maps).T:
        low, high = np.searchsorted(fpr, x), np.searchsorted(fpr, x, side="right")  # a step covers a range of heights
        heights = pro[low:high] if high > low else [np.interp(x, fpr, pro)]
        assert min(heights) - 1e-12 <= y <= max(heights) + 1e-12


@pytest.mark.parametrize("seed", range(20))
def test_image_metrics_equal_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    labels = np.append(rng.integers(0, 2, 20), [0, 1])
    scores = np.round(rng.random(22) + 0.3 * labels, 1)
    found = metrics.image_metrics(labels, scores)
    expected = [reference.roc_auc_score(labels, scores), reference.average_precision_score(labels, scores),
                f1_max(labels, scores), reference.roc_auc_score(labels, scores, max_fpr=0.1)]
    assert [found[name] for name in IMAGE_NAMES] == pytest.approx(expected, abs=1e-12)


def test_partial_auroc_by_its_formula():
    "McClish's standardisation, from the area under the ROC curve integrated by hand."
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 200)
    scores = np.round(rng.normal(labels), 1)
    fpr, tpr, _ = reference.roc_curve(labels, scores, drop_intermediate=False)
    area = 0.1 * metrics.area_up_to(fpr, tpr, 0.1)
    expected = (1 + (area - 0.005) / (0.1 - 0.005)) / 2
    assert metrics.image_metrics(labels, scores)["image_pauc"] == pytest.approx(expected, abs=1e-12)
    # perfect, blind, reversed
    for scores, value in ((labels, 1), (labels * 0, 0.5), (-labels, (1 - 0.005 / 0.095) / 2)):
        assert metrics.image_metrics(labels, scores)["image_pauc"] == pytest.approx(value, abs=1e-12)


def test_every_kind_of_input_gives_the_same_numbers():
    rng = np.random.default_rng(0)
    masks, maps = rng.random((3, 16, 16)) < 0.1, rng.random((3, 16, 16)).astype(np.float32)
    expected = metrics.pixel_metrics(masks, maps)
    assert metrics.pixel_metrics(torch.tensor(masks), torch.tensor(maps, requires_grad=True)) == expected
    assert metrics.pixel_metrics(list(masks.astype(np.uint8) * 255), list(maps)) == expected
    bfloat = torch.tensor(maps).bfloat16()
    assert metrics.pixel_metrics(masks, bfloat) == metrics.pixel_metrics(masks, bfloat.float())
    assert metrics.image_metrics(torch.tensor([True, False]), torch.tensor([0.4, 0.6]))["image_auroc"] == 0


def test_images_may_differ_in_size_and_normal_ones_count_as_false_positives():
    mask, scores = np.zeros((4, 4), int), np.zeros((4, 4))
    mask[0, 0], scores[0, 0] = 1, 0.5
    assert metrics.aupro([mask], [scores]) == 1
    alarm = np.ones((3, 5))  # 15 of 30 normal pixels are above the defect
    assert metrics.aupro([mask, alarm * 0], [scores, alarm]) == 0
    assert metrics.pixel_metrics([mask, alarm * 0], [scores, alarm])["pixel_auroc"] == pytest.approx(0.5)


def test_corner_contact_joins_a_region():
    mask = np.zeros((6, 6), int)
    mask[0, 0] = mask[1, 1] = mask[5, 5] = 1
    scores = np.where(mask, 1.0, 0.5)
    scores[0, 0] = 0.0  # half of one region of two pixels, so PRO is 3/4 from the start
    assert metrics.aupro([mask], [scores]) == pytest.approx(0.75, abs=1e-12)


def test_undefined_is_none_with_a_reason():
    for labels, kind in (([0, 0], "anomalous"), ([1, 1], "normal")):
        found = metrics.image_metrics(labels, [0.1, 0.2])
        assert [found[name] for name in IMAGE_NAMES] == [None] * 4
        assert found["notes"] == [f"{name}: no {kind} image" for name in IMAGE_NAMES]
    for value, kind in ((0, "anomalous"), (1, "normal")):
        masks, maps = np.full((2, 4, 4), value), np.random.default_rng(0).random((2, 4, 4))
        found = metrics.pixel_metrics(masks, maps)
        assert [found[name] for name in PIXEL_NAMES] == [None] * 4
        assert found["notes"] == [f"{name}: no {kind} pixel" for name in PIXEL_NAMES]
        for function in (metrics.aupro, metrics.pro_curve, metrics.official_aupro):
            with pytest.raises(InputError, match=f"no {kind} pixel"):
                function(masks, maps)


MASKS, MAPS = np.eye(4)[None], np.ones((1, 4, 4))


@pytest.mark.parametrize("masks, maps, message", [
    ([], [], "no image"),
    (MASKS, MAPS * np.nan, "map of image 0: contains NaN"),
    (MASKS, MAPS * np.inf, "map of image 0: contains NaN or infinite"),
    (MASKS, MAPS[:, :3], "image 0: mask"),
    (MASKS, MAPS[:, None], "image 0: mask"),
    (MASKS, [*MAPS, *MAPS], "only one of them has image 1"),
])
def test_bad_maps_are_refused_in_one_line(masks, maps, message):
    for function in (metrics.pixel_metrics, metrics.aupro, metrics.official_aupro):
        with pytest.raises(InputError, match=message) as caught:
            function(masks, maps)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("labels, scores, message", [
    ([], [], "0 and 0 values"),
    ([0, 1], [0.1], "2 and 1 values"),
    ([0, 1], [0.1, float("nan")], "scores: contains NaN"),
    ([0, -1], [0.1, 0.2], "found -1"),
])
def test_bad_scores_are_refused_in_one_line(labels, scores, message):
    with pytest.raises(InputError, match=message):
        metrics.image_metrics(labels, scores)


@pytest.mark.parametrize("limit", [0, -0.1, 1.01])
def test_bad_limit_is_refused(limit):
    with pytest.raises(InputError, match="fpr_limit"):
        metrics.aupro(MASKS, np.random.default_rng(0).random((1, 4, 4)), limit)


def test_mean_leaves_out_and_names_undefined_categories():
    full = dict.fromkeys((*IMAGE_NAMES, *PIXEL_NAMES), 0.5)
    part = {**full, "aupro": None}
    found = metrics.mean_metrics({"a": full, "b": {**part, "image_ap": 1.0}, "c": part})
    assert found["image_ap"] == pytest.approx(2 / 3) and found["aupro"] == 0.5
    assert found["notes"] == ["aupro: mean over 1 of 3 categories, undefined in b, c"]
    assert metrics.mean_metrics({"a": {}})["aupro"] is None
    for function in (metrics.mean_metrics, metrics.harmonic_mean_metrics):
        with pytest.raises(InputError):
            function({})


def test_harmonic_mean_is_that_of_scipy_and_names_what_it_leaves_out():
    values = [0.9, 0.6, 0.75]
    per_category = {name: dict.fromkeys((*IMAGE_NAMES, *PIXEL_NAMES), value) for name, value in zip("abc", values)}
    per_category["c"]["image_pauc"] = None
    found = metrics.harmonic_mean_metrics(per_category)
    assert found == {"image_auroc": pytest.approx(hmean(values)), "image_ap": pytest.approx(hmean(values)),
                     "image_pauc": pytest.approx(hmean(values[:2])),
                     "notes": ["image_pauc: harmonic mean over 2 of 3 categories, undefined in c"]}
    assert found["image_auroc"] < metrics.mean_metrics(per_category)["image_auroc"]
    per_category["a"]["image_ap"] = 0.0
    assert metrics.harmonic_mean_metrics(per_category)["image_ap"] == 0
    assert metrics.harmonic_mean_metrics({"a": {}})["image_auroc"] is None


def test_official_approximation_matches_the_official_code(shared):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    path = shared / "golden" / "official_deco" / "golden.safetensors"
    if not path.exists():
        pytest.skip("needs the official code's golden values")
    golden = load_file(path)
    found = metrics.official_aupro(golden["aupro_mask"], golden["map_out_anomaly_geometric"])
    assert found == pytest.approx(float(golden["aupro_official_200_thresholds"]), abs=1e-5)


def test_memory_is_linear_and_small():
    rng = np.random.default_rng(0)
    maps = np.stack([gaussian_filter(rng.random((256, 256), np.float32), 2) for _ in range(12)])
    masks = np.zeros(maps.shape, bool)
    masks[:, 30:80, 30:80] = True  # 4% anomalous
    tracemalloc.start()
    try:
        metrics.pixel_metrics(masks, maps)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * maps.size + 2**20  # 9 bytes per normal pixel and at most 160 per anomalous one


class Lazy:
    "Images that are made when asked for: a length and items, nothing more."
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index].copy()


@pytest.mark.parametrize("held", [1, 7, 100])
@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i8", "u1", "?"])
@pytest.mark.parametrize("values", [1, 2, 300])
def test_ranges_of_scores_change_nothing(monkeypatch, held, kind, values):
    "However few scores are held at once; tied, constant and negative maps of every kind of number."
    rng = np.random.default_rng([held, values])
    masks = rng.random((4, 12, 11)) < 0.3
    maps = rng.integers(0, values, masks.shape) + masks * rng.integers(0, 2, masks.shape) * (values // 3)
    maps = (maps / 7 - 20 if kind[0] == "f" else maps - 20 * (kind[0] == "i")).astype(kind)
    flat = masks.ravel(), maps.ravel().astype(float)
    limit = rng.uniform(0.01, 1)
    expected = [reference.roc_auc_score(*flat), reference.average_precision_score(*flat), f1_max(*flat),
                brute_force_aupro(masks, maps, 0.3)]
    whole = metrics.pro_curve(masks, maps), pixel_counts(masks, maps)
    monkeypatch.setattr(metrics, "_held", held)
    for given in ((masks, maps), (Lazy(masks), Lazy(maps))):
        found = metrics.pixel_metrics(*given)
        assert [found[name] for name in PIXEL_NAMES] == pytest.approx(expected, abs=1e-12)
        assert metrics.aupro(*given, limit) == pytest.approx(brute_force_aupro(masks, maps, limit), abs=1e-12)
        assert np.allclose(metrics.pro_curve(*given), whole[0], rtol=0, atol=1e-12)
        assert all(map(np.array_equal, pixel_counts(*given), whole[1]))


@pytest.mark.parametrize("bins", [1000, 100])
def test_counts_from_many_ranges_are_as_near(monkeypatch, bins):
    masks, maps = synthetic(1, number=30)
    one_range = counted_metrics(pixel_counts(masks, maps, bins))
    monkeypatch.setattr(metrics, "_held", 100)
    assert len(list(metrics._corner_ranges(masks, maps))) > 20
    counts, exact = pixel_counts(masks, maps, bins), metrics.pixel_metrics(masks, maps)
    found = counted_metrics(counts)
    assert counts.normal.shape[1] <= bins
    assert max(abs(found[name] - exact[name]) for name in PIXEL_NAMES) < max(1 / bins, 1.2 * max(
        abs(one_range[name] - exact[name]) for name in PIXEL_NAMES))


def test_what_can_be_read_only_once_is_refused():
    for function in (metrics.pixel_metrics, metrics.aupro, metrics.pro_curve, pixel_counts, metrics.official_aupro):
        with pytest.raises(InputError, match="only once"):
            function(MASKS, iter(MAPS))


MEMORY = """
import resource
import sys
import numpy as np
from adiff.scores import metrics

class Images:
    def __init__(self, number, masks):
        self.number, self.masks = number, masks

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        if not self.masks:
            return np.random.default_rng(index).random((256, 256), np.float32)
        mask = np.zeros((256, 256), bool)
        mask[100:110, 100:110] = index % 4
        return mask

def peak(number):
    assert metrics.pixel_metrics(Images(number, True), Images(number, False))["pixel_auroc"] > 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

few = peak(300)
print(peak(900) - few)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images():
    "900 maps of 256 x 256 are 157 MB more than 300, and a larger peak would be their own."
    grown = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout
    assert float(grown) < 20
    small = MEMORY.replace("few = peak(300)", "metrics._held = 2**15\nfew = peak(100)").replace("900", "600")
    grown = subprocess.run([sys.executable, "-c", small], capture_output=True, text=True, check=True).stdout
    assert float(grown) < 10


def synthetic(seed, number=12, side=48):
    "Masks and maps of images of which every third is normal; smooth noise, so that hits and false alarms overlap."
    rng = np.random.default_rng(seed)
    masks = gaussian_filter(rng.normal(size=(number, side, side)), (0, 3, 3)) > 0.17
    masks[::3] = False
    return masks, (gaussian_filter(rng.normal(size=masks.shape), (0, 1, 1)) + 0.3 * masks).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
def test_counted_metrics_are_near_the_exact_ones_for_any_resample(seed):
    masks, maps = synthetic(seed)
    counts = pixel_counts(masks, maps)
    exact = metrics.pixel_metrics(masks, maps)
    expected = [exact[name] for name in PIXEL_NAMES]
    assert [counted_metrics(counts)[name] for name in PIXEL_NAMES] == pytest.approx(expected, abs=1e-3)
    assert counts.normal.shape[1] <= 1000 and counts.normal.sum() + counts.anomalous.sum() == masks.size
    weights = bootstrap_weights(masks.any((1, 2)), 5, seed)
    found = counted_metrics(counts, weights)
    for row, weight in enumerate(weights):
        drawn = np.repeat(np.arange(len(masks)), weight)
        exact = metrics.pixel_metrics(masks[drawn], maps[drawn])
        expected = [exact[name] for name in PIXEL_NAMES]
        assert [found[name][row] for name in PIXEL_NAMES] == pytest.approx(expected, abs=1.5e-3)


@pytest.mark.parametrize("seed", range(20))
def test_counts_of_few_distinct_values_lose_nothing(seed):
    rng = np.random.default_rng(seed)
    masks = rng.random((3, 9, 11)) < 0.2
    maps = np.round(rng.random(masks.shape) + 0.5 * masks, seed % 3)
    maps = (100 * maps).astype(int) if seed % 2 else maps
    counts, exact = pixel_counts(masks, maps), metrics.pixel_metrics(masks, maps)
    expected = [exact[name] for name in PIXEL_NAMES]
    assert [counted_metrics(counts)[name] for name in PIXEL_NAMES] == pytest.approx(expected, abs=1e-6)
    assert metrics.area_up_to(*counted_pro_curve(counts), 0.3) == pytest.approx(exact["aupro"], abs=1e-6)


def test_counts_of_the_official_map(shared):
    from safetensors.torch import load_file

    golden = load_file(shared / "golden" / "official_deco" / "golden.safetensors")
    mask, found = golden["aupro_mask"], golden["map_out_anomaly_geometric"]
    exact, counted = metrics.pixel_metrics(mask, found), counted_metrics(pixel_counts(mask, found))
    assert [counted[name] for name in PIXEL_NAMES] == pytest.approx([exact[name] for name in PIXEL_NAMES], abs=1e-3)


def test_a_resample_without_a_kind_is_undefined_and_counts_need_both():
    masks, maps = synthetic(0)
    counts = pixel_counts(masks, maps)
    weights = np.stack([np.arange(12) % 3 == 0, np.ones(12)])  # normal images only
    for name, values in counted_metrics(counts, weights).items():
        assert np.isnan(values[0]) and values[1] == pytest.approx(counted_metrics(counts)[name]), name
    found = weighted_image_metrics([0, 1, 1], [0.1, 0.2, 0.05], [[0, 1, 1], [2, 1, 0]])
    assert all(np.isnan(values[0]) and values[1] == 1 for values in found.values())
    with pytest.raises(InputError, match="no anomalous pixel"):
        pixel_counts(masks[:1], maps[:1])


@pytest.mark.parametrize("seed", range(10))
def test_weights_are_repetitions_of_images(seed):
    rng = np.random.default_rng(seed)
    labels = np.append(rng.integers(0, 2, 20), [0, 1])
    scores = np.round(rng.random(22) + 0.3 * labels, 1)
    weights = bootstrap_weights(labels, 4, seed)
    assert (weights @ labels == labels.sum()).all() and (weights.sum(1) == 22).all()
    assert (weights == bootstrap_weights(labels, 4, seed)).all()
    found = weighted_image_metrics(labels, scores, weights)
    for row, weight in enumerate(weights):
        drawn = np.repeat(np.arange(22), weight)
        exact = metrics.image_metrics(labels[drawn], scores[drawn])
        expected = [exact[name] for name in IMAGE_NAMES]
        assert [found[name][row] for name in IMAGE_NAMES] == pytest.approx(expected, abs=1e-12)
