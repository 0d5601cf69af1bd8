"""Reading data: odd images and broken files, protocols, layouts, split tables, held-out normals, the demo dataset."""
import hashlib
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from adiff.core import InputError
from adiff.data.dataset import COLUMNS, READERS, Dataset
from adiff.data.files import find_images
from adiff.data.images import FULL_FRAME, OFFICIAL, PROTOCOLS, ImageProcessor, read_image, to_array, to_tensor
from adiff.data.loading import ProcessedFiles, fixed_subset, read_ahead
from adiff.data.reading import read_dataset
from adiff.data.sounds import LogMel
from adiff.data.demo_images import make_demo_data

OFFICIAL_TRAINING = {"bottle": 188, "cable": 202, "capsule": 197, "carpet": 252, "grid": 238, "hazelnut": 352,
                     "leather": 221, "metal_nut": 198, "pill": 240, "screw": 288, "tile": 207, "toothbrush": 54,
                     "transistor": 192, "wood": 222, "zipper": 216}


def save(path, size=(8, 8), grey=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).save(path)


def make_category(folder, train=20, good=3, dents=3, masks=3):
    for index in range(train):
        save(folder / f"train/good/{index:03}.png")
    for index in range(good):
        save(folder / f"test/good/{index:03}.png")
    for index in range(dents):
        save(folder / f"test/dent/{index:03}.png")
    for index in range(masks):
        save(folder / f"ground_truth/dent/{index:03}_mask.png", grey=255)


def one_line(error):
    message = str(error.value)
    assert message and "\n" not in message
    return message


# ---- images

GREY16 = np.full((5, 7), 32896, np.uint16)  # 128 * 257


@pytest.mark.parametrize("name, image, expected", [
    ("l.png", Image.new("L", (7, 5), 128), 128),
    ("1.png", Image.new("1", (7, 5), 1), 255),
    ("la.png", Image.new("LA", (7, 5), (0, 128)), 127),
    ("rgba.png", Image.new("RGBA", (7, 5), (0, 0, 0, 0)), 255),
    ("p.png", Image.new("L", (7, 5), 128).convert("P"), 128),
    ("i16.png", Image.fromarray(GREY16), 128),
    ("i16.tif", Image.fromarray(GREY16), 128),
    ("i.tif", Image.fromarray(GREY16.astype(np.int32)), 128),
    ("f.tif", Image.fromarray(np.full((5, 7), 128 / 255, np.float32)), 128),
    ("cmyk.tif", Image.new("CMYK", (7, 5), (0, 0, 0, 127)), 128),
    ("rgb.webp", Image.new("RGB", (7, 5), (255, 255, 255)), 255),
    ("rgb.BMP", Image.new("RGB", (7, 5), (128, 128, 128)), 128),
])
def test_every_mode_becomes_rgb(tmp_path, name, image, expected):
    image.save(tmp_path / name)
    for source in (tmp_path / name, str(tmp_path / name), image):
        rgb = read_image(source)
        assert rgb.mode == "RGB" and rgb.size == (7, 5)
        assert np.abs(np.asarray(rgb, int) - expected).max() <= 1


def test_transparent_palette_and_grey(tmp_path):
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([200, 0, 0])
    palette.save(tmp_path / "p.png", transparency=0)
    Image.new("L", (4, 4), 7).save(tmp_path / "l.png", transparency=7)
    for name in ("p.png", "l.png"):
        assert read_image(tmp_path / name).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("orientation, size", [(1, (7, 5)), (3, (7, 5)), (6, (5, 7)), (8, (5, 7))])
def test_exif_orientation(tmp_path, orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (7, 5)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == size


@pytest.mark.parametrize("array", [
    np.full((5, 7), 128, np.uint8), np.full((5, 7, 1), 128, np.uint8), np.full((5, 7, 3), 128, np.uint8), GREY16,
    np.dstack([GREY16] * 3), np.full((5, 7), 128 / 255), np.full((5, 7, 3), 128 / 255, np.float32),
    np.dstack([np.full((5, 7, 3), 128, np.uint8), np.full((5, 7), 255, np.uint8)]),
], ids=lambda array: f"{array.dtype}{array.shape}")
def test_arrays(array):
    assert np.array_equal(read_image(array), np.full((5, 7, 3), 128))


@pytest.mark.parametrize("array", [
    np.full((5, 7), np.nan), np.full((5, 7), np.inf), np.full((5, 7), -0.5), np.full((5, 7), 2.0), np.zeros((0, 7)),
    np.zeros((5, 7, 2)), np.zeros(5), np.zeros((5, 7), np.int32), np.array([["a"]]), np.array([[None]]),
], ids=lambda array: f"{array.dtype}{array.shape}{array.flat[:1]}")
def test_unusable_arrays(array):
    with pytest.raises(InputError) as error:
        read_image(array)
    one_line(error)


def test_broken_files(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for suffix in ("png", "jpg", "tif", "webp", "bmp"):
        noise.save(tmp_path / f"whole.{suffix}")
        content = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(content[:len(content) // 2])
    damaged = bytearray((tmp_path / "whole.png").read_bytes())
    damaged[60:90] = bytes(30)
    (tmp_path / "damaged.png").write_bytes(damaged)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image\n")
    (tmp_path / "folder.png").mkdir()
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tif")
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "wide.tif")
    broken = ["cut.png", "cut.jpg", "cut.tif", "cut.webp", "cut.bmp", "damaged.png", "empty.png", "text.png",
              "folder.png", "nan.tif", "wide.tif", "missing.png"]
    for name in broken:
        with pytest.raises(InputError) as error:
            read_image(tmp_path / name)
        assert name in one_line(error), name


def test_decompression_bomb(tmp_path, monkeypatch):
    save(tmp_path / "huge.png", (100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError) as error:
        read_image(tmp_path / "huge.png")
    assert "huge.png" in one_line(error)


def test_other_sources_are_refused():
    for source in (None, 3, torch.zeros(3, 4, 4)):
        with pytest.raises(InputError):
            read_image(source)


def test_tensor_round_trip():
    image = Image.fromarray(np.arange(256 * 3, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3))
    tensor = to_tensor(image)
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32 and tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(to_array(tensor), np.asarray(image))
    assert to_array(torch.tensor([-3.0, 3.0]).expand(3, 1, 2))[0, :, 0].tolist() == [0, 255]


# ---- protocols

def test_official_crop_is_exact_at_288():
    noise = np.random.default_rng(0).integers(0, 256, (288, 288, 3), np.uint8)
    assert np.array_equal(OFFICIAL.image(Image.fromarray(noise)), noise[16:272, 16:272])
    full = noise[:256, :256]
    assert np.array_equal(FULL_FRAME.image(Image.fromarray(full)), full)
    assert [protocol.size for protocol in PROTOCOLS.values()] == [256, 256]


def test_official_mask_rule():
    mask = np.zeros((900, 700), np.uint8)
    mask[400:500, 300:400] = 1  # any value above 0 is anomalous
    ours = OFFICIAL.mask(Image.fromarray(mask))
    resized = Image.fromarray(mask * np.uint8(255)).resize((288, 288), Image.Resampling.BICUBIC)
    assert np.array_equal(ours, np.asarray(resized.crop((16, 16, 272, 272))) > 0)
    assert ours.sum() > mask.sum() * 288 * 288 / mask.size  # slightly dilated
    corner = np.zeros((288, 288), np.uint8)
    corner[:16] = 255
    assert not OFFICIAL.mask(Image.fromarray(corner)).any() and FULL_FRAME.mask(Image.fromarray(corner)).any()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I", "I;16"])
def test_mask_modes(mode):
    empty = Image.new(mode, (256, 256))
    if mode in ("LA", "RGBA"):
        empty.putalpha(255)
    full = Image.new("L", (256, 256), 1) if mode in ("1", "LA", "RGB", "RGBA") else Image.new(mode, (256, 256), 1)
    assert not FULL_FRAME.mask(empty).any() and FULL_FRAME.mask(full.convert(mode)).all() == (mode != "1")


def test_place_puts_the_map_where_it_was():
    processor = np.zeros((400, 600), np.uint8)
    processor[150:190, 420:480] = 255
    seen = np.asarray(OFFICIAL.image(Image.fromarray(processor)), np.float32) / 255
    placed = OFFICIAL.place(seen, (600, 400))
    assert placed.shape == (400, 600) and placed.dtype == np.float32
    inside = placed > 0.5
    assert (inside & (processor > 0)).sum() / (inside | (processor > 0)).sum() > 0.9
    ones = OFFICIAL.place(torch.ones(256, 256), (600, 400))
    assert set(np.unique(ones.round(5))) == {0, 1} and abs(ones.mean() - (256 / 288) ** 2) < 0.01
    assert np.allclose(FULL_FRAME.place(np.ones((256, 256)), (31, 17)), 1)


def test_protocol_at_another_size_and_refused():
    assert OFFICIAL.at(128) == ImageProcessor("official@128", 144, 128) and FULL_FRAME.at(64).size == 64
    for resize, crop in ((256, 288), (0, None), (10, 0)):
        with pytest.raises(InputError):
            ImageProcessor("wrong", resize, crop)


# ---- folders

def test_find_images(tmp_path):
    for name in ("b.JPG", "a.png", "deep/c.TIFF", ".hidden.png", ".cache/d.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == ["a.png", "b.JPG", "deep/c.TIFF"]
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing", "a.png"):
        with pytest.raises(InputError) as error:
            find_images(tmp_path / folder)
        assert folder in one_line(error)


def test_mvtec_layout(tmp_path):
    make_category(tmp_path / "tire")
    make_category(tmp_path / "bottle", good=0, masks=1)
    make_category(tmp_path / "nut", train=0)
    (tmp_path / "notes").mkdir()
    dataset = read_dataset(tmp_path)
    assert dataset.categories == ["bottle", "nut", "tire"] and dataset.name == tmp_path.name
    assert len(dataset.select("train", "tire")) == 18 and len(dataset.select("validation", "tire")) == 2
    notes = "\n".join(dataset.notes)
    for fact in ("notes: skipped", "bottle: test images are all anomalous", "nut: no training images",
                 "bottle: 2 of 3 anomalous test images have no mask", "deterministic tenth"):
        assert fact in notes
    test = dataset.select("test", "tire")
    assert test.label.tolist() == [1, 1, 1, 0, 0, 0] and test.defect.tolist() == ["dent"] * 3 + ["good"] * 3
    assert test["mask"][0] == "tire/ground_truth/dent/000_mask.png" and dataset.image(test.iloc[0]).size == (8, 8)


def test_one_category_folder_is_the_same_dataset(tmp_path):
    make_category(tmp_path / "tire")
    pd.testing.assert_frame_equal(read_dataset(tmp_path).samples, read_dataset(tmp_path / "tire").samples)


@pytest.mark.parametrize("categories", ["all", "tire,nut", " nut , tire ", ["tire", "nut"]])
def test_choosing_categories(tmp_path, categories):
    for name in ("tire", "nut"):
        make_category(tmp_path / name)
    assert read_dataset(tmp_path, categories).categories == ["nut", "tire"]
    assert read_dataset(tmp_path, "tire").categories == ["tire"]


def test_unknown_names(tmp_path):
    make_category(tmp_path / "tire")
    for categories in ("tyre", "tire,tyre", ["tyre"], "", []):
        with pytest.raises(InputError) as error:
            read_dataset(tmp_path, categories)
        one_line(error)
    with pytest.raises(InputError, match="known: tire"):
        read_dataset(tmp_path, "tyre")
    for wrong in (("val", None), ("test", "tyre")):
        with pytest.raises(InputError, match="known"):
            read_dataset(tmp_path).select(*wrong)
    with pytest.raises(InputError, match="no such folder"):
        read_dataset(tmp_path / "missing")


def test_labelled_folders_that_fit_no_layout_are_refused(tmp_path):
    save(tmp_path / "a/train/000.png")
    save(tmp_path / "b/test/dent/000.png")
    save(tmp_path / "c/bottle/ground_truth/dent/000_mask.png")
    for folder in ("a", "c"):
        with pytest.raises(InputError, match="CATEGORY/train/good"):
            read_dataset(tmp_path / folder)
    assert read_dataset(tmp_path / "b").select("test").label.tolist() == [1]  # a category that can only be evaluated


def test_plain_folder(tmp_path):
    for index in range(12):
        save(tmp_path / f"screws/{'morning' if index % 2 else ''}/{index}.png")
    dataset = read_dataset(tmp_path / "screws")
    assert dataset.categories == ["screws"] and len(dataset.select("train")) == 11
    assert (dataset.samples.label == 0).all()
    assert any("plain folder" in note for note in dataset.notes)
    with pytest.raises(InputError, match="known: screws"):
        read_dataset(tmp_path / "screws", "bolts")


def test_masks(tmp_path):
    make_category(tmp_path / "tire", masks=2)
    save(tmp_path / "tire/ground_truth/dent/001_mask.png", (9, 8))
    dataset = read_dataset(tmp_path)
    test, protocol = dataset.select("test"), FULL_FRAME.at(8)
    for rows in (list(test.itertuples()), [test.iloc[index] for index in range(len(test))]):
        assert dataset.mask(rows[0], protocol).all() and dataset.mask(rows[2], protocol) is None
        assert not dataset.mask(rows[3], protocol).any()
        with pytest.raises(InputError) as error:
            dataset.mask(rows[1], protocol)
        assert all(part in one_line(error) for part in ("001_mask.png", "dent/001.png", "9 x 8", "8 x 8"))


# ---- held-out normals

def held_out(dataset, category):
    return {path.split("/")[-1] for path in dataset.select("validation", category).path}


def test_held_out_normals_are_stable(tmp_path):
    for name in ("tire", "nut"):
        make_category(tmp_path / name, train=40)
    before = read_dataset(tmp_path)
    assert len(held_out(before, "tire")) == 4 and held_out(before, "tire") != held_out(before, "nut")
    assert held_out(read_dataset(tmp_path, "tire"), "tire") == held_out(before, "tire")
    save(tmp_path / "nut/train/good/new.png")
    make_category(tmp_path / "bottle")
    assert held_out(read_dataset(tmp_path), "tire") == held_out(before, "tire")
    save(tmp_path / "tire/train/good/new.png")
    assert len(held_out(read_dataset(tmp_path), "tire") & held_out(before, "tire")) >= 3


@pytest.mark.parametrize("train, expected", [(1, 0), (2, 1), (5, 1), (20, 2)])
def test_held_out_count(tmp_path, train, expected):
    make_category(tmp_path / "tire", train=train)
    dataset = read_dataset(tmp_path)
    assert (len(dataset.select("train")), len(dataset.select("validation"))) == (train - expected, expected)


def test_fingerprint(tmp_path):
    make_category(tmp_path / "a/tire")
    make_category(tmp_path / "b/tire")
    first = read_dataset(tmp_path / "a").fingerprint()
    assert first == read_dataset(tmp_path / "b").fingerprint() and len(first) == 16
    save(tmp_path / "b/tire/test/good/000.png", (64, 64), 3)
    assert read_dataset(tmp_path / "b").fingerprint() != first


# ---- split tables

def write_table(path, rows, columns="object,split,label,image,mask"):
    path.write_text("\n".join([columns, *rows]) + "\n")
    return path


def touch_all(root, table):
    for path in [*table.image, *table["mask"].dropna()]:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def test_official_mvtec_table(shared, tmp_path):
    file = shared / "splits/mvtec-split.csv"
    touch_all(tmp_path, pd.read_csv(file))
    dataset = read_dataset(tmp_path, split_table=file)
    assert dataset.select("train").category.value_counts().to_dict() == OFFICIAL_TRAINING
    sizes = {split: len(dataset.select(split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 3267, "validation": 362, "test": 1725} and dataset.select("test").label.sum() == 1258
    assert not any("tenth" in note or "no mask" in note for note in dataset.notes)
    assert set(dataset.select("test", "bottle").defect) == {"good", "broken_large", "broken_small", "contamination"}


def test_official_visa_table(shared, tmp_path):
    file = shared / "splits/visa-split.csv"
    table = pd.read_csv(file)
    table = table[table.object.isin(["candle", "pcb3"])]
    touch_all(tmp_path, table)
    by_table = read_dataset(tmp_path, "candle,pcb3", split_table=file)
    (tmp_path / "split_csv").mkdir()
    table.to_csv(tmp_path / "split_csv/1cls.csv", index=False)
    detected = read_dataset(tmp_path)
    pd.testing.assert_frame_equal(by_table.samples, detected.samples)
    assert len(detected.select("train", "candle")) == 810 and len(detected.select("validation", "candle")) == 90
    assert detected.select("test").groupby("category").label.sum().to_dict() == {"candle": 100, "pcb3": 100}


def test_table_with_files_missing(shared, tmp_path):
    file = shared / "splits/mvtec-split.csv"
    table = pd.read_csv(file)
    touch_all(tmp_path, table[table.object == "bottle"])
    (tmp_path / "bottle/train/good/000.png").unlink()
    (tmp_path / "bottle/ground_truth/broken_large/000_mask.png").unlink()
    dataset = read_dataset(tmp_path, split_table=file)
    assert dataset.categories == ["bottle"] and len(dataset.samples) == 291
    assert any("have no file here" in note and "cable" in note for note in dataset.notes)
    assert any("1 of 63 anomalous test images have no mask" in note for note in dataset.notes)
    with pytest.raises(InputError, match="cable"):
        read_dataset(tmp_path, "bottle,cable", split_table=file)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(InputError, match="mvtec-split.csv"):
        read_dataset(tmp_path / "elsewhere", split_table=file)


@pytest.mark.parametrize("rows, columns, message", [
    (["a,train,normal"], "object,split,label", "no column image"),
    ([], "object,split,label,image,mask", "no rows"),
    (["a,training,normal,a/0.png,"], "object,split,label,image,mask", "row 2"),
    (["a,train,normal,a/0.png,", "a,test,broken,a/1.png,"], "object,split,label,image,mask", "row 3"),
    (["a,train,normal,a/0.png,", "a,test,normal,a/0.png,"], "object,split,label,image,mask", "listed twice"),
    (["a,train,normal,../0.png,"], "object,split,label,image,mask", "relative"),
    (["a,train,anomaly,a/0.png,"], "object,split,label,image,mask", "anomalous image outside the test split"),
    (['a,train,"normal,a/0.png,'], "object,split,label,image,mask", "not a CSV"),
])
def test_spoilt_tables(tmp_path, rows, columns, message):
    file = write_table(tmp_path / "table.csv", rows, columns)
    with pytest.raises(InputError, match=message) as error:
        read_dataset(tmp_path, split_table=file)
    assert "table.csv" in one_line(error)


def test_missing_or_binary_table(tmp_path):
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    for name in ("missing.csv", "binary.csv"):
        with pytest.raises(InputError, match=name):
            read_dataset(tmp_path, split_table=tmp_path / name)


def test_development_data(shared):
    dataset = read_dataset(shared / "data/mvtec_ad")
    assert len(dataset.select("train", "bottle")) == 188 and len(dataset.select("test", "bottle")) == 83
    row = dataset.select("test", "bottle").iloc[0]
    assert dataset.mask(row, OFFICIAL).any() and OFFICIAL.image(dataset.image(row)).size == (256, 256)
    assert len(read_dataset(shared / "data/mvtec_style", "tire").select("test")) == 112


# ---- processor and canvas

def test_what_counts_as_one_source():
    image = np.zeros((8, 8, 3), np.uint8)
    for one in (image, "a.png", Image.new("L", (8, 8)), torch.zeros(3, 8, 8)):
        assert len(OFFICIAL.as_list(one)) == 1
    for two in ([image, image], (image, image), torch.zeros(2, 3, 8, 8)):
        assert len(OFFICIAL.as_list(two)) == 2
    sound = (np.zeros(16), 16000)
    assert LogMel().as_list(sound) == [sound] and len(LogMel().as_list([sound, sound])) == 2
    for nothing in ([], (), torch.zeros(0, 3, 8, 8)):
        with pytest.raises(InputError, match="nothing to detect in"):
            OFFICIAL.as_list(nothing)


def test_tensors_are_checked_and_resized():
    assert OFFICIAL.check(torch.ones(3, 10, 20)).shape == (3, 256, 256)
    assert LogMel().check(torch.full((1, 10, 20), 5.0)).max() == 5  # a standardised level may be far from normal
    for wrong in (torch.ones(1, 8, 8), torch.ones(8, 8), torch.full((3, 8, 8), 1.1), torch.full((3, 8, 8), torch.nan),
                  torch.zeros(3, 0, 8)):
        with pytest.raises(InputError, match="a tensor must be"):
            OFFICIAL.check(wrong)


def test_an_image_is_drawn_at_its_own_size(tmp_path):
    Image.fromarray(np.full((60, 90, 3), 100, np.uint8)).save(tmp_path / "a.png")
    canvas = OFFICIAL.canvas(tmp_path / "a.png", OFFICIAL.windows(tmp_path / "a.png"))
    tensor = canvas.load(0.0)
    assert torch.equal(tensor, OFFICIAL.load(tmp_path / "a.png"))
    (tmp_path / "a.png").unlink()  # read once
    canvas.add(0.0, tensor, torch.ones(256, 256))
    canvas.draw(tmp_path / "overlay.png", threshold=0.5, limit=1.0)
    drawn = np.asarray(Image.open(tmp_path / "overlay.png"))
    assert drawn.shape == (60, 90, 3) and (drawn[0] == 100).all() and (drawn[30, 45] != 100).any()


def test_windows_of_a_sound_are_joined(tmp_path):
    processor, samples = LogMel(size=32, n_fft=4096), np.random.default_rng(0).normal(0, 0.1, 9 * 16000)
    canvas = processor.canvas((samples, 16000), processor.windows((samples, 16000)))
    for number, start in enumerate(canvas.starts):
        canvas.add(start, canvas.load(start), torch.full((32, 32), float(number)))
    assert canvas.map.shape == (32, 9 * 8) and canvas.map[0, [0, 16, 32, 71]].tolist() == [0, 1, 2, 3]
    canvas.draw(tmp_path / "sound.png", threshold=2.0)
    assert Image.open(tmp_path / "sound.png").width > 500


# ---- readers

def test_a_split_table_that_is_named_comes_before_every_reader(tmp_path):
    make_category(tmp_path / "tire")
    file = tmp_path / "table.csv"
    file.write_text("object,split,label,image\ntire,train,normal,tire/train/good/000.png\n")
    assert len(read_dataset(tmp_path, split_table=file).samples) == 1 < len(read_dataset(tmp_path).samples)


def test_readers_are_asked_in_order_before_plain_folders(tmp_path):
    assert list(READERS)[:6] == ["visa", "mvtec", "esc50", "dcase", "mimii", "urbansound8k"]
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    READERS["mine"] = lambda root, categories: Dataset(
        root, "mine", pd.DataFrame([("a.png", "nut", "train", 0, "good", "")], columns=COLUMNS))
    try:
        assert read_dataset(tmp_path).notes == ["layout read by the installed reader mine"]
        with pytest.raises(InputError, match="unknown category 'bolt'"):
            read_dataset(tmp_path, "bolt")
        READERS["mine"] = lambda root, categories: 3
        with pytest.raises(InputError, match="the installed reader 'mine' returns no Dataset"):
            read_dataset(tmp_path)
    finally:
        del READERS["mine"]
    assert "plain folder" in read_dataset(tmp_path).notes[0]


# ---- inputs for the network

def test_inputs_are_read_when_asked_for(tmp_path):
    make_category(tmp_path / "tire", train=6)
    dataset = read_dataset(tmp_path)
    files = ProcessedFiles(dataset, dataset.select("train"), OFFICIAL.at(32))
    assert [batch.shape for _, batch in files.batches(4)] == [(4, 3, 32, 32), (1, 3, 32, 32)]
    assert files.row.tolist() == [0, 1, 2, 3, 4]
    (tmp_path / "tire/train/good/000.png").write_text("broken")
    with pytest.raises(InputError, match="000.png"):
        torch.stack(list(files))


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("read_ahead")]


def test_inputs_read_ahead_are_the_same(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (23, 9, 9, 3), np.uint8)
    for index, image in enumerate(noise):
        (tmp_path / "tire/train/good").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"tire/train/good/{index:03}.png")
    dataset = read_dataset(tmp_path)
    files = ProcessedFiles(dataset, dataset.select("train"), OFFICIAL.at(32))
    for chosen in (None, torch.tensor([5, 3, 3, 20])):
        indices, batches = zip(*files.batches(4, chosen))
        assert torch.equal(torch.cat(indices), torch.arange(len(files)) if chosen is None else chosen)
        assert torch.equal(torch.cat(batches), torch.stack([files[int(index)] for index in torch.cat(indices)]))
        assert not reading_threads()


def test_reading_ahead_is_bounded_and_ends():
    read = []
    batches = read_ahead(lambda item: read.append(item) or -item, ((item, [item]) for item in range(100)), ahead=2)
    assert not read  # nothing before the first is asked for
    for item in range(10):
        assert next(batches) == (item, [-item])
        time.sleep(0.01)
        assert max(read) <= item + 2
    assert max(read) == 11 and reading_threads()
    batches.close()
    assert not reading_threads()
    assert list(read_ahead(abs, [])) == [] and list(read_ahead(abs, [("a", [])])) == [("a", [])]


def test_a_broken_file_is_named_when_its_batch_is_due(tmp_path):
    make_category(tmp_path / "tire", train=20)
    dataset = read_dataset(tmp_path)
    rows = dataset.select("train")
    (tmp_path / rows.path[5]).write_text("broken")
    batches = ProcessedFiles(dataset, rows, OFFICIAL.at(32)).batches(2)
    assert [indices.tolist() for indices, _ in (next(batches), next(batches))] == [[0, 1], [2, 3]]
    with pytest.raises(InputError, match=rows.path[5]):
        next(batches)
    assert not reading_threads()


def test_a_sample_is_all_or_a_thousand():
    assert fixed_subset(1000).tolist() == list(range(1000))
    positions = fixed_subset(100_000)
    assert len(positions) == len(positions.unique()) == 1000 and torch.equal(positions, positions.sort().values)
    assert abs(positions.double().mean() - 50_000) < 3_000


def test_a_folder_holds_images_or_sounds(tmp_path):
    make_category(tmp_path / "tire", train=2)
    (tmp_path / "tire/train/good/hum.wav").write_bytes(b"RIFF")
    with pytest.raises(InputError, match="images and sounds"):
        read_dataset(tmp_path)


# ---- the demo dataset

def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.relative_to(folder).as_posix().encode() + path.read_bytes() for path in files))


SMALL = dict(train=3, good=2, per_defect=1)


def test_demo_data_is_the_same_for_the_same_seed(tmp_path):
    folders = [make_demo_data(tmp_path / name, seed, **SMALL) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    first, second, other = (digest(folder).digest() for folder in folders)
    assert first == second != other
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]  # no temporary folder is left


def test_demo_data_reads_as_mvtec(tmp_path):
    dataset = read_dataset(make_demo_data(tmp_path / "demo", **SMALL))
    assert dataset.categories == ["brick", "cup"] and len(dataset.select("test")) == 2 * (2 + 6)
    for row in dataset.select("test").itertuples():
        mask = dataset.mask(row, FULL_FRAME.at(128))
        assert 0.005 < mask.mean() < 0.2 if row.label else not mask.any()
        assert dataset.image(row).size == (128, 128)


def test_demo_data_respects_what_is_there(tmp_path):
    folder = make_demo_data(tmp_path / "demo", **SMALL)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    make_demo_data(folder, **SMALL)
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(InputError, match="demo"):
        make_demo_data(folder, seed=1, **SMALL)
    find_images(folder)[0].unlink()
    with pytest.raises(InputError):
        make_demo_data(folder, **SMALL)
    (tmp_path / "mine").mkdir()
    make_demo_data(tmp_path / "mine", **SMALL)  # an empty folder is fine
    (tmp_path / "file").touch()
    with pytest.raises(InputError):
        make_demo_data(tmp_path / "file", **SMALL)


def test_demo_script(repository, tmp_path):
    (tmp_path / "file").touch()
    run = subprocess.run([sys.executable, repository / "data_scripts/demo.py", "--out", tmp_path / "file"],
                         capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "file" in run.stderr
