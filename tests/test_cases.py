"""What people hand over, built from reports about this kind of software: read right, or refused in one clear line."""
import os

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from adiff.core import InputError
from adiff.data.dataset import Dataset
from adiff.data.images import FULL_FRAME
from adiff.data.reading import read_dataset
from adiff.methods.configuration import DataConfig, make_processor


def plate(seed, size=(200, 200), scratch=False):
    "A grey plate with a round hole, uint8 (h, w, 3), and the mask of its scratch, bool (h, w)."
    generator, (width, height) = np.random.default_rng(seed), size
    y, x = np.mgrid[:height, :width]
    image = np.full((height, width), 150.0)
    image[np.hypot(x - width / 2, y - height / 2) < 0.2 * min(size)] = 60
    mask = np.zeros((height, width), bool)
    if scratch:
        mask[int(0.2 * height):int(0.2 * height) + 8, int(0.3 * width):int(0.7 * width)] = True
        image[mask] = 240
    image += generator.normal(0, 4, image.shape)
    return np.repeat(image.clip(0, 255).astype(np.uint8)[..., None], 3, 2), mask


def save(path, seed=0, scratch=False, size=(200, 200), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(plate(seed, size, scratch)[0]).save(path, **options)


def tree(root, *names, value=255, size=(8, 8)):
    "Small files of one grey value under `root`, which is returned."
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, value).save(root / name)
    return root


def counts(dataset):
    "{(split, label): number of files}."
    return dataset.samples.groupby(["split", "label"]).size().to_dict()


def numbered(pattern, count):
    return [pattern.format(i) for i in range(count)]


# ---- labels never fall open

@pytest.mark.parametrize("name", ["Good", "ok", "normal", "GOOD", "good ", "OK", "Nominal", "pass", "Not defective"])
def test_names_for_normal(tmp_path, name):
    tree(tmp_path, *numbered("part/train/good/{}.png", 8), *numbered(f"part/test/{name}/{{}}.png", 4),
         *numbered("part/test/scratch/{}.png", 4), *numbered("part/ground_truth/scratch/{}_mask.png", 4))
    dataset = read_dataset(tmp_path)
    assert counts(dataset) == {("train", 0): 7, ("validation", 0): 1, ("test", 0): 4, ("test", 1): 4}
    assert set(dataset.samples.defect) == {"good", "scratch"}


@pytest.mark.parametrize("name", ["bad", "NG", "Defect", "abnormal", "anomaly", "ko", "fault", "not ok", "NotOK"])
def test_two_folders_are_read_as_what_they_are(tmp_path, name):
    tree(tmp_path, *numbered("OK/{}.png", 10), *numbered(f"{name}/{{}}.png", 3))
    assert counts(read_dataset(tmp_path)) == {("train", 0): 7, ("validation", 0): 1, ("test", 0): 2, ("test", 1): 3}


def test_training_folders_of_other_names(tmp_path):
    tree(tmp_path, *numbered("part/train/Good/{}.png", 8), *numbered("part/train/bad/{}.png", 2),
         *numbered("part/test/Good/{}.png", 2), *numbered("part/test/NG/{}.png", 2))
    dataset = read_dataset(tmp_path)
    assert counts(dataset) == {("train", 0): 7, ("validation", 0): 1, ("test", 0): 2, ("test", 1): 2}
    assert any("2 files of train/bad" in note for note in dataset.notes)
    assert any("2 files in part/train/bad" in line for line in dataset.left_out)


@pytest.mark.parametrize("names", [
    ["1.png", "ng/2.png"],                          # normal files beside a folder of anomalous ones
    ["good/1.png", "scratch/2.png", "dent/3.png"],  # a test folder of the MVTec layout
    ["line1/day1/ok/1.png", "line1/day1/ng/2.png", "line2/3.png", "4.png"],
    ["part_1_ok.png", "part_2_NG.png"],
    ["a/1.png", "a/2.png", "masks/1.png"],
    ["1.png", "1_mask.png", "2.png"],
    ["ground_truth/dent/1.png"],
    ["pictures/1.jpg", "pictures/1.png", "pictures/2.jpg"],  # a PNG of two values beside its photograph
    ["ok_and_ng/1.png"],
    ["train/1.png"],
])
def test_what_names_several_things_is_refused(tmp_path, names):
    tree(tmp_path / "x", *names)
    with pytest.raises(InputError, match="--normal, --abnormal and --masks") as error:
        read_dataset(tmp_path / "x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mask", ["masks/{}.png", "photos/{}_label.bmp", "photos/{}_GT.png", "photos/{}.png"])
def test_a_mask_for_every_image_labels_it(tmp_path, mask):
    tree(tmp_path, *numbered("photos/{}.jpg", 6), mask.format(5))
    tree(tmp_path, *numbered(mask, 5), value=0)
    dataset = read_dataset(tmp_path)
    assert counts(dataset) == {("train", 0): 3, ("validation", 0): 1, ("test", 0): 1, ("test", 1): 1}
    assert dataset.samples["mask"].max().endswith(mask.format(5)) and dataset.left_out == [
        "5 files in " + mask.split("/")[0] + ": no place in the layout (first " + mask.format(0) + ")"]


@pytest.mark.parametrize("name", ["bad", "NG", "ground_truth", "masks"])
def test_a_folder_that_is_called_anomalous_is_no_training_data(tmp_path, name):
    folder = tree(tmp_path / name, *numbered("{}.png", 4))
    with pytest.raises(InputError, match="--normal ."):
        read_dataset(folder)
    assert counts(read_dataset(folder, normal=".")) == {("train", 0): 3, ("validation", 0): 1}


def test_flags_say_what_is_what(tmp_path):
    tree(tmp_path, *numbered("photos/{}.png", 10), *numbered("returned/{}.png", 2), "painted/0.png", "old/a.png")
    dataset = read_dataset(tmp_path, normal="photos", abnormal="returned", masks="painted")
    assert counts(dataset) == {("train", 0): 7, ("validation", 0): 1, ("test", 0): 2, ("test", 1): 2}
    assert dataset.samples["mask"].max() == "painted/0.png" and "1 file in old: not read" in dataset.left_out[0]
    assert counts(read_dataset(tmp_path, abnormal=["returned"], masks=["paint*/*"]))["test", 1] == 2
    os.chdir(tmp_path.parent)
    assert counts(read_dataset(tmp_path, normal=f"{tmp_path.name}/photos")) == {("train", 0): 7, ("validation", 0): 1,
                                                                             ("test", 0): 2}
    with pytest.raises(InputError, match="--abnormal nowhere"):
        read_dataset(tmp_path, abnormal="nowhere")
    with pytest.raises(InputError, match="both"):
        read_dataset(tmp_path, normal=["photos"], abnormal=["photos/1.png"])


def test_benchmarks_as_downloaded(tmp_path):
    three = tree(tmp_path / "3d", "bagel/train/good/rgb/0.png", "bagel/train/good/xyz/0.tiff",
                 "bagel/validation/good/rgb/1.png", "bagel/test/crack/rgb/2.png", "bagel/test/crack/xyz/2.tiff",
                 "bagel/test/crack/gt/2.png")
    dataset = read_dataset(three)
    assert sorted(dataset.samples.path) == ["bagel/test/crack/rgb/2.png", "bagel/train/good/rgb/0.png",
                                            "bagel/validation/good/rgb/1.png"]
    assert dataset.samples["mask"].max() == "bagel/test/crack/gt/2.png" and len(dataset.left_out) == 2
    btad = tree(tmp_path / "BTech", "BTech_transformed/01/train/ok/0.bmp", "BTech_transformed/01/test/ok/1.bmp",
                "BTech_transformed/01/test/ko/2.bmp", "BTech_transformed/01/ground_truth/ko/2.png")
    assert read_dataset(btad).samples["mask"].max() == "01/ground_truth/ko/2.png"  # unpacked into a folder of its own


def test_several_masks_are_united(tmp_path):
    tree(tmp_path, "box/train/good/0.png", "box/test/logical_anomalies/3.png")
    for name, rows in (("000", slice(0, 2)), ("001", slice(4, 6))):
        mask = np.zeros((8, 8), np.uint8)
        mask[rows] = 7  # LOCO's masks have a value for each type of defect
        tree(tmp_path, f"box/ground_truth/logical_anomalies/3/{name}.png")
        Image.fromarray(mask).save(tmp_path / f"box/ground_truth/logical_anomalies/3/{name}.png")
    dataset = read_dataset(tmp_path)
    found = dataset.mask(dataset.select("test").iloc[0], FULL_FRAME.at(8))
    assert found.any(1).tolist() == [True, True, False, False, True, True, False, False]
    assert dataset.fingerprint()


# ---- what was read is said

def test_sub_folders_links_and_suffixes(tmp_path):
    part = tmp_path / "d/part"
    tree(part, *numbered("train/good/cam1/{}.png", 6), *numbered("train/good/cam2/{}.png", 6),
         *numbered("train/good/{}.png", 3), "test/good/cam1/0.png", "test/scratch/cam1/0.png", "test/scratch/0.png",
         "ground_truth/scratch/cam1/0_mask.png", "ground_truth/scratch/0_mask.png")
    dataset = read_dataset(tmp_path / "d")
    assert counts(dataset) == {("train", 0): 13, ("validation", 0): 2, ("test", 0): 1, ("test", 1): 2}
    masks = dataset.samples.set_index("path")["mask"]
    assert masks["part/test/scratch/cam1/0.png"] == "part/ground_truth/scratch/cam1/0_mask.png"
    assert masks["part/test/scratch/0.png"] == "part/ground_truth/scratch/0_mask.png" and dataset.left_out == []


def test_links_are_followed_but_not_in_circles(tmp_path):
    store = tree(tmp_path / "store", *numbered("a/{}.png", 6))
    days = tree(tmp_path / "days", *numbered("day2/{}.png", 2))
    (days / "day1").symlink_to(store / "a")
    (days / "day1again").symlink_to(store / "a")
    (days / "back").symlink_to(days)
    dataset = read_dataset(days)
    assert len(dataset.samples) == 8 and len(dataset.left_out) == 1 and "2 files: a link" in dataset.left_out[0]
    files = tmp_path / "files"
    files.mkdir()
    for path in (store / "a").iterdir():
        (files / path.name).symlink_to(path)
    assert len(read_dataset(files).samples) == 6


def test_every_suffix_is_read_or_counted(tmp_path):
    for suffix in ("jpg", "JPEG", "png", "bmp", "tif", "TIFF", "webp", "gif", "ppm", "pgm", "jp2", "jfif", "tga"):
        save(tmp_path / f"kinds/{suffix}.{suffix}")
    (tmp_path / "kinds/photo.heic").write_bytes(bytes(100))
    (tmp_path / "kinds/none").write_bytes(bytes(100))
    dataset = read_dataset(tmp_path / "kinds")
    assert len(dataset.samples) == 13
    assert sorted(line.split(" (")[0] for line in dataset.left_out) == ["1 file: no suffix", "1 file: suffix .heic"]


def test_the_summary_says_what_matters(tmp_path):
    tree(tmp_path / "part", *numbered("train/good/{}.png", 10), "test/edge/0.png", size=(600, 400))
    (tmp_path / "part/notes.txt").touch()
    text = read_dataset(tmp_path).summary(FULL_FRAME, 64)
    for said in ("600 x 400", "anomalous", "left out: 1 file: suffix .txt", "whole picture", "narrower than about 19"):
        assert said in text, text


@pytest.mark.parametrize("category, size, wanted", [
    ("bottle", (288, 288), "official"), ("bottle", (900, 900), "official"), ("bottle", (600, 400), "full_frame"),
    ("part", (288, 288), "full_frame"), ("bottle", (640, 640), "full_frame")])
def test_own_data_are_judged_whole(tmp_path, category, size, wanted):
    "The benchmark's central crop is for the benchmark: its categories, in its sizes."
    for name in ("train/good/0.png", "train/good/1.png", "test/good/2.png", "test/edge/3.png"):
        tree(tmp_path / category, name, size=size)
    dataset = read_dataset(tmp_path)
    assert make_processor(DataConfig(), dataset).name == wanted
    assert make_processor(DataConfig(protocol="official"), dataset).name == "official"


# ---- tables from elsewhere

@pytest.mark.parametrize("change", [
    lambda text: "\ufeff" + text.replace("\n", "\r\n"),
    lambda text: text.replace("candle/", "candle\\").replace("Images/", "Images\\"),
    lambda text: text.replace(",", ";"),
    lambda text: text.replace(".JPG", ".jpg"),
    lambda text: text.replace(",", ", "),
    lambda text: text.replace("object,split,label,image,mask", "Object,Split,Label,Image,Mask"),
    lambda text: text.replace("anomaly,candle", "NG,candle"),
])
def test_tables_as_spreadsheets_write_them(tmp_path, change):
    rows = ["object,split,label,image,mask"]
    for index in range(8):
        tree(tmp_path, f"candle/Images/Normal/{index}.JPG")
        rows.append(f"candle,train,normal,candle/Images/Normal/{index}.JPG,")
    tree(tmp_path, "candle/Images/Anomaly/0.JPG", "candle/Masks/0.png")
    rows.append("candle,test,anomaly,candle/Images/Anomaly/0.JPG,candle/Masks/0.png")
    table = tmp_path / "table.csv"
    table.write_bytes(change("\n".join(rows) + "\n").encode())
    dataset = read_dataset(tmp_path, split_table=table)
    assert counts(dataset) == {("train", 0): 7, ("validation", 0): 1, ("test", 1): 1}
    assert isinstance(dataset, Dataset) and dataset.samples["mask"].max() == "candle/Masks/0.png"


def test_a_table_without_the_columns_names_those_it_has(tmp_path):
    pd.DataFrame({"file": ["a.png"], "verdict": ["ok"]}).to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(InputError, match="has no column object.*it has file, verdict"):
        read_dataset(tmp_path, split_table=tmp_path / "table.csv")
