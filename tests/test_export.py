"""A detector outside of adiff: as one graph in ONNX and in torch's format, in thirty lines without torch, and on the
hub and back."""
import base64
import hashlib
import json
import os
import runpy
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import skimage
import torch
from PIL import Image

from adiff import AnomalyDetector, InputError
from adiff.data.sounds import LogMel
from adiff.diffusion.identity import IdentityForwardProcess, SinglePassCorrection
from adiff.networks.autoencoders import ConvolutionalAutoencoder
from adiff.networks.ideal import IdealDenoiser
from adiff.scores.fusion import FusionDiscrepancy
from adiff.scores.memories import NearestNeighborDiscrepancy
from adiff.scores.pooled import PooledStatisticsDiscrepancy
from adiff.scores.reconstruction import ReconstructionErrorDiscrepancy
from adiff.codecs.load import load_codec
from adiff.codecs.pixels import PixelCodec
from adiff.codecs.wavelets import WaveletCodec
from adiff.diffusion.deviation_correction import DeviationCorrection
from adiff.diffusion.masked import MaskedForwardProcess
from adiff.scores.deviation import DeviationDiscrepancy
from adiff.lab.export import EXPORT_FORMATS, ExportFormat, check_inputs, export_detector
from adiff.codecs.features import FeatureCodec
from adiff.diffusion.gaussian import GaussianForwardProcess
from adiff.diffusion.partial_noising import PartialNoisingCorrection
from adiff.networks.multiscale_unet import MultiScaleUNet
from adiff.scores.semantic import SemanticDiscrepancy
from adiff.networks.class_token_unet import ClassTokenUNet

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def deco(codec, levels, categories=("normal",), steps=1, **options):
    network = ClassTokenUNet(codec.latent_channels, len(categories), 32, 2, 16, channel_multipliers=(1,))
    return AnomalyDetector(codec, MaskedForwardProcess(), network,
                           DeviationCorrection(10, steps, 4 if steps == 1 else None),
                           DeviationDiscrepancy.pretrained(levels=levels), categories, image_size=64, **options)


def adiff(codec, discrepancy, size, widths=(1, 2), seeds=1, steps=1, **options):
    network = MultiScaleUNet(codec.latent_channels, 8, widths, attention_levels=(len(widths) - 1,), layers_per_block=1,
                             head_channels=8)
    correction = PartialNoisingCorrection(prediction_type="v_prediction", strength=0.3, num_inference_steps=steps,
                                          num_seeds=seeds,
                                          noise="simplex", seed=5)
    return AnomalyDetector(codec, GaussianForwardProcess(prediction_type="v_prediction"), network, correction,
                           discrepancy,
                           image_size=size, **options)


def autoencoder():
    return AnomalyDetector(PixelCodec(0), IdentityForwardProcess(), ConvolutionalAutoencoder(3, 32, 8, 4),
                           SinglePassCorrection(),
                           ReconstructionErrorDiscrepancy(), ("brick", "coffee"), image_size=32, protocol="full_frame")


def pictures(count, size=64):
    "Random smooth pictures (count, 3, size, size) and class labels (count,) of two classes in turn."
    images = torch.nn.functional.interpolate(torch.rand(count, 3, 8, 8) * 2 - 1, size, mode="bilinear")
    return images, torch.arange(count) % 2


def ideal():
    codec = FeatureCodec.pretrained(depths=(4, 10), input_size=64, average=3)
    network, (images, labels) = IdealDenoiser(codec.latent_channels, 2, memory_size=50, shrinkage=0.5), pictures(8)
    network.fit([(codec.encode(images), labels)])
    return AnomalyDetector(codec, MaskedForwardProcess(), network, DeviationCorrection(10, 1, 0), FusionDiscrepancy(2),
                           ("brick", "coffee"), image_size=64)


def fusion():
    detector = deco(WaveletCodec(), ("pixel",))
    discrepancy = FusionDiscrepancy.pretrained(levels=("pixel", "ideal"), ideal_denoiser={"memory_size": 50},
                                               feature_codec={"depths": [4, 10], "input_size": 64})
    images, labels = pictures(8)
    discrepancy.fit_images([(images, 0 * labels)])
    detector.register_modules(discrepancy=discrepancy)
    return detector


DETECTORS = {  # name -> a function that builds a small detector
    "deco": lambda: deco(WaveletCodec(), ("pixel", "latent", "feature"), ("brick", "coffee")),
    "deco, taef2": lambda: deco(load_codec("taef2"), ("pixel", "latent")),
    "adiff": lambda: adiff(WaveletCodec(), SemanticDiscrepancy.pretrained(input_size=64), 64, top_share=0.01),
    "adiff, sounds": lambda: adiff(WaveletCodec(image_channels=1), SemanticDiscrepancy.pretrained(input_size=64), 64,
                                   (1,), protocol=LogMel(size=64, seconds=2.0)),
    "ddpm": lambda: adiff(PixelCodec(0), SemanticDiscrepancy(semantic_weight=0.0, scales=(1,)), 32, (1,), 2, 2,
                          protocol="full_frame"),
    "autoencoder": autoencoder,
    "ideal": ideal,
    "fusion": fusion,
}


def make(name):
    "The detector of that name, with random weights wherever new networks answer zero."
    torch.manual_seed(0)
    detector = DETECTORS[name]()
    for layer in detector.network.modules():
        if isinstance(layer, torch.nn.Conv2d) and not layer.weight.any():
            torch.nn.init.normal_(layer.weight, std=0.05)
    return detector


def close(found, wanted):
    scale = max(1, np.abs(wanted).max())
    return found.shape == wanted.shape and np.abs(found - wanted).max() <= 1e-4 * scale


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A function: the detector of that name, and the folder where it is as `model` and as `line/detector.onnx`; each
    is written once."""
    done = {}

    def write(name):
        if name not in done:
            folder, detector = tmp_path_factory.mktemp("exported"), make(name)
            if name == "deco":
                scores = detector([skimage.data.brick(), skimage.data.coffee()], category=["brick", "coffee"]).scores
                detector.calibrate(np.outer([0.8, 1.0, 1.2], scores).ravel(), ["brick", "coffee"] * 3)
            detector.save_pretrained(folder / "model")
            export_detector(folder / "model", folder / "line/detector.onnx")
            done[name] = detector, folder
        return done[name]

    return write


@pytest.fixture
def exported(export):
    "The folder of DeCo-Diff for two categories, calibrated."
    return export("deco")[1]


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_the_graph_answers_as_the_pipeline(name, export, monkeypatch, request):
    if "taef2" in name:
        monkeypatch.setenv("ADIFF_WEIGHTS", str(request.getfixturevalue("shared") / "weights"))
    detector, folder = export(name)
    run, text = EXPORT_FORMATS["onnx"].read(folder / "line/detector.onnx")
    facts = json.loads((folder / "line/detector.json").read_text())
    assert json.loads(text).items() <= facts.items()
    assert ("class_labels" in facts["inputs"]) == (name in ("deco", "ideal"))  # it has several and looks at them

    inputs, known = check_inputs(detector), detector.config.categories
    given = {"inputs": torch.cat([inputs, 0.5 * inputs[:2]]).numpy(),
             "class_labels": np.arange(len(inputs) + 2) % len(known)}
    wanted = detector(torch.from_numpy(given["inputs"]), category=[known[label] for label in given["class_labels"]])
    assert wanted.maps.std() > 0
    for count in (1, 2, len(inputs) + 2):
        maps, scores = run({one: given[one][:count] for one in facts["inputs"]})
        assert close(maps, wanted.maps[:count]) and close(scores, wanted.scores[:count])


def test_torch_format(tmp_path):
    detector = make("autoencoder")
    facts = export_detector(detector, tmp_path / "detector.pt2", "torch")
    run, text = EXPORT_FORMATS["torch"].read(tmp_path / "detector.pt2")
    wanted = detector(skimage.data.coffee(), category="coffee")
    maps, scores = run({"inputs": detector.preprocess(skimage.data.coffee())[0].numpy()})
    assert close(maps, wanted.maps) and close(scores,
                                              wanted.scores) and json.loads(text)["processor"] == facts["processor"]


EXAMPLE = """import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
print('torch' in sys.modules)
"""


@pytest.mark.parametrize("category", ["brick", "coffee"])
def test_forty_lines_without_torch(exported, repository, tmp_path, category):
    script, picture = repository / "nbs/tutorials/onnx_detect.py", tmp_path / "turned.jpg"
    assert len(script.read_text().splitlines()) <= 40
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray(skimage.data.coffee()).save(picture, exif=exif)
    result = subprocess.run([sys.executable, "-c", EXAMPLE, script, exported / "line/detector.onnx", picture,
                             tmp_path / "found.png",
                             category],
                            capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (word, score, verdict), torch_imported = (line.split() for line in result.stdout.splitlines())
    wanted = AnomalyDetector.from_pretrained(exported / "model")(picture, category=category)
    assert word == "score" and abs(float(score) - wanted.scores[0]) < 1e-4 and torch_imported == ["False"]
    assert verdict == ("anomalous" if wanted.is_anomalous[0] else "normal")
    assert Image.open(tmp_path / "found.png").size == (256, 256)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK", "I;16", "F"])
def test_the_example_prepares_every_picture_as_detect_does(exported, repository, tmp_path, monkeypatch, capsys, mode):
    colour = Image.fromarray(skimage.data.coffee()).resize((150, 110))
    grey = np.asarray(colour.convert("L"), np.uint16)
    if mode[-1] == "A":
        colour.putalpha(Image.fromarray(np.uint8(255 - grey // 2)))
    made = {"I;16": grey * 257, "F": grey.astype(np.float32) / 255}
    image = Image.fromarray(made[mode]) if mode in made else colour.convert(mode)
    image.save(picture := tmp_path / ("a.jpg" if mode == "CMYK" else "a.tif" if mode == "F" else "a.png"))
    monkeypatch.setattr(sys, "argv", ["", str(exported / "line/detector.onnx"), str(picture), str(tmp_path / "found.png"),
                                      "coffee"])
    runpy.run_path(str(repository / "nbs/tutorials/onnx_detect.py"))
    wanted = AnomalyDetector.from_pretrained(exported / "model")(picture, category="coffee").scores[0]
    assert float(capsys.readouterr().out.split()[1]) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("made", [np.full((64, 64), 3000, np.uint16), np.full((64, 64), np.nan, np.float32)])
def test_the_example_refuses_the_values_that_detect_refuses(exported, repository, tmp_path, monkeypatch, made):
    Image.fromarray(made).save(picture := tmp_path / "a.tif")
    with pytest.raises(InputError):
        AnomalyDetector.from_pretrained(exported / "model")(picture, category="coffee")
    monkeypatch.setattr(sys, "argv", ["", str(exported / "line/detector.onnx"), str(picture), str(tmp_path / "found.png"),
                                      "coffee"])
    with pytest.raises(SystemExit, match="its values are of another kind"):
        runpy.run_path(str(repository / "nbs/tutorials/onnx_detect.py"))


def test_the_example_hears_nothing(export, repository, tmp_path, monkeypatch):
    graph = str(export("adiff, sounds")[1] / "line/detector.onnx")
    monkeypatch.setattr(sys, "argv", ["", graph, str(tmp_path / "a.wav"), str(tmp_path / "found.png")])
    with pytest.raises(SystemExit, match="hears sounds.*use adiff detect"):
        runpy.run_path(str(repository / "nbs/tutorials/onnx_detect.py"))


def test_facts_are_all_that_a_line_must_know(exported):
    facts = json.loads((exported / "line/detector.json").read_text())
    assert facts["categories"] == ["brick", "coffee"] and facts["map_limit"] == 1
    assert facts["calibration"]["coffee"]["threshold"] > 0
    assert (facts["processor"]["resize"], facts["processor"]["crop"], facts["processor"]["size"]) == (288, 256, 256)
    assert max(facts["check"].values()) <= 1e-4 and facts["versions"]["adiff"]
    file = (exported / "line/detector.onnx").read_bytes()
    assert str(exported).encode() not in file and b".py" not in file  # nothing about the machine that wrote it
    assert {path.name for path in (exported / "line").iterdir()} == {"detector.onnx", "detector.json"}


def test_large_weights_lie_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    facts = export_detector(make("autoencoder"), tmp_path / "large.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"large.onnx", "large.onnx.data", "large.json"}
    run, _ = EXPORT_FORMATS["onnx"].read(tmp_path / "large.onnx")
    assert run({"inputs": np.zeros((1, *facts["inputs"]["inputs"][1:]), np.float32)})[0].shape == (1, 256, 256)


def test_a_graph_that_answers_otherwise_is_not_written(tmp_path, monkeypatch):
    def read(path):
        run, text = EXPORT_FORMATS["torch"].read(path)
        return lambda given: [run(given)[0] + (1 if len(given["inputs"]) == 1 else 0), run(given)[1]], text

    monkeypatch.setitem(EXPORT_FORMATS, "altered", ExportFormat(".pt2", EXPORT_FORMATS["torch"].write, read))
    (tmp_path / "detector.pt2").write_text("the one before")
    with pytest.raises(InputError, match=r"detector.pt2: not written, its answers differ from the pipeline's by 1"):
        export_detector(make("autoencoder"), tmp_path / "detector.pt2", "altered")
    assert (tmp_path / "detector.pt2").read_text() == "the one before" and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_a_graph_is_refused(tmp_path):
    codec = FeatureCodec.pretrained(depths=(4, 10))
    knn = AnomalyDetector(codec, None, None, None, NearestNeighborDiscrepancy(codec.latent_channels, 20), image_size=64)
    knn.discrepancy.fit([torch.randn(2, codec.latent_channels, 8, 8)])
    svm = AnomalyDetector(PixelCodec(0, 1), None, None, None, PooledStatisticsDiscrepancy(channels=1, height=64),
                          image_size=64, protocol=LogMel(size=64, seconds=2.0))
    svm.discrepancy.fit([torch.randn(9, 1, 64, 64)])
    for detector in (knn, svm):
        with pytest.raises(InputError,
                           match=f"{type(detector.discrepancy).__name__} cannot be written as a graph") as refusal:
            export_detector(detector, tmp_path / "detector.onnx")
        assert "\n" not in str(refusal.value) and not list(tmp_path.iterdir())


def test_without_the_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"the package onnxscript is not installed; pip install 'adiff\[export\]'"):
        export_detector(make("autoencoder"), tmp_path / "detector.onnx")


class StandIn(BaseHTTPRequestHandler):
    """The part of the hub that huggingface_hub speaks to when it creates, writes and reads a repository of a model;
    all files are small."""

    protocol_version = "HTTP/1.1"
    repositories = {}  # name -> path -> bytes

    def log_message(self, *arguments):
        pass

    def answer(self, value=None, status=200, body=None, **headers):
        body = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for key, content in {"Content-Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), content)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def find(self, name):
        "The files of a repository and its commit; answers that there is none otherwise."
        files = self.repositories.get(name)
        if files is None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound",
                        X_Error_Message="Repository not found")
        return files, hashlib.sha1(repr(sorted((files or {}).items())).encode()).hexdigest()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = self.path.partition("?")[0].strip("/").split("/")
        if self.headers.get("Authorization") != "Bearer ours":
            self.answer({"error": "Invalid username or password."}, 401)
        elif address == ["api", "validate-yaml"]:
            self.answer({"errors": [], "warnings": []})
        elif address == ["api", "repos", "create"]:
            wanted = json.loads(body)
            name, exists = f"{wanted['organization']}/{wanted['name']}", 409
            if name not in self.repositories:
                self.repositories[name], exists = {}, 200
            self.answer({"url": f"http://{self.headers['Host']}/{name}", "name": name}, exists)
        elif address[4] == "preupload":
            self.answer({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                   for file in json.loads(body)["files"]]})
        elif address[4] == "commit":
            name = "/".join(address[2:4])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = self.find(name)[1]
            self.answer({"success": True, "commitOid": commit,
                         "commitUrl": f"http://{self.headers['Host']}/{name}/commit/{commit}"})

    def do_GET(self):
        address = self.path.partition("?")[0].strip("/").split("/")
        name = "/".join(address[2:4] if address[0] == "api" else address[:2])
        files, commit = self.find(name)
        if files is None:
            return
        if address[0] == "api" and "tree" in address:
            self.answer([{"type": "file", "path": path, "size": len(content),
                          "oid": hashlib.sha1(content).hexdigest()} for path,
                         content in files.items()])
        elif address[0] == "api":
            self.answer({"id": name, "modelId": name, "sha": commit,
                         "siblings": [{"rfilename": path} for path in files], "tags": []})
        elif (path := "/".join(address[4:])) in files:
            self.answer(body=files[path], ETag=f'"{hashlib.sha1(files[path]).hexdigest()}"', X_Repo_Commit=commit)
        else:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound",
                        X_Error_Message="Entry not found",
                        X_Repo_Commit=commit)

    do_HEAD = do_GET


PUSH_AND_PULL = """
import sys
import skimage
import numpy as np
from adiff import AnomalyDetector, InputError

before = AnomalyDetector.from_pretrained(sys.argv[1])
before.push_to_hub("somebody/brick-and-coffee")
after = AnomalyDetector.from_pretrained("somebody/brick-and-coffee")
one, other = (detector(skimage.data.coffee(), category="coffee") for detector in (before, after))
print(np.array_equal(one.maps, other.maps), np.array_equal(one.normalized_scores, other.normalized_scores))
before.push_to_hub("somebody/brick-and-coffee", run="elsewhere")  # the card is there already
for act in (lambda: before.push_to_hub("no/such/name"), lambda: before.push_to_hub("somebody/else", token="wrong"),
            lambda: AnomalyDetector.from_pretrained("nobody/nothing")):
    try: act()
    except InputError as error: print(error)
"""


def test_to_the_hub_and_back(exported, tmp_path):
    for name, content in (("config.json",
                           {"method": "deco", "preset": "cpu", "seed": 0,
                            "dataset": {"name": "photographs", "fingerprint": "0123"}}),
                          ("metrics.json", {"categories": {"brick": {"image_auroc": 0.875, "aupro": None, "n_test": 4}},
                                            "mean": {"image_auroc": 0.875, "aupro": None, "n_test": 4},
                                            "notes": ["a note"]})):
        (exported / name).write_text(json.dumps(content))
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"),
                        "HF_TOKEN": "ours"}
        result = subprocess.run([sys.executable, "-c", PUSH_AND_PULL, exported / "model"], env=environment,
                                capture_output=True, text=True)
    finally:
        server.shutdown()
        server.server_close()
    assert result.returncode == 0, result.stderr
    equal, bad_name, refused, absent = result.stdout.splitlines()
    assert equal == "True True"
    assert "no/such/name: cannot be uploaded" in bad_name
    assert "somebody/else: cannot be uploaded" in refused and "hf auth login" in refused
    assert absent.startswith("nobody/nothing: neither a folder nor a model on the hub")
    files = StandIn.repositories["somebody/brick-and-coffee"]
    assert {"model_index.json", "README.md", "network/diffusion_pytorch_model.safetensors"} <= set(files)
    card = files["README.md"].decode()  # of the first time: one that is there already stays
    for words in ("library_name: adiff", "method deco", "data photographs", "brick, coffee",
                  "| image_auroc |\n|---|---|\n| brick | 87.5 |",
                  "- a note",
                  "licence of the training data is not known", "protocol official"):
        assert words in card, card
