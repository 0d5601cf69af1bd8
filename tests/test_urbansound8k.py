"""UrbanSound8K: which clip trains, which tests, and that no recording does both; a made tree and the real table."""
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from adiff.core import InputError
from adiff.data.reading import read_dataset
from adiff.data.urbansound8k import CLASSES, RARE_EVENTS, read_urbansound8k
from adiff.runs.fit import fit

COLUMNS = ["slice_file_name", "fsID", "start", "end", "salience", "fold", "classID", "class"]
PROBLEMS = (*CLASSES, "rare_events")


def small_table():
    "Three recordings of every class in every fold, two clips of 3 s each (gun shots: 1 s)."
    rows = []
    for fold, number, take, clip in np.ndindex(10, 10, 3, 2):
        recording = 1000 * fold + 10 * number + take
        end = 5 * clip + (1 if CLASSES[number] == "gun_shot" else 3)
        name = f"{recording}-{number}-0-{clip}.wav"
        rows.append([name, recording, 5 * clip, end, 1, fold + 1, number, CLASSES[number]])
    return pd.DataFrame(rows, columns=COLUMNS)


def write_tree(root, table, folds=range(1, 11), suffix=".wav"):
    "The official tree with empty files: the reader opens none."
    for fold in folds:
        (root / f"audio/fold{fold}").mkdir(parents=True)
        for name in table.slice_file_name[table.fold == fold]:
            (root / f"audio/fold{fold}" / name).with_suffix(suffix).touch()
    write_table(root, table)
    return root


def write_table(root, table):
    (root / "metadata").mkdir(exist_ok=True)
    table.to_csv(root / "metadata" / "UrbanSound8K.csv", index=False)


def recording(path):
    return Path(path).name.split("-")[0]


def assert_no_leak(samples):
    "No recording in two splits, within a category and over all of them."
    side = samples.assign(recording=samples.path.map(recording)).groupby("recording").split.unique()
    assert side.map(len).max() == 1
    assert (samples.label[samples.split != "test"] == 0).all()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("city"), small_table())


def test_one_vs_rest_follows_the_folds(tree):
    dataset = read_urbansound8k(tree)
    assert dataset.kind == "sound" and dataset.categories == list(CLASSES)
    table = small_table().set_index("slice_file_name")
    samples = dataset.samples.join(table, on=dataset.samples.path.map(lambda path: Path(path).name))
    expected = samples.fold.map({9: "validation", 10: "test"}).fillna("train")
    assert (samples.split == expected).all()
    normal = samples["class"] == samples.category
    assert (samples.label == ~normal).all() and (samples.defect == samples["class"].where(~normal, "good")).all()
    for category in CLASSES:
        assert [len(dataset.select(split, category)) for split in ("train", "validation", "test")] == [48, 6, 60]
        assert dataset.select("test", category).label.sum() == 54
    assert not samples.duplicated(["path", "category"]).any()
    assert_no_leak(dataset.samples)
    assert dataset.fingerprint() == read_urbansound8k(tree).fingerprint()
    assert dataset.fingerprint() != read_urbansound8k(tree, "siren").fingerprint()
    assert (dataset.samples["mask"] == "").all()


def test_rare_events_and_the_choice_of_categories(tree):
    dataset = read_urbansound8k(tree, "rare_events, siren")
    assert dataset.categories == ["rare_events", "siren"]
    test = dataset.select("test", "rare_events")
    assert len(test) == 60 and set(test.defect[test.label == 1]) == set(RARE_EVENTS)
    assert len(dataset.select("train", "rare_events")) == 7 * 48
    assert read_urbansound8k(tree, ["siren"]).categories == ["siren"]
    with pytest.raises(InputError) as caught:
        read_urbansound8k(tree, "siren, sirene")
    assert all(name in str(caught.value) for name in ("sirene", *PROBLEMS)) and "\n" not in str(caught.value)


def test_read_dataset_recognises_the_tree(tree):
    assert read_dataset(tree, "siren").samples.equals(read_urbansound8k(tree, "siren").samples)


@pytest.mark.parametrize("suffix", [".flac", ".ogg", ".wav"])
def test_a_partial_copy_in_any_format_is_read_and_told(tmp_path, suffix):
    write_tree(tmp_path, small_table(), (1, 2, 10), suffix)
    (tmp_path / "audio/fold1/extra.wav").touch()
    (tmp_path / "audio/fold1/.hidden.wav").touch()
    (tmp_path / "audio/fold1/readme.txt").touch()
    dataset = read_urbansound8k(tmp_path)
    notes = "\n".join(dataset.notes)
    assert "180 of 600 clips found, in folds 1, 2 and 10; 420 rows have no file here" in notes
    assert "1 sound files have no row in the table and are ignored (first audio/fold1/extra.wav)" in notes
    assert (f"stored as {suffix}" in notes) == (suffix != ".wav")
    assert "training: folds 1 and 2; test: fold 10" in notes and "(20 of 120 clips) serve for validation" in notes
    for category in CLASSES:  # twelve clips of six recordings: a tenth is less than one, so the least is taken
        assert [len(dataset.select(split, category)) for split in ("train", "validation", "test")] == [10, 2, 60]
    assert_no_leak(dataset.samples)
    assert_no_leak(read_urbansound8k(tmp_path, "rare_events").samples)


def test_held_out_recordings_depend_on_names_alone(tmp_path):
    table = small_table()
    first = write_tree(tmp_path / "a", table, (1, 2, 3, 4, 5, 10))
    again = write_tree(tmp_path / "b", table.sample(frac=1, random_state=0), (1, 2, 3, 4, 5, 10))
    samples = read_urbansound8k(first).samples
    assert samples.equals(read_urbansound8k(again).samples)
    assert (samples[samples.split == "validation"].groupby("category").size() == 2).all()  # of 30 clips; pairs


def test_one_format_is_taken_where_a_clip_has_several(tmp_path):
    write_tree(tmp_path, small_table())
    for path in (tmp_path / "audio/fold1").iterdir():
        path.with_suffix(".flac").touch()
    dataset = read_urbansound8k(tmp_path)
    assert dataset.samples.path.str.endswith(".wav").all() and not any("no row" in note for note in dataset.notes)


def test_missing_folds_and_classes_are_told(tmp_path):
    table = small_table()
    no_test = read_urbansound8k(write_tree(tmp_path / "no_test", table, (1, 9)))
    assert no_test.select("test").empty and any("there is no test data" in note for note in no_test.notes)
    only_test = read_urbansound8k(write_tree(tmp_path / "only_test", table, (10,)))
    assert set(only_test.samples.split) == {"test"}
    assert "siren: no training clips, so it can only be evaluated" in only_test.notes
    dogs = write_tree(tmp_path / "dogs", table[table["class"] == "dog_bark"])
    dataset = read_urbansound8k(dogs, "dog_bark")
    assert any("test clips are all normal" in note for note in dataset.notes)
    write_tree(tmp_path / "one", table[table["class"] == "dog_bark"], (1,))
    assert read_urbansound8k(tmp_path / "one").categories == ["dog_bark"]
    with pytest.raises(InputError, match="holds no clip of siren"):
        read_urbansound8k(tmp_path / "one", "siren, dog_bark")


def test_duration_alone_is_told(tree):
    notes = read_urbansound8k(tree, "gun_shot, siren, rare_events").notes
    assert "gun_shot: duration alone has AUROC 1.00 on this test fold" in notes
    assert "siren: duration alone has AUROC 0.56 on this test fold" in notes  # 1 of the 9 other classes is not of 3 s


def test_a_recording_in_the_test_fold_and_another_only_tests(tmp_path):
    table = small_table()
    table.loc[table.fsID == 9000, "fsID"] = 3000  # air conditioners of folds 10 and 4
    dataset = read_urbansound8k(write_tree(tmp_path, table))
    assert "fsID 3000 has clips in the test fold too: 2 clips of fold 4 are left out" in dataset.notes
    assert [len(dataset.select(split, "air_conditioner")) for split in ("test", "train")] == [60, 46]
    assert not dataset.samples.path.str.contains("/3000-").any()


@pytest.mark.parametrize("test_fold", range(1, 11))
def test_each_fold_tests_and_the_one_before_validates(tree, test_fold):
    dataset = read_urbansound8k(tree, "siren", test_fold)
    folds = dataset.samples.path.str.extract(r"fold(\d+)/", expand=False).astype(int)
    before = {1: 10}.get(test_fold, test_fold - 1)
    assert set(folds[dataset.samples.split == "test"]) == {test_fold}
    assert set(folds[dataset.samples.split == "validation"]) == {before}
    assert set(folds[dataset.samples.split == "train"]) == set(range(1, 11)) - {test_fold, before}
    assert_no_leak(dataset.samples)
    assert (dataset.fingerprint() == read_urbansound8k(tree, "siren").fingerprint()) == (test_fold == 10)


def test_a_test_fold_that_is_not_there_is_refused(tmp_path):
    write_tree(tmp_path / "part", small_table(), (1, 2, 10))
    message = "test_fold 3: no clip is there, only folds 1, 2 and 10"
    with pytest.raises(InputError, match=message):
        read_dataset(tmp_path / "part", test_fold=3)
    with pytest.raises(InputError, match=message):
        fit("one-class-svm", tmp_path / "part", tmp_path / "run", overrides={"data": {"test_fold": 3}})
    with pytest.raises(InputError, match="data.test_fold"):
        fit("one-class-svm", tmp_path / "part", tmp_path / "run", overrides={"data": {"test_fold": 11}})
    with pytest.raises(InputError, match="test_fold 3: .* is not read as UrbanSound8K"):
        read_dataset(tmp_path / "part" / "audio", test_fold=3)
    assert not (tmp_path / "run").exists()


def test_a_recording_in_folds_1_and_9_does_not_validate(tmp_path):
    table = small_table()
    table.loc[table.fsID == 8040, "fsID"] = 10  # drilling of fold 9, car horn of fold 1
    dataset = read_urbansound8k(write_tree(tmp_path, table))
    note = "fsID 10 has clips in the training folds too: 2 clips of fold 9 are left out"
    assert any(note in one for one in dataset.notes)
    assert len(dataset.select("validation", "drilling")) == 4 and len(dataset.select("train", "car_horn")) == 48
    assert not dataset.samples.path.str.contains("/8040-").any()


@pytest.mark.parametrize("change, message", [
    (lambda table: table.drop(columns=["fsID", "class"]), "has no column fsID, class"),
    (lambda table: table[:0], "the table has no rows"),
    (lambda table: table.assign(fold=table.fold.replace(10, 11)), "row 542: fold '11'; use a fold from 1 to 10"),
    (lambda table: table.assign(fold="one"), "row 2: fold 'one'"),
    (lambda table: pd.concat([table, table[:1]]), "row 602: the clip 0-0-0-0 is listed twice"),
    (lambda table: table.assign(end=table.start), "row 2: the clip 0-0-0-0 does not end after it starts"),
    (lambda table: table.assign(start="a"), "does not end after it starts"),
    (lambda table: table.assign(fsID=""), "has no recording"),
    (lambda table: table.replace("siren", "sirene"), "unknown class 'sirene'; known: air_conditioner"),
    (lambda table: table.assign(slice_file_name="x" + table.slice_file_name), "holds none of the 600 clips"),
])
def test_a_malformed_table_is_refused_in_one_line(tree, tmp_path, change, message):
    (tmp_path / "audio").symlink_to(tree / "audio")
    write_table(tmp_path, change(small_table()))
    with pytest.raises(InputError, match=message) as caught:
        read_urbansound8k(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content, message", [(None, "no such file"), (b"", "not a CSV table"),
                                              (b"\xff\xfe\x00", "not a CSV"),
                                              (b'a,b\n1,2\n3,4,5,6\n', "not a CSV table")])
def test_an_unreadable_table_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "metadata").mkdir()
    if content is not None:
        (tmp_path / "metadata/UrbanSound8K.csv").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_urbansound8k(tmp_path)
    assert "\n" not in str(caught.value)


# The real data


@pytest.fixture(scope="module")
def real(shared):
    folder = shared / "data" / "urbansound8k"
    if not (folder / "metadata" / "UrbanSound8K.csv").is_file():
        pytest.skip("needs the real UrbanSound8K table")
    return folder


@pytest.fixture(scope="module")
def official(real):
    return pd.read_csv(real / "metadata" / "UrbanSound8K.csv")


def test_folds_of_the_official_table_share_recordings_only_where_we_say(official):
    folds = official.groupby("fsID").fold.unique().map(sorted).map(tuple)
    crossing = folds[folds.map(len) > 1].to_dict()
    assert crossing == {77751: (2, 7), 106905: (1, 8), 132016: (1, 4), 176638: (1, 4), 180937: (1, 9)}
    few = official[official.fold.isin((1, 2, 10))].groupby("fsID").fold.nunique()
    assert few.max() == 1
    assert (official["class"] == official.classID.map(dict(enumerate(CLASSES)))).all()


def test_the_partial_copy_with_folds_1_2_10(real):
    dataset = read_urbansound8k(real)
    if not any("2598 of 8732 clips found, in folds 1, 2 and 10" in note for note in dataset.notes):
        pytest.skip("needs the copy with folds 1, 2 and 10")
    assert_no_leak(dataset.samples)
    count = dataset.samples.groupby(["category", "split"]).size().unstack()
    assert (count.test == 837).all() and (count.train + count.validation).sum() == 1761
    assert (count.validation / (count.train + count.validation)).between(0.07, 0.13).all()
    assert "gun_shot: duration alone has AUROC 0.95 on this test fold" in dataset.notes
    assert dataset.fingerprint() == dataset.fingerprint()


def test_the_whole_official_tree(official, tmp_path):
    write_tree(tmp_path, official)
    began = time.process_time()  # other tests run beside this one
    dataset = read_urbansound8k(tmp_path)
    assert time.process_time() - began < 5  # about 0.6 s; no file is opened
    assert_no_leak(dataset.samples)
    assert_no_leak(read_urbansound8k(tmp_path, "rare_events").samples)
    assert "training: folds 1 to 8; validation: fold 9; test: fold 10" in dataset.notes
    assert any(note.startswith("fsID 180937 has clips in the training folds too: 16 clips") for note in dataset.notes)
    swapped = read_urbansound8k(tmp_path, test_fold=1)  # shares recordings with folds 4, 8 and 9
    shared = "fsID 106905, 132016, 176638, 180937 has clips in the test fold too"
    assert any(note.startswith(shared) for note in swapped.notes)
    assert_no_leak(swapped.samples)
    assert len(dataset.select("train")) == 7079 and len(dataset.select("validation")) == 816 - 16
    for file in (tmp_path / "audio/fold9").iterdir():
        file.unlink()
    assert_no_leak(read_urbansound8k(tmp_path).samples)  # also where one recording has two classes in folds 1 to 8
