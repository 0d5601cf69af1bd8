"""What people hand over, built from reports about this kind of software: read right, or refused in one clear line."""
import ast
import io
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import papermill
import pandas as pd
import pytest
import soundfile
import torch
from click.testing import CliRunner
from PIL import Image

from adiff import AnomalyDetector, evaluate, fit
from adiff.core import InputError
from adiff.data.dataset import Dataset
from adiff.data.images import FULL_FRAME, open_mask
from adiff.data.reading import read_dataset
from adiff.data.tiles import TiledProcessor
from adiff.lab.engines import kernel_trouble
from adiff.methods.configuration import DataConfig, make_processor, parse_overrides
from adiff.methods.official import read_official_checkpoint
from adiff.runs.command_line import main
from adiff.runs.detect import OUTPUTS, detect_files
from adiff.runs.fit import preview
from adiff.runs.notebook_parameters import as_typed, check_parameters


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
    ["Train/1.png", "TEST/2.png"],
    ["OK/1.png", "OK/ng/2.png", "NG/3.png"],        # one within the other
    ["OK/1.png", "OK/2_ng.png", "NG/3.png"],
    ["NG/ok/1.png", "NG/2.png", "OK/3.png"],
    ["part/train/good/1.png", "part/train/good/bad/2.png", "part/test/dent/3.png"],
    ["part/train/good/1.png", "part/test/good/2.png", "part/test/good/crack/3.png"],
    ["part/train/good/1.png", "part/test/Label/2_label.png", "part/test/crack/2.png"],
    ["positive/1.png", "negative/2.png"],           # good for the customer, or positive in the test?
    ["2024/jan/1.png", "2024/feb/scratched/2.png"],
    ["1.png", "1_label.png", "2.png"],
    ["images/1.png", "labels/2.png"],
])
def test_what_names_several_things_is_refused(tmp_path, names):
    tree(tmp_path / "x", *names)
    with pytest.raises(InputError, match="--normal, --abnormal and --masks") as error:
        read_dataset(tmp_path / "x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mask", ["truth/{}.png", "photos/{}_m.png", "photos/{}-bw.bmp"])
def test_what_looks_like_masks_is_refused_whatever_its_name(tmp_path, mask):
    "Several files that are called like photographs and hold few values; photographs that share names are not touched."
    tmp_path = tmp_path / "x"
    for number in range(6):
        save(tmp_path / f"photos/{number}.png", number)
        save(tmp_path / f"photos/{number}_2.png", number)
        save(tmp_path / f"again/{number}.png", number + 10)
    dataset = read_dataset(tmp_path)
    assert len(dataset.samples) == 18 and "folders: photos (12), again (6)" in dataset.notes[0]
    for number in range(2):
        path = tmp_path / mask.format(number)
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(plate(number, scratch=True)[1]).save(path)
    with pytest.raises(InputError, match="2 files look like masks.*--masks"):
        read_dataset(tmp_path)


def test_files_of_the_system_are_no_pictures(tmp_path):
    tree(tmp_path, *numbered("{}.png", 6), "__MACOSX/0.png", "@eaDir/0.png/THUMB.jpg", "$RECYCLE.BIN/1.png", ".cache/1.png")
    dataset = read_dataset(tmp_path)
    assert len(dataset.samples) == 6 and dataset.left_out == ["4 files: hidden (first $RECYCLE.BIN)"]


@pytest.mark.parametrize("mask", ["masks/{}.png", "photos/{}_label.bmp", "photos/{}_GT.png", "photos/{}.png"])
def test_a_mask_for_every_image_labels_it(tmp_path, mask):
    tree(tmp_path, *numbered("photos/{}.jpg", 6), mask.format(5))
    tree(tmp_path, *numbered(mask, 5), value=0)
    dataset = read_dataset(tmp_path)
    assert counts(dataset) == {("train", 0): 3, ("validation", 0): 1, ("test", 0): 1, ("test", 1): 1}
    why = "no place in the layout" if mask == "photos/{}.png" else "mask of no anomalous picture"
    assert dataset.samples["mask"].max().endswith(mask.format(5)) and dataset.left_out == [
        f"5 files in {mask.split('/')[0]}: {why} (first {mask.format(0)})"]


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


def test_pictures_of_8_and_of_16_bits_are_not_mixed(tmp_path):
    for number in range(4):
        save(tmp_path / f"{number}.png")
        Image.fromarray(np.full((64, 64), 3000, np.uint16)).save(tmp_path / f"{number}.tif")
    with pytest.raises(InputError, match=r"\d\.tif: more than 8 bits, and .*\d\.png has 8; store all in the same way"):
        fit("knn", tmp_path, tmp_path.parent / "run", device="cpu")


@pytest.mark.parametrize("method", ["deco", "adiff", "knn", "padim"])
def test_a_fiftieth_of_the_side_can_be_seen_by_default(tmp_path, method):
    tree(tmp_path, *numbered("{}.png", 3), size=(3000, 2000))
    text = preview(method, tmp_path)
    assert "codec sees 64 x 64 pixels, frozen features 256 x 256" in text or "codec sees 256 x 256" in text, text
    assert "narrower than about 23 pixels of the original, 1/128 of its side" in text and "image_size=" not in text
    coarse = read_dataset(tmp_path).summary(FULL_FRAME, 64)
    assert "1/32 of its side" in coarse and "-o data.image_size=128 looks closer" in coarse


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


# ---- thresholds

CHEAP = {"knn": {"codec": {"kind": "wavelet", "levels": 2}, "data": {"image_size": 32},
                 "discrepancy": {"memory_size": 100}},
         "adiff": {"data": {"image_size": 32}, "training": {"length": 2, "batch_size": 2},
                   "correction": {"num_seeds": 1}, "discrepancy": {"kind": "semantic", "input_size": 32}},
         "one-class-svm": {}}


def train(method, data, out, overrides=None):
    return fit(method, data, out, overrides={**CHEAP.get(method, {}), **(overrides or {})}, device="cpu")


def photos(folder, numbers, **options):
    for number in numbers:
        save(folder / f"{number:03}.png", number, **options)
    return folder


def hum(path, seed, seconds):
    "A machine that hums, with noise."
    generator, time = np.random.default_rng(seed), np.arange(round(seconds * 16000)) / 16000
    wave = sum(np.sin(2 * np.pi * 100 * k * time + generator.uniform(0, 6)) / k for k in range(1, 6))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, (0.05 * wave + generator.normal(0, 0.02, len(time))).astype(np.float32), 16000)


@pytest.mark.parametrize("method, count", [("knn", 5), ("knn", 10), ("adiff", 10)])
def test_few_normals_give_a_threshold_that_new_ones_pass(tmp_path, method, count, caplog, one_thread):
    "Each is judged by what was learned without it; ADiff's scores are in the unit that detection uses."
    detector = train(method, photos(tmp_path / "photos", range(count)), tmp_path / "run")
    calibration = detector.config.calibration["photos"]
    assert calibration["n"] == count and calibration["interval"][1] > 0.2
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and f"{count} normal files" in warnings[0] and "\n" not in warnings[0]
    new = detector([plate(number)[0] for number in range(100, 110)])
    assert new.is_anomalous.sum() <= 3 and np.abs(new.normalized_scores).max() < 100
    assert detector([plate(0, scratch=True)[0]]).is_anomalous[0] or method == "adiff"  # hardly trained


def test_one_normal_file_gives_no_threshold_and_says_so(tmp_path, caplog, one_thread):
    detector = train("knn", photos(tmp_path / "photos", range(1)), tmp_path / "run")
    assert detector.config.calibration is None and "no threshold and no verdict" in caplog.text
    told = CliRunner().invoke(main, ["detect", str(tmp_path / "run/model"), str(tmp_path / "photos"), "--out",
                                     str(tmp_path / "found"), "--device", "cpu"])
    assert told.exit_code == 0 and "no verdict" in told.stdout and "adiff calibrate" in told.stdout


def test_identical_normals_have_no_spread(tmp_path, one_thread):
    (tmp_path / "photos").mkdir()
    for number in range(6):
        Image.new("L", (64, 64), 255).save(tmp_path / f"photos/{number}.png", compress_level=number)
    detector = train("knn", tmp_path / "photos", tmp_path / "run")
    found = detector([np.full((64, 64), 255, np.uint8)])
    assert detector.config.calibration["photos"]["std"] is None and np.isnan(found.normalized_scores[0])


def test_copies_count_once(tmp_path, caplog, one_thread):
    "Six pictures ten times are six: else each is judged by a memory of itself, and every new normal is flagged."
    for number in range(60):
        save(tmp_path / f"photos/{number:02}.png", number % 6)
    assert "54 files are copies of others (first 06.png)" in read_dataset(tmp_path / "photos").summary()
    detector = train("knn", tmp_path / "photos", tmp_path / "run")
    assert detector.config.calibration["photos"]["n"] == 6 and "54 of 60 normal files are copies" in caplog.text
    assert detector([plate(number)[0] for number in range(100, 110)]).is_anomalous.sum() <= 3
    for number in range(6):
        save(tmp_path / f"one/{number}.png", 0)
    assert train("knn", tmp_path / "one", tmp_path / "run of one").config.calibration is None
    assert "no threshold and no verdict" in caplog.text


def test_long_recordings_have_the_threshold_of_their_length(tmp_path, one_thread):
    for number in range(30):
        hum(tmp_path / f"normal/{number}.wav", number, 4)
    detector = train("one-class-svm", tmp_path / "normal", tmp_path / "run")
    for number in range(4):
        hum(tmp_path / f"new/short{number}.wav", 100 + number, 4)
        hum(tmp_path / f"new/long{number}.wav", 200 + number, 60)
    found = detect_files(tmp_path / "run/model", [tmp_path / "new"], tmp_path / "found", device="cpu", save=())
    long = found.path.str.contains("/long\\d")
    assert found[long].threshold.min() > found[~long].threshold.max() == detector.config.calibration["normal"]["threshold"]
    assert found[long].anomalous.sum() <= 1 and found[~long].anomalous.sum() <= 1
    several = detector([str(tmp_path / "new/long0.wav"), str(tmp_path / "new/short0.wav")])
    assert several.thresholds[0] == pytest.approx(found[long].threshold.iloc[0])


def test_short_recordings_are_said_to_end_in_silence(tmp_path, one_thread, caplog):
    "They are all called anomalous after training on longer ones; the line says why. With windows of their length, not."
    for number in range(20):
        hum(tmp_path / f"normal/{number}.wav", number, 4)
    for number in range(3):
        hum(tmp_path / f"new/short{number}.wav", 100 + number, 1)
    hum(tmp_path / "new/whole.wav", 200, 4)
    train("one-class-svm", tmp_path / "normal", tmp_path / "run")
    caplog.clear()
    found = detect_files(tmp_path / "run/model", [tmp_path / "new"], tmp_path / "found", device="cpu", save=())
    said = [record.getMessage() for record in caplog.records if record.name == "adiff.runs.detect"]
    assert len(said) == 1 and said[0].startswith("3 of 4 sounds are shorter than the 4 s") and "\n" not in said[0]
    assert found.anomalous.tolist()[:3] == [True] * 3
    train("one-class-svm", tmp_path / "normal", tmp_path / "second", {"data": {"seconds": 1.0}})
    caplog.clear()
    found = detect_files(tmp_path / "second/model", [tmp_path / "new"], tmp_path / "found", device="cpu", save=())
    assert found.anomalous.sum() <= 1 and not [one for one in caplog.records if one.name == "adiff.runs.detect"]


# ---- large pictures

def sheet(seed, dot=False):
    "A noisy sheet, 640 x 480, half of it empty; with a dot of 12 pixels around (420, 150) where neighbours overlap."
    image = plate(seed, (640, 480))[0].copy()
    image[240:] = 150
    if dot:
        image[144:156, 414:426] = 250
    return image


@pytest.fixture(scope="module")
def tiled(tmp_path_factory, one_thread):
    "A run with tiles, trained and evaluated on labelled sheets."
    folder = tmp_path_factory.mktemp("tiled")
    for number in range(7):
        (path := folder / "sheets/one/train/good" / f"{number}.png").parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet(number)).save(path)
    for name, dot in (("good", False), ("dot", True)):
        for number in range(3):
            (path := folder / f"sheets/one/test/{name}/{number}.png").parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(sheet(20 + number, dot)).save(path)
    (folder / "sheets/one/ground_truth/dot").mkdir(parents=True)
    for number in range(3):
        mask = Image.new("L", (640, 480))
        mask.paste(255, (414, 144, 426, 156))
        mask.save(folder / f"sheets/one/ground_truth/dot/{number}_mask.png")
    train("knn", folder / "sheets", folder / "run", overrides={"data": {"tile": 320, "tile_overlap": 0.2}})
    evaluate(folder / "run", device="cpu")
    return folder


def test_tiles_find_what_is_small(tiled, tmp_path):
    "Fit, evaluate, detect and Python agree; maps are joined at the picture's own size; the verdict is per picture."
    metrics = json.loads((tiled / "run/metrics.json").read_text())
    assert metrics["mean"]["image_auroc"] == 1 and metrics["mean"]["aupro"] > 0.9
    assert any("tiles of 320 pixels that overlap by 20%" in note for note in metrics["notes"])
    scores = pd.read_csv(tiled / "run/scores.csv")
    found = detect_files(tiled / "run/model", [tiled / "sheets/one/test"], tmp_path / "out", device="cpu", save=OUTPUTS)
    assert np.allclose(found.score, scores.score, rtol=1e-4)
    assert (found.anomalous == found.path.str.contains("dot/")).mean() >= 5 / 6
    regions = pd.read_csv(tmp_path / "out/regions.csv")
    first = regions[regions.path.str.contains("dot/0")].iloc[0]
    assert abs(first.center_x - 420) < 15 and abs(first.center_y - 150) < 15
    whole = np.asarray(Image.open(tmp_path / "out" / found["map"][0]))
    assert whole.shape == (480, 640) and np.abs(np.diff(whole)).max() < 0.1 * whole.max()  # no seams
    assert Image.open(tmp_path / "out" / found.overlay[0]).size == (640, 480)


def test_tiles_are_the_same_in_every_form(tiled):
    detector, path = AnomalyDetector.from_pretrained(tiled / "run/model"), tiled / "sheets/one/test/dot/0.png"
    array = np.array(Image.open(path))
    tensor = torch.from_numpy(array).movedim(-1, 0)
    out = detector([str(path), Image.fromarray(array), array, path.read_bytes()])
    assert out.maps.shape == (4, 256, 256) and len(set(out.scores)) == 1
    for one in (tensor, tensor / 255, tensor / 127.5 - 1):
        assert detector(one).scores[0] == pytest.approx(out.scores[0], rel=1e-5)
    y, x = np.unravel_index(out.maps[0].argmax(), (256, 256))
    assert abs(x - 420 * 0.4) < 8 and abs(y - 150 * 256 / 480) < 8


def test_the_threshold_of_tiles_is_that_of_whole_pictures(tiled):
    "Each normal picture counts once, with its highest tile: empty tiles do not lower the threshold."
    detector = AnomalyDetector.from_pretrained(tiled / "run/model")
    calibration = detector.config.calibration["one"]
    assert calibration["n"] == len(calibration["scores"]) == 7
    assert detector(sheet(30)).thresholds[0] == calibration["threshold"]


def test_tiles_are_read_one_after_the_other(monkeypatch):
    "However large the picture, no more inputs are in memory than a few batches."
    processor = TiledProcessor("full_frame", 256, tile=256)
    windows = processor.windows(Image.new("RGB", (3000, 2000)))
    assert len(windows) == 1 + 16 * 11 and len(set(windows)) == len(windows)
    inputs = processor.inputs(Image.new("RGB", (3000, 2000)))
    monkeypatch.setattr(TiledProcessor, "part", lambda self, image, box: pytest.fail("read before it is asked for"))
    assert iter(inputs) is inputs


def test_pictures_can_be_learned_in_four_orientations(tmp_path, one_thread):
    "A quarter turn of a normal picture is anomalous, unless the orientations are learned."
    half = np.zeros((96, 96, 3), np.uint8)
    half[:48] = 200
    for number in range(6):
        noise = np.random.default_rng(number).normal(20, 4, half.shape)
        (path := tmp_path / "photos" / f"{number}.png").parent.mkdir(exist_ok=True)
        Image.fromarray((half + noise).clip(0, 255).astype(np.uint8)).save(path)
    turned = np.rot90(np.array(Image.open(path)))
    scores = {}
    for rotate in (False, True):
        overrides = {"data": {"image_size": 32, "rotate": rotate}}
        detector = train("knn", tmp_path / "photos", tmp_path / f"{rotate}", overrides)
        out = detector([turned, np.array(Image.open(path))])
        scores[rotate] = out.scores[0] / out.scores[1]
    assert scores[True] < 1.3 < 2 < scores[False]


def test_the_summary_says_how_small_is_too_small():
    lines = FULL_FRAME.remains(256, {(3000, 2000): 2, None: 1})
    assert "23 pixels of the original, 1/128 of its side" in lines[2] and "data.tile" in lines[3]
    assert not any("data.tile" in line for line in FULL_FRAME.remains(256, {(600, 400): 1}))
    lines = TiledProcessor("full_frame", 256, tile=512).remains(256, {(3000, 2000): 1})
    assert "40 of them, and the whole; in a tile a defect narrower than about 4 pixels" in lines[-1]


def test_tiles_of_a_crop_are_refused(tmp_path):
    result = CliRunner().invoke(main, ["fit", "knn", str(photos(tmp_path / "photos", range(3))), "--out",
                                       str(tmp_path / "run"), "-o", "data.tile=64", "-o", "data.protocol=official"])
    assert result.exit_code == 2 and "use full_frame" in result.stderr and result.stderr.count("\n") == 1


def test_overlays_of_large_pictures_are_quick(tmp_path):
    "3000 x 2000 in half a second of one core; here with a margin for machines that are busy."
    canvas = FULL_FRAME.canvas(np.random.default_rng(0).integers(90, 110, (2000, 3000, 3), np.uint8), [0.0])
    canvas.add(0.0, canvas.load(0.0), torch.rand(256, 256, generator=torch.Generator().manual_seed(0)))
    began = time.process_time()
    canvas.draw(tmp_path / "overlay.png", threshold=0.9)
    assert time.process_time() - began < 1.5
    assert Image.open(tmp_path / "overlay.png").size == (3000, 2000)


# ---- what detection gives

@pytest.fixture(scope="module")
def model(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("model")
    train("knn", photos(folder / "photos", range(20), size=(300, 200)), folder / "run")
    return folder / "run/model"


def test_own_thresholds_and_outputs_of_detection(model, tmp_path):
    save(tmp_path / "new/scratch.png", 50, scratch=True, size=(300, 200))
    save(tmp_path / "new/ok.png", 51, size=(300, 200))
    (tmp_path / "new/notes.txt").touch()
    found = detect_files(model, [tmp_path / "new"], tmp_path / "out", device="cpu", save=OUTPUTS)
    assert found.anomalous.tolist() == [False, True]
    assert [sorted(path.parent.name for path in (tmp_path / "out").rglob("scratch*"))] == [["maps", "masks", "overlays"]]
    whole = np.asarray(Image.open(tmp_path / "out" / found["map"][1]))
    mask = np.asarray(Image.open(tmp_path / "out" / found["mask"][1]))
    assert whole.shape == mask.shape == (200, 300) and whole.dtype == np.float32
    assert ((whole > found.threshold[1]) == (mask == 255)).all() and mask.any()
    regions = pd.read_csv(tmp_path / "out/regions.csv")
    assert regions.path.str.contains("scratch").all() and regions.area.sum() == (mask > 0).sum()
    first = regions.iloc[0]
    assert 90 <= first.center_x <= 210 and 30 <= first.center_y <= 60  # where the scratch is
    assert json.loads((tmp_path / "out/regions.json").read_text())[0]["area"] == first.area
    save(tmp_path / "other/b.png", 52, size=(300, 200))
    detect_files(model, [tmp_path / "other"], tmp_path / "out", device="cpu", threshold=1e9)
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == ["b.png_overlay.png", "scores.csv"]
    higher = detect_files(model, [tmp_path / "new"], tmp_path / "out", device="cpu", false_positive_rate=0.001, save=())
    assert (higher.threshold > found.threshold).all()
    for wrong in (dict(threshold=1.0, false_positive_rate=0.1), dict(false_positive_rate=2.0), dict(save=("heat",)),
                  dict(threshold=float("nan")), dict(threshold=float("inf"))):
        with pytest.raises(InputError):
            detect_files(model, [tmp_path / "new"], tmp_path / "out", device="cpu", **wrong)


def test_what_a_detection_has_drawn_is_never_read_and_tables_of_others_are_never_replaced(model, tmp_path):
    new = photos(tmp_path / "new", range(50, 53), size=(300, 200))
    detect_files(model, [new], new / "found", device="cpu", save=OUTPUTS)
    for out in (tmp_path / "out", new / "found", new):
        assert len(detect_files(model, [new], out, device="cpu", save=("masks",))) == 3
    dataset = read_dataset(new)
    assert len(dataset.samples) == 3 and any("drawn by a detection" in line for line in dataset.left_out)
    for name in ("scores.csv", "regions.csv"):
        (mine := tmp_path / f"mine of {name}" / name).parent.mkdir()
        mine.write_text("name,mark\nBob,1\n")
        with pytest.raises(InputError, match="not written by a detection"):
            detect_files(model, [new], mine.parent, device="cpu")
        assert [path.name for path in mine.parent.rglob("*")] == [name] and "Bob" in mine.read_text()


def test_calibrate_sets_the_threshold_anew(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    photos(tmp_path / "more", range(200, 215), size=(300, 200))
    told = CliRunner().invoke(main, ["calibrate", str(tmp_path / "model"), str(tmp_path / "more"), "--device", "cpu",
                                     "--false-positive-rate", "0.2"])
    assert told.exit_code == 0 and "15 normal files" in told.stdout, told.stderr
    calibration = AnomalyDetector.from_pretrained(tmp_path / "model").config.calibration["photos"]
    assert calibration["n"] == 15 and calibration["false_positive_rate"] == 0.2
    tree(tmp_path / "mixed", "ok/1.png", "x/2.png")
    refused = CliRunner().invoke(main, ["calibrate", str(tmp_path / "model"), str(tmp_path / "mixed"), "--device", "cpu"])
    assert refused.exit_code == 2 and "--normal" in refused.stderr


def test_what_detect_skips_is_counted(model, tmp_path):
    save(tmp_path / "new/a.png", 1)
    for name in ("b.heic", "c.heic", "d.txt"):
        (tmp_path / "new" / name).touch()
    told = CliRunner().invoke(main, ["detect", str(model), str(tmp_path / "new"), "--out", str(tmp_path / "out"),
                                     "--device", "cpu", "--no-overlays"])
    assert "left out: 2 suffix .heic, 1 suffix .txt" in told.stdout
    assert not (tmp_path / "out/overlays").exists()


# ---- pictures and masks of every kind

def test_more_than_8_bits_keep_their_contrast(tmp_path, one_thread):
    "A camera of 12 bits: the range is measured on the training normals, and kept in the model."
    def shot(seed, scratch=False):
        return (plate(seed, scratch=scratch)[0][..., 0].astype(np.uint16) * 16)

    (tmp_path / "shots").mkdir()
    for number in range(12):
        Image.fromarray(shot(number)).save(tmp_path / f"shots/{number}.png")
    detector = train("knn", tmp_path / "shots", tmp_path / "run")
    low, high = detector.processor.value_range
    assert low < 960 and 2400 < high < 5000 and "values from" in detector.processor.describe()
    again = AnomalyDetector.from_pretrained(tmp_path / "run/model")
    inputs = again.preprocess([shot(50)])[0]
    assert inputs.max() - inputs.min() > 0.8 and torch.equal(inputs, detector.preprocess([shot(50)])[0])
    Image.fromarray(shot(50)).save(tmp_path / "new.tif")
    assert torch.equal(inputs, again.preprocess(tmp_path / "new.tif")[0])
    assert again([shot(51, scratch=True)]).is_anomalous[0]
    for other in (shot(50) / 4095, (shot(50) // 16).astype(np.uint8), torch.rand(3, 200, 200)):
        with pytest.raises(InputError, match="the detector has learned"):
            again([other])


def test_more_than_8_bits_are_not_squeezed_into_8_without_a_word(model, tmp_path):
    "12 bits in 16 would be almost black to a detector of 8 bits; so would be floats that are no numbers."
    Image.fromarray(plate(50)[0][..., 0].astype(np.uint16) * 16).save(tmp_path / "new.png")
    detector = AnomalyDetector.from_pretrained(model)
    with pytest.raises(InputError, match="new.png: 16 bits, but no value above 2"):
        detector(tmp_path / "new.png")
    with pytest.raises(InputError, match="not finite"):
        detector([np.full((8, 8), np.nan)])
    full = plate(50, (300, 200))[0].astype(np.uint16) * 257
    assert detector([full]).scores == detector([plate(50, (300, 200))[0]]).scores


def test_a_picture_has_the_same_answer_in_every_form(model, tmp_path):
    detector, image = AnomalyDetector.from_pretrained(model), plate(60, (300, 200), True)[0].copy()
    image[..., 2] //= 2  # so that the order of the channels matters
    Image.fromarray(image).save(tmp_path / "a.png")
    tensor = torch.from_numpy(image).movedim(-1, 0).clone()
    expected = detector(tmp_path / "a.png").scores[0]
    for source in (image, image / 255, (tmp_path / "a.png").read_bytes(), io.BytesIO((tmp_path / "a.png").read_bytes())):
        assert detector([source]).scores[0] == pytest.approx(expected, rel=1e-5)
    with open(tmp_path / "a.png", "rb") as file:
        assert detector(file).scores[0] == pytest.approx(expected, rel=1e-5)
    for same in (tensor, tensor.float() / 255, tensor.float(), tensor.long(), tensor.half() / 255, tensor / 127.5 - 1,
                 tensor.to(torch.uint16), (image / 255).astype(np.float16)):
        assert detector(same).scores[0] == pytest.approx(expected, rel=1e-4)
    black_and_white = image[..., 0] > 150
    as_tensor = detector(torch.from_numpy(black_and_white).expand(3, -1, -1)).scores[0]
    assert detector(black_and_white).scores[0] == pytest.approx(as_tensor, rel=1e-4)
    for swapped in (image[..., ::-1], np.ascontiguousarray(image[..., ::-1])):
        assert detector([swapped], channel_order="bgr").scores[0] == pytest.approx(expected, rel=1e-5)
    for wrong, message in ((tensor.float() / 127, "a tensor must be"), (image.astype(np.int64), "int64")):
        with pytest.raises(InputError, match=message):
            detector([wrong])
    with pytest.raises(InputError, match="channel_order"):
        detector([image], channel_order="gbr")


def test_masks_by_stated_rules(tmp_path):
    mask = plate(0, scratch=True)[1]
    grey = Image.fromarray(mask * np.uint8(255))
    clear = Image.new("RGBA", grey.size, (255, 0, 0, 0))
    clear.putalpha(grey)
    red = Image.merge("RGB", (grey, *[Image.new("L", grey.size)] * 2))
    written = {"one.png": Image.fromarray(mask * np.uint8(1)), "white.png": grey, "lossy.jpg": grey, "lossy.webp": grey,
               "lossy.avif": grey, "lossy.jp2": grey, "red.jpg": red, "alpha.png": clear}
    for name, one in written.items():
        one.save(tmp_path / name, **({"quality_layers": [40]} if name == "lossy.jp2" else {"quality": 60}))
        assert (np.asarray(open_mask(tmp_path / name)) > 0).sum() == pytest.approx(mask.sum(), rel=0.1), name
    Image.fromarray(mask * np.uint8(1)).save(tmp_path / "faint.jpg")
    if np.asarray(Image.open(tmp_path / "faint.jpg")).max():
        with pytest.raises(InputError, match="PNG"):
            open_mask(tmp_path / "faint.jpg")


def test_a_mask_is_turned_like_its_image_and_an_inverted_one_is_named(tmp_path, caplog):
    flag = Image.Exif()
    flag[0x0112] = 6
    for name in ("train/good/0.jpg", "test/dent/1.jpg", "test/dent/2.jpg"):
        save(tmp_path / "part" / name, size=(40, 30), exif=flag)
    painted = np.zeros((30, 40), np.uint8)
    painted[:6, :20] = 255  # over the stored pixels: upper left becomes upper right
    (tmp_path / "part/ground_truth/dent").mkdir(parents=True)
    Image.fromarray(painted).save(tmp_path / "part/ground_truth/dent/1_mask.png")
    Image.new("L", (30, 40), 255).save(tmp_path / "part/ground_truth/dent/2_mask.png")
    save(tmp_path / "part/test/dent/3.jpg", size=(40, 30))
    Image.new("L", (40, 30)).save(tmp_path / "part/ground_truth/dent/3_mask.png")
    dataset, caplog.handler.level = read_dataset(tmp_path), 0
    with caplog.at_level("INFO", "adiff"):
        turned, whole, none = (dataset.mask(row, FULL_FRAME.at(32)) for row in dataset.select("test").itertuples())
    assert turned[2, 30] and not turned[2, 2] and "turned like its image" in caplog.text
    assert whole.all() and "inverted" in caplog.text and not none.any() and "3_mask.png: the mask is empty" in caplog.text


# ---- the edges of the one-line contract

def test_a_run_may_stand_beside_the_folders_that_were_read(tmp_path, monkeypatch, one_thread):
    "`two` is read as a category of the folder above it, which is not read."
    tree(tmp_path, *numbered("two/good/{}.png", 6), *numbered("two/bad/{}.png", 2), size=(40, 40))
    monkeypatch.chdir(tmp_path)
    train("knn", "two", "runs/two")
    with pytest.raises(InputError, match="two/run: lies in the dataset two"):
        train("knn", "two", "two/run")


@pytest.mark.parametrize("name, value, meant", [
    ("seed", 1.0, 1), ("seed", "3", 3), ("seed", None, 0), ("resume", "true", True), ("resume", "no", False),
    ("draws", "4", 4), ("seconds", 2, 2.0), ("minutes", "0.5", 0.5), ("batch_sizes", 8, "8"), ("batch_sizes", [1, 8], "1,8"),
    ("categories", None, "all"), ("categories", ["01", 2], "01,2"), ("out_dir", 2024, "2024"), ("official", None, "")])
def test_words_of_papermill_mean_what_they_mean_on_the_command_line(name, value, meant):
    assert as_typed(name, value) == meant and type(as_typed(name, value)) is type(meant)


@pytest.mark.parametrize("name, value", [
    ("seed", 1.5), ("seed", True), ("seed", "x"), ("seed", [1]), ("draws", None), ("minutes", float("inf")),
    ("resume", 2), ("categories", {"a": 1}), ("out_dir", None), ("device", True)])
def test_what_no_parameter_can_mean_is_one_line(name, value):
    with pytest.raises(InputError, match=f"^{name}: ") as error:
        as_typed(name, value)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="overrides: must be a JSON object"):
        parse_overrides([1])


def test_every_parameter_of_a_notebook_has_its_type(repository):
    "One that `as_typed` does not know would stay as papermill guessed it."
    for path in (repository / "nbs/experiments").glob("*.ipynb"):
        for name, one in papermill.inspect_notebook(path).items():
            value = ast.literal_eval(one["default"])
            assert name == "overrides" or type(as_typed(name, str(value))) is type(value), (path.name, name)


@pytest.mark.parametrize("change, hint", [
    ({"trainin": {}}, "training"), ({"training": {"lenght": 3}}, "training.length"), ({"length": 3}, "training.length"),
    ({"codec": {"kind": "wavelett"}}, "wavelet"), ({"data": {"imagesize": 3}}, "data.image_size")])
def test_a_misspelt_setting_names_the_nearest(tmp_path, change, hint):
    tree(tmp_path, "a/1.png", "a/2.png")
    with pytest.raises(InputError, match=f"did you mean .*{hint}") as error:
        fit("deco", tmp_path / "a", tmp_path / "run", overrides=change)
    assert "\n" not in str(error.value)


def test_misspelt_names_name_the_nearest(tmp_path):
    tree(tmp_path, "a/1.png", "a/2.png")
    for words, meant in ((["deko", "a"], "deco"), (["deco", "a", "--preset", "instnat"], "instant")):
        told = CliRunner().invoke(main, ["fit", *words[:1], str(tmp_path / "a"), *words[2:], "--out", str(tmp_path / "x")])
        assert told.exit_code == 2 and f"did you mean {meant}?" in told.stderr and told.stderr.count("\n") == 1
    with pytest.raises(InputError, match="did you mean data_root?"):
        check_parameters({"data_rot": 1}, (), ["data_root", "seed"])


def test_a_package_that_breaks_when_imported_is_one_line(tmp_path):
    broken = tmp_path / "fake/torchvision"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    about = tmp_path / "fake/torchvision-0.29.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.29.1\n")
    photos(tmp_path / "photos", range(3))
    path = os.pathsep.join([str(tmp_path / "fake"), os.environ.get("PYTHONPATH", "")])
    code = "from adiff.runs.command_line import main; main()"
    told = subprocess.run([sys.executable, "-c", code, "fit", "knn", tmp_path / "photos", "--out", tmp_path / "run"],
                          env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    lines = told.stderr.strip().splitlines()
    assert told.returncode == 2 and lines[-1].startswith("adiff: the package torchvision cannot be imported"), told.stderr
    assert "Traceback" not in told.stderr and "nms does not exist" in lines[-1]


@pytest.mark.parametrize("package, error", [
    ("soundfile", 'OSError("sndfile library not found using ctypes.util.find_library")'),
    ("torchaudio", 'OSError("libtorchaudio.so: undefined symbol: _ZN3c10")'),
    ("sklearn", 'ImportError("DLL load failed while importing _check_build")')])
def test_a_library_that_does_not_load_is_not_the_fault_of_a_file(tmp_path, package, error):
    (tmp_path / "fake" / package).mkdir(parents=True)
    (tmp_path / "fake" / package / "__init__.py").write_text(f"raise {error}\n")
    for number in range(3):
        hum(tmp_path / f"normal/{number}.wav", number, 4)
    path = os.pathsep.join([str(tmp_path / "fake"), os.environ.get("PYTHONPATH", "")])
    code = "from adiff.runs.command_line import main; main()"
    told = subprocess.run([sys.executable, "-c", code, "fit", "one-class-svm", tmp_path / "normal", "--out",
                           tmp_path / "run"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert told.returncode == 2 and "Traceback" not in told.stderr, told.stderr
    assert told.stderr.strip().splitlines()[-1].startswith(f"adiff: the package {package} cannot be imported")


@pytest.mark.parametrize("wrap", [lambda w: {"model": w}, lambda w: w, lambda w: {"state_dict": w}, lambda w: {"ema": w},
                                  lambda w: {"model": {f"module.{key}": value for key, value in w.items()}}])
def test_official_checkpoints_as_they_are_saved(tmp_path, wrap):
    weights = {"cond_stage_model.embedding.weight": torch.zeros(2, 4), "time_embed.0.weight": torch.zeros(8, 2),
               "input_blocks.0.0.weight": torch.zeros(2, 4, 3, 3)}
    torch.save(wrap(weights), tmp_path / "a.pt")
    assert set(read_official_checkpoint(tmp_path / "a.pt")) == set(weights)


def test_a_kernel_of_another_python_is_refused_before_anything_runs(tmp_path, monkeypatch):
    kernel = tmp_path / "kernels/python3"
    kernel.mkdir(parents=True)
    (tmp_path / "python").write_text("#!/bin/sh\necho \"No module named 'adiff'\" >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    (kernel / "kernel.json").write_text(json.dumps({
        "argv": [str(tmp_path / "python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    assert "another Python" in kernel_trouble() and "No module named 'adiff'" in kernel_trouble()
