"""ESC-50, DCASE task 2 and MIMII: stand-ins built from the demo machine, read, trained on and measured."""
import shutil

import pandas as pd
import pytest

from adiff import evaluate, fit, read_dataset
from adiff.core import InputError
from adiff.data.demo_sounds import make_demo_sounds


@pytest.fixture(scope="module")
def pump(tmp_path_factory):
    return make_demo_sounds(tmp_path_factory.mktemp("pump") / "demo", train=24, good=12, per_fault=2) / "pump"


def copy(files, names):
    "Copies the files to the paths `names`, one each."
    for file, name in zip(files, names, strict=True):
        name.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, name)


@pytest.fixture(scope="module")
def dcase(pump, tmp_path_factory):
    "A machine folder with the challenge's names: two sections, source and target."
    machine = tmp_path_factory.mktemp("dcase") / "pump"
    train, good = sorted((pump / "train/good").iterdir()), sorted((pump / "test/good").iterdir())
    faults = sorted(file for file in (pump / "test").rglob("*.wav") if file.parent.name != "good")
    places = [(section, domain) for section in ("00", "01") for domain in ("source", "target")]
    for part, label, files in (("train", "normal", train), ("test", "normal", good), ("test", "anomaly", faults)):
        names = [machine / part / f"section_{section}_{domain}_{part}_{label}_{number // 4:04}_vel_6.wav"
                 for number in range(len(files)) for section, domain in [places[number % 4]]]
        copy(files, names)
    return machine


def test_dcase_from_files_to_the_harmonic_mean(dcase, tmp_path):
    fit("one-class-svm", dcase, tmp_path / "run", device="cpu")  # one detector for the machine
    metrics = evaluate(tmp_path / "run")
    names = [f"section_0{section}_{domain}" for section in (0, 1) for domain in ("source", "target")]
    assert list(metrics["categories"]) == names
    scores = pd.read_csv(tmp_path / "run/scores.csv")
    for name, result in metrics["categories"].items():
        assert result["n_train"] == 5 and result["n_test"] == 3 + 6  # a sixth is held out; anomalies of both domains
        assert 0.5 < result["image_auroc"] <= 1 and result["image_pauc"] is not None
        assert scores[(scores.category == name) & (scores.label == 1)].path.str.contains(name[:10]).all()
    for metric in ("image_auroc", "image_pauc"):
        values = [result[metric] for result in metrics["categories"].values()]
        assert metrics["harmonic_mean"][metric] == pytest.approx(len(values) / sum(1 / value for value in values))
    assert any("DCASE" in note and "both domains" in note for note in metrics["notes"])


def test_dcase_several_machines_and_misplaced_clips(dcase, tmp_path):
    shutil.copytree(dcase, tmp_path / "pump")
    shutil.copytree(dcase, tmp_path / "fan")
    assert read_dataset(tmp_path).categories[:2] == ["fan_section_00_source", "fan_section_00_target"]
    assert read_dataset(tmp_path, "pump_section_01_target").samples.path.str.startswith("pump/").all()
    anomaly = next((tmp_path / "fan/test").glob("*anomaly*"))
    anomaly.rename(tmp_path / "fan/train" / anomaly.name)
    with pytest.raises(InputError, match="lies in train/"):
        read_dataset(tmp_path)
    anomaly = tmp_path / "fan/train" / anomaly.name
    anomaly.rename(anomaly.with_name(anomaly.name.replace("_test_", "_train_")))
    with pytest.raises(InputError, match="called train anomaly"):
        read_dataset(tmp_path)


def test_dcase_of_2020(pump, tmp_path):
    "Names without section and domain."
    train, good = sorted((pump / "train/good").iterdir()), sorted((pump / "test/good").iterdir())
    faults = sorted(file for file in (pump / "test").rglob("*.wav") if file.parent.name != "good")
    copy(train, [tmp_path / f"data/pump/train/normal_id_0{2 * (n % 2)}_{n:08}.wav" for n in range(len(train))])
    copy(good, [tmp_path / f"data/pump/test/normal_id_0{2 * (n % 2)}_{n + 99:08}.wav" for n in range(len(good))])
    copy(faults, [tmp_path / f"data/pump/test/anomaly_id_0{2 * (n % 2)}_{n:08}.wav" for n in range(len(faults))])
    dataset = read_dataset(tmp_path / "data")
    assert dataset.categories == ["pump_id_00", "pump_id_02"] and dataset.left_out == []
    counts = dataset.samples.groupby(["category", "label"]).size()
    assert counts.tolist() == [18, 6, 18, 6] and set(dataset.select("test").label) == {0, 1}
    fit("one-class-svm", tmp_path / "data/pump", tmp_path / "run", device="cpu")
    assert evaluate(tmp_path / "run")["categories"]["id_02"]["image_auroc"] > 0.5
    file = next((tmp_path / "data/pump/test").glob("anomaly*"))
    file.rename(tmp_path / "data/pump/train" / file.name)
    with pytest.raises(InputError, match="lies in train/"):
        read_dataset(tmp_path / "data")


def test_mimii_from_files_to_metrics(pump, tmp_path):
    normal = sorted((pump / "train/good").iterdir()) + sorted((pump / "test/good").iterdir())
    faults = sorted(file for file in (pump / "test").rglob("*.wav") if file.parent.name != "good")
    copy(normal, [tmp_path / "data/id_00/normal" / f"{number:08}.wav" for number in range(len(normal))])
    copy(faults, [tmp_path / "data/id_00/abnormal" / f"{number:08}.wav" for number in range(len(faults))])
    fit("one-class-svm", tmp_path / "data", tmp_path / "run", device="cpu")
    result = evaluate(tmp_path / "run")["categories"]["id_00"]
    assert (result["n_test"], result["n_train"]) == (24, 22) and result["image_auroc"] > 0.5


def test_esc50_from_files_to_metrics(pump, tmp_path):
    "The pump's faults as sounds of other classes."
    sounds = [("pump", file) for file in sorted((pump / "train/good").iterdir())]
    sounds += [(file.parent.name, file) for file in sorted((pump / "test").rglob("*.wav")) if file.parent.name != "good"]
    rows = []
    for number, (sound, file) in enumerate(sounds):
        name = f"{number % 5 + 1}-{number}-A-{len(sound)}.wav"
        rows.append((name, number % 5 + 1, sound, sound in ("pump", "rattle", "squeal")))
        copy([file], [tmp_path / "esc/audio" / name])
    (tmp_path / "esc/meta").mkdir()
    table = pd.DataFrame(rows, columns=["filename", "fold", "category", "esc10"])
    table.to_csv(tmp_path / "esc/meta/esc50.csv", index=False)
    fit("one-class-svm", tmp_path / "esc", tmp_path / "run", categories="pump", device="cpu")
    assert evaluate(tmp_path / "run")["categories"]["pump"]["n_train"] == 15
    with pytest.raises(InputError, match="needs its own"):
        fit("one-class-svm", tmp_path / "esc", tmp_path / "both", categories="esc10", device="cpu")
    dataset = read_dataset(tmp_path / "esc", "esc10_pump")
    assert set(dataset.select("test").defect) <= {"good", "rattle", "squeal"}
    table.assign(fold=table.fold % 5 + 1).to_csv(tmp_path / "esc/meta/esc50.csv", index=False)
    with pytest.raises(InputError, match="row 2: fold 2, but the file is called 1-0-A"):
        read_dataset(tmp_path / "esc")
