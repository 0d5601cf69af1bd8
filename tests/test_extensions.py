"""Packages from outside: a method, a forward process, a codec, a correction and a dataset, as CONTRIBUTING.md has them,
used by real commands."""
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from adiff.data.demo_images import make_demo_data

pytestmark = pytest.mark.slow

TINY = ["codec.kind=opponent", "correction.kind=selective", "data.image_size=32", "training.length=4",
        "training.batch_size=4",
        "training.augmentations=[]"]


def install(site, package, modules, entry_points):
    "What `pip install` leaves: modules, and a folder of metadata beside them."
    for name, text in modules.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    metadata = site / f"{package.replace('-', '_')}-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text("".join(
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items()) for group,
        points in entry_points.items()))


def examples(repository):
    "The packages in CONTRIBUTING.md: (file name, its text, the parsed pyproject.toml)."
    blocks = re.findall(r"^```(python|toml)\n# (\S+)\n(.*?)^```",
                        (repository / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M | re.S)
    assert [kind for kind, *_ in blocks] == ["python", "toml"] * 4
    assert {name for kind, name, _ in blocks if kind == "toml"} == {"pyproject.toml"}
    return [(name, text, tomllib.loads(settings))
            for (_, name, text), (_, _, settings) in zip(blocks[::2], blocks[1::2])]


@pytest.fixture(scope="session")
def site(repository, tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    for name, text, settings in examples(repository):
        project = settings["project"]
        assert settings["tool"]["setuptools"]["py-modules"] == [Path(name).stem]
        assert project["dependencies"] == ["adiff"]
        install(site, project["name"], {name: text}, project["entry-points"])
    return site


@pytest.fixture(scope="session")
def child(repository, site):
    "Runs a command, adiff's or python's, in a process that sees the packages (and others in the folders `more`)."
    def run(program, *arguments, more=(), **options):
        paths = os.pathsep.join(map(str, [*more, site, repository]))
        return subprocess.run([Path(sys.executable).with_name(program), *map(str, arguments)], capture_output=True,
                              text=True,
                              env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, **options)
    return run


def succeeded(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="session")
def line(tmp_path_factory):
    "The demo data as an inspection line: one folder of pictures and a table."
    demo, line = make_demo_data(tmp_path_factory.mktemp("demo") / "demo", train=8, good=2,
                                per_defect=1), tmp_path_factory.mktemp("line")
    rows = []
    for path in sorted(demo.glob("*/*/*/*.png")):
        part, use, verdict = path.relative_to(demo).parts[:3]
        if use in ("train", "test"):
            picture = f"{part}_{use}_{verdict}_{path.name}"
            path.rename(line / picture)
            rows.append((picture, part, "ok" if verdict == "good" else verdict, use))
    pd.DataFrame(rows, columns=["picture", "part", "verdict", "use"]).to_csv(line / "inspection.csv", index=False)
    return line


@pytest.fixture(scope="session")
def run(child, line, tmp_path_factory):
    "A run folder, made, evaluated and used for detection by commands that know all of them by name."
    run = tmp_path_factory.mktemp("runs") / "run"
    options = [word for assignment in TINY for word in ("-o", assignment)]
    succeeded(child("adiff", "fit", "deco-mirrored", line, "--out", run, "--categories", "brick", "--device", "cpu",
                    *options))
    succeeded(child("adiff", "evaluate", run, "--device", "cpu"))
    pictures = sorted(line.glob("brick_test_hole*"))
    succeeded(child("adiff", "detect", run / "model", *pictures, "--out", run / "detections", "--device", "cpu"))
    return run


def index(run):
    return json.loads((run / "model/model_index.json").read_text())


def test_method(run):
    assert json.loads((run / "metrics.json").read_text())["method"] == "deco-mirrored"
    assert index(run)["forward_process"] == ["mirrored", "MirroredPatches"]


def test_correction(run):
    assert index(run)["correction"] == ["selective", "SelectiveCorrection"]
    settings = json.loads((run / "model/correction/scheduler_config.json").read_text())
    assert settings["share"] == 0.25 and settings["num_inference_steps"] == 1  # its own default, and the preset's


def test_codec(run):
    assert index(run)["codec"] == ["opponent", "OpponentCodec"]
    record = json.loads((run / "config.json").read_text())
    assert record["parameters"]["codec"]["kind"] == "opponent" and record["versions"]["adiff-opponent"] == "0.1"
    assert json.loads((run / "model/codec/config.json").read_text())["levels"] == 2


def test_dataset(run, line):
    metrics = json.loads((run / "metrics.json").read_text())
    table = pd.read_csv(line / "inspection.csv")
    tested = table[(table.part == "brick") & (table.use == "test")]
    assert list(metrics["categories"]) == ["brick"] and metrics["categories"]["brick"]["n_test"] == len(tested)
    assert {"layout read by the installed reader inspection", "verdicts of one inspector"} <= set(metrics["notes"])
    for words in ("held-out normals", "have no mask"):
        assert any(words in note for note in metrics["notes"])
    assert sorted(pd.read_csv(run / "scores.csv").path) == sorted(tested.picture)


def test_detection(run):
    scores = pd.read_csv(run / "detections/scores.csv")
    assert len(scores) and scores.error.isna().all() and np.isfinite(scores.score).all()


PYTHON = """
import json, sys
from adiff import AnomalyDetector, InputError, load_codec, read_dataset
run, line, stranger = sys.argv[1:]
torch = sys.modules.get("torch")

dataset = read_dataset(line, "cup, brick")
assert dataset.categories == ["brick", "cup"] and read_dataset(line, ["cup"]).categories == ["cup"]
detector = AnomalyDetector.from_pretrained(run + "/model")
assert type(detector.codec) is type(load_codec("opponent"))
assert type(detector.forward_process).__name__ == "MirroredPatches"

import torch
images = torch.rand(2, 3, 32, 32) * 2 - 1
codec = load_codec("opponent")
assert codec.latent_shape(32, 32) == (48, 8, 8) == codec.encode(images).shape[1:]
assert torch.allclose(codec(images), images, atol=1e-5) and torch.allclose(codec.encode(images).norm(), images.norm())

said = {}
for name, act in {"codec": lambda: load_codec("oponent"), "category": lambda: read_dataset(line, "bottle"),
                  "model": lambda: AnomalyDetector.from_pretrained(stranger)}.items():
    try: act()
    except InputError as error: said[name] = str(error)
print(json.dumps({"said": said, "hidden": "mirrored_secret" in sys.modules}))
"""


def test_from_python_in_a_fresh_process(child, site, run, line, tmp_path):
    "Names and parts are found; a model folder still cannot name a module that nobody offered."
    install(tmp_path, "mirrored-more", {"mirrored_secret.py": "raise SystemExit('imported')"}, {"adiff.codecs": {}})
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "model_index.json").write_text(json.dumps({**index(run),
                                                           "forward_process": ["mirrored_secret", "MirroredPatches"]}))
    printed = json.loads(succeeded(child("python", "-c", PYTHON, run / "model" / "..", line, stranger,
                                         more=[tmp_path])).stdout)
    assert "opponent" in printed["said"]["codec"].partition("known:")[2] and "wavelet" in printed["said"]["codec"]
    assert "brick, cup" in printed["said"]["category"]
    assert "'mirrored_secret', which is not imported" in printed["said"]["model"] and not printed["hidden"]


def one_line(result):
    lines = [line for line in result.stderr.splitlines() if line.startswith("adiff: ")]
    assert result.returncode == 2 and len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]


def test_bad_packages_are_named_in_one_line(child, line, tmp_path):
    rude = tmp_path / "rude"
    install(rude, "rude", {"rude.py": "raise OSError('no\\nluck')", "plain.py": "made = {}"},
            {"adiff.methods": {"deco": "plain:made", "rude": "rude:made", "plain": "plain:made", "gone": "plain:gone"},
             "adiff.codecs": {"opponent": "plain:made"}})
    fit = ("adiff", "fit")
    message = one_line(child(*fit, "decoo", line, "--out", tmp_path / "x", more=[rude]))
    assert re.search(r"unknown method 'decoo'; known: .*\bdeco, .*deco-mirrored.*rude", message)

    start = time.perf_counter()
    helped = succeeded(child("adiff", "fit", "--help", more=[rude]))
    assert not helped.stderr and time.perf_counter() - start < 5  # nothing is looked through, nothing imported

    code = """
from adiff import InputError, fit, load_codec
from adiff.methods.deco_diff import DECO_DIFF_PRESETS
from adiff.methods.registry import METHODS
assert METHODS["deco"].presets is DECO_DIFF_PRESETS
for act in [lambda: METHODS["rude"], lambda: METHODS["plain"], lambda: METHODS["gone"], lambda: load_codec("opponent")]:
    try: act()
    except InputError as error: print(error)
"""
    told = succeeded(child("python", "-c", code, more=[rude]))
    wanted = "method 'deco' of the installed package rude is not used: adiff ships one of that name"
    assert told.stderr.strip() == wanted
    broken, wrong, absent, twice = told.stdout.splitlines()
    assert "installed package rude" in broken and "OSError: no luck" in broken and "uninstall" in broken
    assert "installed package rude" in wrong and "plain:made is no Method" in wrong
    assert "installed package rude" in absent and "AttributeError" in absent
    assert "adiff-opponent" in twice and "rude" in twice


def test_a_matrix_notices_the_code_of_what_it_uses(repository, child, site, line, tmp_path):
    groups = {name: {"notebook": str(repository / "nbs/experiments/method.ipynb"), "parameters": {
                  "method": method, "data_root": str(line), "categories": "brick",
                  "overrides": {"training": {"length": 1}}}}
              for name, method in (("theirs", "deco-mirrored"), ("ours", "deco"))}
    (tmp_path / "own.yaml").write_text(json.dumps({"groups": groups}))  # JSON is YAML
    (tmp_path / "mirrored.py").write_text((site / "mirrored.py").read_text())  # found before the other
    code = """
import json, sys
from adiff.lab.matrix import plan
matrix, module = sys.argv[1:]
before = {run.group: run.identity for run in plan(matrix)}
with open(module, "a") as file: file.write("CHANGED = True")
print(json.dumps([before, {run.group: run.identity for run in plan(matrix)}]))
"""
    printed = succeeded(child("python", "-c", code, tmp_path / "own.yaml", tmp_path / "mirrored.py",
                              more=[tmp_path])).stdout
    before, after = json.loads(printed)
    assert before["theirs"] != after["theirs"] and before["ours"] == after["ours"]
