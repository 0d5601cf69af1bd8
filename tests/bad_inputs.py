"""The corpus of bad and odd inputs: how each is made, how it is used, and what must come of it. As a table:
nbs/bad_inputs.md.

`python tests/bad_inputs.py` writes that page anew.
"""
import gzip
import io
import json
import lzma
import os
import pickle
import re
import shutil
import stat
import struct
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from adiff import AnomalyDetector, detect, evaluate, fit, load_codec
from adiff.core import write_json
from adiff.data.images import FULL_FRAME, read_image
from adiff.data.sounds import LogMel
from adiff.lab import matrix, tables
from adiff.methods.configuration import parse_assignments, parse_overrides
from adiff.methods.official import convert_official_checkpoint
from adiff.runs.fit import describe_run

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "data_scripts"))

import common  # noqa: E402  the data scripts are not part of the package

TINY = {"codec": {"levels": 2}, "data": {"image_size": 32}, "discrepancy": {"kind": "deviation"},
        "training": {"length": 1, "batch_size": 4, "augmentations": []}}
TINY_SOUNDS = {"codec": {"kind": "pixels", "levels": 3}, "data": {"mel_bands": 32, "image_size": 32},
               "training": {"length": 1, "batch_size": 4, "augmentations": []}}


@dataclass(frozen=True)
class Kit:
    "Good things that the bad ones stand beside: datasets, and finished runs on them."
    images: Path
    sounds: Path
    run: Path
    sound_run: Path


@dataclass(frozen=True)
class Use:
    """One way in which an input is used, three times over: the arguments of `adiff` (or of the data script, where
    `script`), what is called in python, and (notebook, parameters), or None where no notebook takes such a thing."""
    command: list | None
    call: Callable
    notebook: tuple | None = None
    script: bool = False


@dataclass(frozen=True)
class Entry:
    """`use` makes the input in an empty folder. `words`: what the line of a refusal holds. `check`: what must be true
    of the result of a call."""
    name: str
    use: Callable[[Kit, Path], Use]
    why: str
    words: tuple | None = None
    check: Callable = bool

    @property
    def outcome(self):
        return "handled" if self.words is None else "refused"


def refused(name, use, why, *words):
    return Entry(name, use, why, words)


def handled(name, use, why, check=bool):
    return Entry(name, use, why, None, check)


# ---- how things are used

def overrides_of(**sections):
    "The overrides of a short training as JSON, with other `sections`."
    return json.dumps({**TINY, **sections})


def typed(overrides):
    "Nested `overrides`, a dict, as options of a command: -o SECTION.SETTING=VALUE."
    settings = {}
    for section, values in overrides.items():
        one = {f"{section}.{name}": value for name, value in values.items()} if isinstance(values,
                                                                                           dict) else {section: values}
        settings.update(one)
    return [word for path, value in settings.items() for word in ("-o", f"{path}={json.dumps(value)}")]


def fit_use(root, out, overrides=None, options=(), categories="all", seed=0, device="cpu", **more):
    "Training: every word of it can be the bad one. `overrides` is JSON, or a list of options of the command."
    overrides = overrides_of() if overrides is None else overrides
    command = ["fit", "deco", root, "--out", out, "--categories", categories, "--seed", seed, "--device", device,
               *options]
    if isinstance(overrides, list):
        return Use([*command, *(word for one in overrides for word in ("-o", one))],
                   lambda: fit("deco", root, out, device=device, overrides=parse_assignments(overrides)))
    command += typed(json.loads(overrides)) if overrides.strip().startswith("{") and is_json(overrides) else []
    notebook = ("deco_image",
                dict(data_root=str(root), out_dir=str(out), categories=categories, seed=seed, device=device,
                     overrides=overrides))
    return Use(command, lambda: fit("deco", root, out, categories=categories, seed=seed, device=device,
                                    overrides=parse_overrides(overrides), **more), None if options else notebook)


def is_json(text):
    try:
        return bool(json.loads(text)) or True
    except (ValueError, RecursionError):
        return False


def earlier_detections(out):
    "What an earlier, good detection left in `out`."
    (out / "overlays").mkdir(parents=True, exist_ok=True)
    (out / "scores.csv").write_text("path,score,normalized_score\nearlier.png,0.5,1.0\n")
    (out / "overlays/earlier.png_overlay.png").write_bytes(png())
    return out


def place(folder, name, content):
    "Makes `folder`/`name` of bytes, or by a function that is told the path; returns the path."
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    return path


def image(content, name="x.png"):
    "A picture: detected in, read, and one of the training pictures of a notebook."
    def use(kit, folder):
        photos = folder / "photos"
        for number in range(3):
            place(photos, f"good{number}.png", png(seed=number))
        path = place(photos, name, content)
        out = earlier_detections(folder / "out")
        return Use(["detect", kit.run / "model", folder / "alone" if path.is_dir() else path, "--out", out, "--device",
                    "cpu"],
                   lambda: (FULL_FRAME.load(path), read_image(path))[1],
                   ("deco_image",
                    dict(data_root=str(photos), out_dir=str(folder / "run"), device="cpu", overrides=overrides_of())))
    return use


def sound(content, name="x.wav"):
    "The same with a sound."
    def use(kit, folder):
        sounds = folder / "sounds"
        for number in range(3):
            place(sounds, f"good{number}.wav", wav(seed=number))
        path = place(sounds, name, content)
        out = earlier_detections(folder / "out")
        return Use(["detect", kit.sound_run / "model", path, "--out", out, "--device", "cpu"], lambda: read_all(path),
                   ("adiff_audio",
                    dict(data_root=str(sounds), out_dir=str(folder / "run"), device="cpu",
                         overrides=json.dumps(TINY_SOUNDS))))
    return use


def read_all(path):
    "Every window of a sound, stacked."
    processor = LogMel(size=32, n_fft=2048)
    return torch.stack([processor.load(path, window) for window in processor.windows(path)])


def finished_run(kit, root, run, **about):
    "A run folder as training on `root` leaves it, with the model of `kit.run`, which is of the same category."
    shutil.copytree(kit.run / "model", run / "model")
    record, _, _ = describe_run("deco", root, "cpu", "all", 0, TINY, None)
    write_json(run / "config.json", {**record, **about})
    shutil.copy(kit.run / "log.jsonl", run)
    return run


def only_detected(use):
    "The same without the notebook: a training takes black and white from its own pictures of many bits."
    return lambda kit, folder: replace(use(kit, folder), notebook=None)


def unspeakable(use):
    "What no command line can hold."
    return lambda kit, folder: replace(use(kit, folder), command=None)


def detect_use(*options, model=None, source=None, **more):
    "Detection with good and bad parameters."
    def use(kit, folder):
        photo = source(kit, folder) if source else place(folder, "photo.png", png())
        chosen = model(kit, folder) if model else kit.run / "model"
        out = more.get("out_dir", lambda folder: earlier_detections(folder / "out"))(folder)
        options_of_call = {name: value for name, value in more.items() if name != "out_dir"}
        return Use(["detect", chosen, photo, "--out", out, "--device", "cpu", *options],
                   lambda: detect(chosen, [photo], out, device="cpu", **options_of_call))
    return use


def mask(change):
    """Masks of a dataset that a finished run is evaluated on: `change` is told the folder of the masks of the defect
    `hole`."""
    def use(kit, folder):
        root = folder / "data"
        shutil.copytree(kit.images, root)
        change(root / "brick/ground_truth/hole")
        run = finished_run(kit, root, folder / "run")
        return Use(["evaluate", run, "--device", "cpu"], lambda: evaluate(run, device="cpu"),
                   ("deco_image",
                    dict(data_root=str(root), out_dir=str(run), device="cpu", overrides=overrides_of(), resume=True)))
    return use


def table(content):
    "A split table, where VisA has it, so that the notebooks find it by the root alone."
    def use(kit, folder):
        root = folder / "data"
        for number in range(5):
            place(root, f"pictures/{number}.png", png(seed=number))
        place(root, "outside.png", png())
        place(root, "split_csv/1cls.csv", content)
        return fit_use(root, folder / "run")
    return use


def urban(content):
    "The table of UrbanSound8K, beside a clip in fold 1 and one in fold 10."
    def use(kit, folder):
        for number, fold in enumerate((1, 10)):
            place(folder, f"data/audio/fold{fold}/{number}.wav", wav(seed=number))
        place(folder, "data/metadata/UrbanSound8K.csv", content)
        root, out, overrides = folder / "data", folder / "run", json.dumps(TINY_SOUNDS)
        return Use(["fit", "adiff", root, "--out", out, "--device", "cpu", *typed(TINY_SOUNDS)],
                   lambda: fit("adiff", root, out, device="cpu", overrides=TINY_SOUNDS),
                   ("adiff_audio", dict(data_root=str(root), out_dir=str(out), device="cpu", overrides=overrides)))
    return use


def yaml(text, notebook=True):
    "A matrix file, planned. Its groups find the notebook nb.ipynb with the parameters seed and options."
    def use(kit, folder):
        path = place(folder, "m.yaml", text if isinstance(text, bytes) else text.encode())
        cell = {"cell_type": "code", "source": "seed: int = 0\noptions = {}", "metadata": {"tags": ["parameters"]}}
        (folder / "nb.ipynb").write_text(json.dumps({"cells": [cell]}))
        return Use(["reproduce", path, "--out", folder / "out", "--dry-run"], lambda: matrix.plan(path))
    return use


def overrides(text):
    "Overrides: a dict, or JSON as it is typed; or the options of a command, a list."
    return lambda kit, folder: fit_use(kit.images, folder / "run", json.dumps(text) if isinstance(text, dict) else text)


def parameter(command=None, call=None, notebook=None, **changes):
    "A parameter of training."
    def use(kit, folder):
        made = {name: value(kit, folder) if callable(value) else value for name, value in changes.items()}
        return fit_use(made.pop("root", kit.images), made.pop("out", folder / "run"), **made)
    return use


def checkpoint(content):
    "A checkpoint in the official layout, converted."
    def use(kit, folder):
        path = place(folder, "800.pt", content(folder) if callable(content) else content)
        return Use(["convert-official", path, folder / "out", "--network-only"],
                   lambda: convert_official_checkpoint(path, folder / "out", None))
    return use


def model(change):
    "A model folder, changed: detected with, loaded, and the model of a finished run that a notebook evaluates."
    def use(kit, folder):
        run = finished_run(kit, kit.images, folder / "run")
        change(run / "model", folder)
        photo = place(folder, "photo.png", png())
        return Use(["detect", run / "model", photo, "--out", earlier_detections(folder / "out"), "--device", "cpu"],
                   lambda: AnomalyDetector.from_pretrained(run / "model")(photo),
                   ("deco_image",
                    dict(data_root=str(kit.images), out_dir=str(run), device="cpu", overrides=overrides_of(),
                         resume=True)))
    return use


def codec(make):
    "A folder of a codec, named by an override."
    def use(kit, folder):
        make(folder / "codec", folder)
        return replace(fit_use(kit.images, folder / "run", overrides_of(codec={"kind": str(folder / "codec")})),
                       call=lambda: load_codec(str(folder / "codec")))
    return use


def evaluated_run(change):
    "A folder of runs, one of them changed: `adiff table`, and the notebook that draws from it."
    def use(kit, folder):
        runs = folder / "runs"
        shutil.copytree(kit.run, runs / "one", ignore=shutil.ignore_patterns("model", "checkpoints"))
        change(runs / "one")
        out = folder / "out"
        place(out, "results.csv", b"earlier\n")
        return Use(["table", runs, "--out", out], lambda: tables.collect([runs]),
                   ("figures", dict(runs=str(runs), out_dir=str(folder / "figures"))))
    return use


def evaluation(change):
    "A finished run, changed, then evaluated."
    def use(kit, folder):
        run = finished_run(kit, kit.images, folder / "run")
        place(run, "metrics.json", b'{"earlier": true}')
        change(run)
        return Use(["evaluate", run, "--device", "cpu"], lambda: evaluate(run, device="cpu"))
    return use


PICTURE = "pictures/000.png"
TOY = common.Dataset(name="Toy", page="http://example.org/toy", url="http://example.org/toy.tar", archive="toy.tar",
                     folder="toy",
                     licence="none",
                     problems=lambda folder: [] if (folder / PICTURE).is_file() else [f"{PICTURE}: missing"],
                     most_files=100,
                     most_bytes=10_000_000)


def archive(content):
    "An archive of a dataset, passed to a data script."
    def use(kit, folder):
        path = place(folder, "toy.tar", content)
        (folder / "python").mkdir()
        return Use(["--out", folder / "data/toy", "--archive", path],
                   lambda: common.install(TOY, path, folder / "python/toy") or folder / "python/toy",
                   script=True)
    return use


# ---- pictures

def pixels(height=30, width=40, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def saved(picture, form, **options):
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def png(height=30, width=40, seed=0, mode="RGB", form="PNG", **options):
    return saved(Image.fromarray(pixels(height, width, seed)).convert(mode), form, **options)


def half(content):
    return content[:len(content) // 2]


def flipped(content, position):
    return content[:position] + bytes([content[position] ^ 255]) + content[position + 1:]


def png_header(width, height):
    "A grey PNG that declares a size and holds a few bytes."
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def transparent_palette():
    picture = Image.new("P", (40, 30), 0)
    picture.putpalette([200, 0, 0])
    return saved(picture, "PNG", transparency=0)


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return png(form="JPEG", exif=exif)


def several(form, count=3, **options):
    frames = [Image.fromarray(pixels(seed=number)) for number in range(count)]
    return saved(frames[0], form, save_all=True, append_images=frames[1:], **options)


def is_picture(width=40, height=30):
    return lambda found: found.mode == "RGB" and found.size == (width, height)


def same_as(content):
    return lambda found: np.array_equal(np.asarray(found), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


ODD_NAMES = {"with a line break": "a\nb.png", "with spaces": " a b .png", "in Unicode": "Prüfung 検査 🔍.png",
             "with HTML": "<img src=x onerror=alert(1)>.png",
             "that begins with a dash": "-rf.png", "that is a formula": "=cmd|' 'C'!A0.png",
             "with shell commands": "$(touch executed);`touch executed`.png"}

IMAGES = [
    refused("truncated PNG", image(half(png())), "half a picture is none", "x.png", "cannot be read as an image"),
    refused("truncated JPEG", image(half(png(form="JPEG", quality=100)), "x.jpg"), "half a picture is none", "x.jpg",
            "cannot be read as an image"),
    refused("truncated TIFF", image(half(png(form="TIFF")), "x.tif"), "half a picture is none", "x.tif",
            "cannot be read as an image"),
    refused("empty file", image(b""), "nothing to see", "x.png", "the file is empty"),
    refused("text named .png", image(b"not an image\n"), "not an image", "x.png", "not an image"),
    refused("PNG whose header fails its checksum", image(flipped(png(), 20)), "damaged", "x.png", "not an image"),
    refused("PNG whose pixels fail their checksum", image(flipped(png(), 700)), "damaged", "x.png",
            "cannot be read as an image"),
    refused("PNG of 60000 x 60000 declared pixels", image(png_header(60000, 60000)),
            "a decompression bomb: above PIL's limit of 179 million", "x.png",
            "cannot be read as an image"),
    refused("PNG of 12000 x 12000 declared pixels, without them", image(png_header(12000, 12000)),
            "below the limit, but cut short",
            "x.png",
            "cannot be read as an image"),
    refused("SVG", image(b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'),
            "not an image of pixels", "x.png",
            "not an image"),
    refused("floating-point TIFF with NaN",
            image(saved(Image.fromarray(np.full((30, 40), np.nan, np.float32)), "TIFF"), "x.tif"),
            "NaN is no brightness", "x.tif", "nan"),
    refused("floating-point TIFF above 1",
            only_detected(image(saved(Image.fromarray(np.full((30, 40), 7, np.float32)), "TIFF"), "x.tif")),
            "what is white is unknown", "x.tif", "scale them to [0, 1]"),
    refused("TIFF of 32-bit integers above 65535",
            only_detected(image(saved(Image.fromarray(np.full((30, 40), 70000, np.int32)), "TIFF"), "x.tif")),
            "what is white is unknown", "x.tif", "8 or 16 bits"),
    refused("link to itself", image(lambda path: path.symlink_to(path.name)), "leads nowhere", "x.png"),
    refused("link to nothing", image(lambda path: path.symlink_to("gone.png")), "told by name, not left out", "x.png",
            "no such file"),
    refused("pipe named .png", image(os.mkfifo), "reading it would wait for ever", "x.png", "not a file"),
    refused("broken picture with a line break and escapes in its name", image(b"", "a\n\x1b[31mb.png"),
            "the line stays one line, and no terminal is told anything",
            r"a\n\x1b[31mb.png"),
    refused("name that is not in UTF-8, in a folder",
            detect_use(source=lambda kit, folder: place(folder, "photos/" + os.fsdecode(b"a\xff.png"), png()).parent),
            "no table could hold it", r"a\udcff.png", "UTF-8"),
    refused("unreadable file", image(lambda path: (path.write_bytes(png()), path.chmod(0))), "the reason is told",
            "x.png",
            "Permission denied"),
    handled("PNG named .jpg", image(png(), "x.jpg"), "the content decides", same_as(png())),
    handled("1 x 1 pixel", image(png(1, 1)), "enlarged", is_picture(1, 1)),
    handled("1 pixel high, 500 wide", image(png(1, 500)), "squeezed to a square as any other", is_picture(500, 1)),
    handled("2 pixels high, 20000 wide", image(png(2, 20000)), "squeezed to a square as any other",
            is_picture(20000, 2)),
    handled("CMYK", image(png(mode="CMYK", form="JPEG"), "x.jpg"), "converted to RGB", is_picture()),
    handled("palette with transparency", image(transparent_palette()), "transparent is white",
            lambda found: found.getpixel((0, 0)) == (255, 255, 255)),
    handled("16 bits", image(saved(Image.fromarray(np.full((30, 40), 32896, np.uint16)), "PNG")), "65535 becomes 255",
            lambda found: found.getpixel((0, 0)) == (128, 128, 128)),
    handled("floating-point TIFF in 0..1",
            image(saved(Image.fromarray(np.full((30, 40), 128 / 255, np.float32)), "TIFF"), "x.tif"),
            "1 becomes 255",
            lambda found: found.getpixel((0, 0)) == (128, 128, 128)),
    handled("TIFF of three pages", image(several("TIFF"), "x.tif"), "the first one counts", same_as(png())),
    handled("animated PNG", image(several("PNG", default_image=False)), "the first processor counts", same_as(png())),
    handled("animated GIF named .png", image(several("GIF")), "the content decides, the first processor counts",
            is_picture()),
    handled("turned by EXIF", image(turned(), "x.jpg"), "shown upright", is_picture(30, 40)),
    *(handled(f"name {title}", image(png(), name), "a name like any other", is_picture()) for title,
      name in ODD_NAMES.items()),
]

# ---- masks


def mask_file(folder):
    return next(iter(sorted(folder.glob("*.png"))))


def without_masks(kit, folder):
    "The dataset, its masks replaced by links to nothing."
    shutil.copytree(kit.images, folder / "data")
    for path in (folder / "data").glob("*/ground_truth/*/*.png"):
        path.unlink()
        path.symlink_to("gone.png")
    return folder / "data"


def rewritten(change):
    "Applies `change` to the mask, a PIL image; what comes of it, an image or bytes, takes its place."
    def apply(folder):
        path = mask_file(folder)
        with Image.open(path) as old:
            new = change(old)
        if isinstance(new, bytes):
            path.write_bytes(new)
        else:
            new.save(path)
    return apply


def without_a_number(key):
    return lambda metrics: metrics["mean"][key] is not None


MASKS = [
    refused("mask of another size", mask(rewritten(lambda old: old.resize((9, 9)))), "which pixel is meant is unknown",
            "they must agree"),
    refused("empty mask file", mask(lambda folder: mask_file(folder).write_bytes(b"")),
            "left out, it would change the numbers unseen",
            "the file is empty"),
    refused("truncated mask", mask(lambda folder: mask_file(folder).write_bytes(half(mask_file(folder).read_bytes()))),
            "half a mask is none",
            "cannot be read as an image"),
    refused("mask that is a link to nothing", parameter(root=lambda kit, folder: without_masks(kit, folder)),
            "not the same as no mask",
            "_mask.png", "no such file"),
    handled("colour mask", mask(rewritten(lambda old: old.convert("RGB"))), "any colour but black is anomalous",
            without_a_number("pixel_ap")),
    handled("mask with a palette", mask(rewritten(lambda old: old.convert("P"))), "any index but 0 is anomalous",
            without_a_number("pixel_ap")),
    handled("missing mask", mask(lambda folder: mask_file(folder).unlink()),
            "counts in image-level metrics only, and a note says so",
            lambda metrics: any("have no mask" in note for note in metrics["notes"])),
    handled("black mask of an anomalous image", mask(rewritten(lambda old: Image.new("L", old.size))),
            "its pixels count as normal, as the mask says; at image level it stays anomalous",
            without_a_number("image_ap")),
    handled("masks without an image", mask(lambda folder: shutil.copy(mask_file(folder), folder / "999_mask.png")),
            "left out",
            without_a_number("pixel_ap")),
]

# ---- sounds


def wave_samples(seconds=1.0, rate=16000, channels=1, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, (int(seconds * rate), channels))


def wav(seconds=1.0, rate=16000, channels=1, seed=0, **options):
    buffer = io.BytesIO()
    soundfile.write(buffer, wave_samples(seconds, rate, channels, seed), rate, format=options.pop("format", "WAV"),
                    **options)
    return buffer.getvalue()


def wav_header(rate=16000, channels=1, samples=bytes(range(200)) * 100, declared=None):
    "A wav of 16 bits whose header says what it is told to say."
    sizes = struct.pack("<HHIIHH", 1, channels, rate, 2 * rate * channels & 0xFFFFFFFF, 2 * channels & 0xFFFF, 16)
    return (b"RIFF" + struct.pack("<I", 36 + len(samples)) + b"WAVEfmt " + struct.pack("<I", 16) + sizes
            + b"data" + struct.pack("<I", len(samples) if declared is None else declared) + samples)


def floats(value):
    buffer = io.BytesIO()
    samples = wave_samples()
    samples[100] = value
    soundfile.write(buffer, samples, 16000, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def is_sound(windows=1):
    return lambda found: found.shape == (windows, 1, 32, 32) and bool(found.isfinite().all())


SOUNDS = [
    refused("empty file", sound(b""), "nothing to hear", "x.wav", "the file is empty"),
    refused("truncated wav", sound(half(wav())), "its end is missing", "x.wav", "cut short"),
    refused("truncated ogg", sound(half(wav(format="OGG")), "x.ogg"), "its end is missing", "x.ogg", "cut short"),
    refused("truncated flac", sound(half(wav(format="FLAC")), "x.flac"), "its end is missing", "x.flac"),
    refused("text named .wav", sound(b"not a sound\n"), "not a sound", "x.wav", "not a sound"),
    refused("header without samples", sound(wav_header(samples=b"")), "nothing to hear", "x.wav", "no sound"),
    refused("samples that are NaN", sound(floats(np.nan)), "NaN is no level", "x.wav", "NaN"),
    refused("samples that are infinite", sound(floats(np.inf)), "infinity is no level", "x.wav", "infinite"),
    refused("samples of 1e6", sound(floats(1e6)), "what is loud is unknown", "x.wav", "scale them to [-1, 1]"),
    refused("0 Hz", sound(wav_header(rate=0)), "no sample rate", "x.wav"),
    refused("2 GHz", sound(wav_header(rate=2**31 - 1)), "no sound has it, and nothing would be left at 16 kHz", "x.wav",
            "sample rate"),
    refused("1 Hz", sound(wav_header(rate=1)), "hours of sound in a few bytes", "x.wav", "sample rate"),
    refused("no channels", sound(wav_header(channels=0)), "no samples", "x.wav", "Channel"),
    handled("declared length of 2 GB, as recorders that stream write it, too", sound(wav_header(declared=2**31)),
            "read up to its end", is_sound()),
    refused("pipe named .wav", sound(os.mkfifo), "reading it would wait for ever", "x.wav", "not a file"),
    refused("link to nothing", sound(lambda path: path.symlink_to("gone.wav")), "told by name, not left out", "x.wav",
            "no such file"),
    handled("unknown length, as recorders that stream write it", sound(wav_header(declared=2**32 - 1)),
            "read up to its end", is_sound()),
    handled("8 channels", sound(wav(channels=8)), "averaged", is_sound()),
    handled("8 bits", sound(wav(subtype="PCM_U8")), "scaled to [-1, 1]", is_sound()),
    handled("one sample", sound(wav(1 / 16000)), "followed by silence", is_sound()),
    handled("192 kHz", sound(wav(rate=192000)), "resampled", is_sound()),
    handled("9 seconds", sound(wav(9.0)), "looked at in overlapping windows", is_sound(4)),
    handled("silence", sound(wav_header(samples=bytes(32000))), "a sound like any other", is_sound()),
    handled("flac named .wav", sound(wav(format="FLAC")), "the content decides", is_sound()),
]

# ---- tables

HEAD = "object,split,label,image,mask"
ROWS = [f"thing,train,normal,pictures/{number}.png," for number in range(4)]
WHOLE = [*ROWS, "thing,test,normal,pictures/4.png,"]


def rows(*lines, head=HEAD, encoding="utf-8"):
    return "\n".join([head, *lines, ""]).encode(encoding)


def detector_of(*categories):
    return lambda detector: list(detector.config.categories) == list(categories)


URBAN_HEAD = "slice_file_name,fsID,start,end,salience,fold,classID,class"

TABLES = [
    refused("no column for the image", table(rows(*ROWS, head="object,split,label,picture,mask")),
            "what is meant is unknown", "1cls.csv",
            "has no column image"),
    refused("an image twice", table(rows(*ROWS, ROWS[0])), "it would count twice, or in two splits", "1cls.csv",
            "row 6", "listed twice"),
    refused("absolute path", table(rows(*ROWS, "thing,train,normal,/etc/hostname.png,")), "outside of the dataset",
            "row 6",
            "relative to the dataset's root"),
    refused("parent path", table(rows(*ROWS, "thing,train,normal,pictures/../../x.png,")), "outside of the dataset",
            "row 6",
            "relative to the dataset's root"),
    refused("parent path of a mask", table(rows(*ROWS, "thing,test,anomaly,outside.png,../../mask.png")),
            "outside of the dataset", "row 6",
            "relative to the dataset's root"),
    refused("in Latin-1", table(rows(*ROWS, "Gehäuse,train,normal,outside.png,", encoding="latin-1")),
            "guessing the encoding would spoil names", "1cls.csv",
            "not a CSV table"),
    refused("in UTF-16", table(rows(*ROWS, encoding="utf-16")), "guessing the encoding would spoil names", "1cls.csv",
            "not a CSV table"),
    refused("NUL in a path", table(rows(*ROWS, "thing,train,normal,a\0b.png,")), "no path of a file", "row 6", "NUL"),
    refused("empty file", table(b""), "no table", "1cls.csv", "not a CSV table"),
    refused("header only", table(rows()), "nothing to train on", "1cls.csv", "no rows"),
    refused("binary", table(png()), "no table", "1cls.csv", "not a CSV table"),
    refused("rows with too many commas", table(rows(*ROWS, "thing,train,normal,outside.png,,,,")),
            "which column is meant is unknown",
            "1cls.csv", "not a CSV table"),
    refused("every row with one comma too many", table(rows(*(row + "," for row in ROWS))),
            "pandas would move every column by one",
            "1cls.csv", "more fields than the header"),
    refused("category that leaves the folder", table(rows(*(row.replace("thing", "../../thing") for row in ROWS))),
            "folders and figures are called so", "row 2",
            "object must be a name"),
    refused("unknown split", table(rows(*ROWS, "thing,trian,normal,outside.png,")), "a typing error", "row 6", "trian",
            "train"),
    refused("anomaly in the training split", table(rows(*ROWS, "thing,train,anomaly,outside.png,")),
            "training is on normal images only",
            "row 6",
            "outside the test split"),
    refused("none of its files is there", table(rows("thing,train,normal,gone.png,")), "nothing to train on",
            "holds no image of thing"),
    handled("with a byte-order mark", table(rows(*WHOLE, encoding="utf-8-sig")),
            "the mark is no part of the first name",
            detector_of("thing")),
    handled("Windows line ends and quotes",
            table(rows(*WHOLE, '"thing","train","normal","outside.png",""').replace(b"\n", b"\r\n")),
            "a table like any other",
            detector_of("thing")),
    handled("category that is a formula", table(rows(*(row.replace("thing", "=1+1") for row in WHOLE))),
            "text, in python as in our files",
            detector_of("=1+1")),
    handled("rows without a file", table(rows(*WHOLE, "thing,train,normal,gone.png,")), "left out, counted in a note",
            detector_of("thing")),
    refused("UrbanSound8K: fold 11", urban(rows("0.wav,1,0,1,1,11,3,dog_bark", head=URBAN_HEAD)), "there are ten",
            "row 2", "fold '11'"),
    refused("UrbanSound8K: a time that is no number", urban(rows("0.wav,1,zero,1,1,1,3,dog_bark", head=URBAN_HEAD)),
            "no length", "row 2",
            "does not end"),
]

# ---- matrices

GROUP = "groups: {g: {notebook: nb.ipynb, axes: {seed: [0, 1]}%s}}\n"


def laughs(depth=9, width=9):
    "Few lines in which every alias stands for many others."
    lines = ["x0: &x0 [lol]"] + [f"x{n + 1}: &x{n + 1} [{', '.join([f'*x{n}'] * width)}]" for n in range(depth)]
    head = "groups:\n  g:\n    notebook: nb.ipynb\n    parameters:\n      options:\n"
    return head + "".join(f"        {line}\n" for line in lines)


MATRICES = [
    refused("a tag that would run a command", yaml("groups: !!python/object/apply:os.system ['touch executed']\n"),
            "YAML is read without objects", "m.yaml",
            "not valid YAML"),
    refused("aliases of aliases", yaml(laughs()), "a few lines that stand for millions of values", "m.yaml", "aliases"),
    refused("an alias inside of what it means",
            yaml("groups: &g\n  g: {notebook: nb.ipynb, parameters: {options: *g}}\n"), "it has no end",
            "m.yaml", "aliases"),
    refused("a key twice", yaml(GROUP % "" + GROUP % ""), "one of them would be lost", "line 2", "duplicate key"),
    refused("tabs", yaml("groups:\n\tg:\n\t\tnotebook: nb.ipynb\n"), "not YAML", "line 2"),
    refused("unknown key", yaml(GROUP % ", axis: {}"), "a typing error", "groups.g.axis"),
    refused("a list", yaml("- one\n- two\n"), "no matrix", "a matrix is a mapping"),
    refused("empty", yaml(""), "no matrix", "a matrix is a mapping"),
    refused("binary", yaml(png()), "not YAML", "not valid YAML"),
    refused("NUL", yaml("groups: \0\n"), "not YAML", "not valid YAML"),
    refused("1000 brackets", yaml("groups: " + "[" * 1000), "nested deeper than anything needs", "m.yaml", "nested"),
    refused("2 MB", yaml("# " + "x" * 2_000_000 + "\n" + GROUP % ""), "a matrix is a short file", "m.yaml", "1 MB"),
    refused("a number of 5000 digits", yaml(GROUP.replace("0, 1", "9" * 5000) % ""), "no number anyone means", "m.yaml",
            "not valid YAML"),
    refused("a date that does not exist", yaml(GROUP.replace("0, 1", "2020-13-45") % ""), "not YAML", "m.yaml",
            "not valid YAML"),
    refused("a date", yaml(GROUP % ", parameters: {options: {day: 2020-12-24}}"), "a notebook is told text and numbers",
            "m.yaml",
            "quotes"),
    refused("a list as a key", yaml("? [a, b]\n: x\n"), "no name of anything", "m.yaml"),
    refused("a million runs", yaml(f"groups: {{g: {{notebook: nb.ipynb, axes: {{seed: {list(range(1000))}, "
                                   f"options: {({f'o{n}': {'x': n} for n in range(1000)})}}}}}}}"),
            "a plan that cannot be meant", "m.yaml", "1000000 runs"),
    refused("a notebook that is not there", yaml(GROUP.replace("nb.", "no.") % ""), "nothing to run", "no.ipynb",
            "no such file"),
    refused("a parameter of a wrong type", yaml(GROUP.replace("0, 1", "zero") % ""), "the notebook would fail later",
            "seed must be int"),
    handled("aliases that are few",
            yaml("groups:\n  g: {notebook: nb.ipynb, axes: {seed: [0]}, parameters: &p {options: {a: 1}}}\n"
                 "  h: {notebook: nb.ipynb, axes: {seed: [1]}, parameters: *p}\n"),
            "each stands for what it names", lambda runs: len(runs) == 2),
    handled("names with slashes, dots and shell commands",
            yaml('groups: {"../../$(touch executed)": '
                 '{notebook: nb.ipynb, axes: {seed: {"`touch executed`; /": 0, b: 1}}}}\n'),
            "a run's folder has letters, digits and . _ - = + only",
            lambda runs: all(re.fullmatch(r"[\w.=+-]+", run.folder) and run.folder != ".." for run in runs)),
]

# ---- overrides and parameters

OVERRIDES = [
    refused("not JSON", unspeakable(overrides("{codec")), "a typing error", "overrides", "not valid JSON"),
    refused("a list", unspeakable(overrides("[1]")), "no sections", "overrides", "JSON object"),
    refused("null", unspeakable(overrides("null")), "no sections", "overrides", "JSON object"),
    refused("a section twice", unspeakable(overrides('{"training": {"length": 1}, "training": {"length": 2}}')),
            "one of them would be lost", "overrides", "'training'", "twice"),
    refused("a setting twice", unspeakable(overrides('{"training": {"length": 1, "length": 2}}')),
            "one of them would be lost",
            "overrides", "'length'", "twice"),
    refused("NaN", unspeakable(overrides('{"training": {"learning_rate": NaN}}')), "not JSON, and no number",
            "overrides", "NaN"),
    refused("Infinity", unspeakable(overrides('{"training": {"learning_rate": Infinity}}')), "not JSON, and no number",
            "overrides",
            "Infinity"),
    refused("100000 brackets", unspeakable(overrides('{"codec": ' + "[" * 100_000)),
            "nested deeper than anything needs", "overrides",
            "nested"),
    refused("a number of 5000 digits", unspeakable(overrides('{"training": {"length": ' + "9" * 5000 + "}}")),
            "no number anyone means", "overrides"),
    refused("-o without a value", overrides(["training.length"]), "nothing to set it to", "training.length", "=VALUE"),
    refused("-o without a setting", overrides(["=100"]), "nothing to set", "=100", "SECTION.SETTING"),
    refused("-o with a path that is too long", overrides(["codec.kind.name=wavelet"]), "no setting lies that deep",
            "codec.kind.name"),
    refused("-o twice", overrides(["training.length=1", "training.length=2"]), "one of them would be lost",
            "training.length", "twice"),
    refused("-o of a section and of what is in it", overrides(["training=1", "training.length=2"]),
            "one of them would be lost",
            "training.length"),
    refused("-o with NaN", overrides(["training.learning_rate=NaN"]), "no number", "training.learning_rate"),
    refused("-o with 100000 brackets", overrides(["training.length=" + "[" * 100_000]),
            "nested deeper than anything needs",
            "training.length"),
    refused("a length of 30 digits", overrides({"training": {"length": int("9" * 30)}}), "it would never end",
            "training.length",
            "less than"),
    refused("an image size of a million", overrides({"data": {"image_size": 10**6}}), "no memory holds it",
            "data.image_size",
            "less than"),
    refused("unknown section", overrides({"codek": {"kind": "taef2"}}), "a typing error", "codek", "codec"),
    refused("unknown setting", overrides({"correction": {"steps": 1}}), "a typing error",
            "unknown override 'correction.steps'",
            "known: correction.kind, correction.num_inference_steps"),
    refused("a setting without its section", overrides({"num_inference_steps": 1}),
            "which section is meant is not guessed",
            "'num_inference_steps'", "correction.num_inference_steps"),
    refused("a setting of another kind", overrides({"correction": {"kind": "single-pass", "num_inference_steps": 1}}),
            "it would do nothing", "unknown override 'correction.num_inference_steps'", "known: correction.kind"),
    refused("unknown kind", overrides({"network": {"kind": "unet"}}), "a typing error", "network.kind", "'unet'",
            "class-token-unet"),
    refused("a section that is a text", overrides({"training": "long"}), "no settings", "'training'"),
    refused("wrong type", overrides({"training": {"length": "long"}}), "a typing error", "training.length", "long"),
    refused("null where a value is needed", overrides({"codec": None}), "nothing to choose", "codec"),
    refused("a wavelet that is a path", overrides({"codec": {"wavelet": "../haar"}}), "no wavelet", "../haar"),
    refused("a codec with NUL in its name", overrides({"codec": {"kind": "a\0b"}}), "no path of a folder", "codec"),
    handled("spaces and line breaks", overrides(f" {overrides_of()}\n"), "JSON allows them", detector_of("brick")),
    handled("a number as text", overrides({**TINY, "training": {**TINY["training"], "length": "1"}}),
            "read as the number",
            detector_of("brick")),
]

PARAMETERS = [
    refused("seed -1", parameter(seed=-1), "numpy has no such seed", "seed"),
    refused("seed of 26 digits", parameter(seed=10**25), "torch has no such seed", "seed"),
    refused("device that is unknown", parameter(device="tpu"), "a typing error", "tpu", "auto"),
    refused("device that is not there", parameter(device="cuda:99"), "nothing to compute on", "cuda:99"),
    refused("no category", parameter(categories=""), "nothing to train on", "category"),
    refused("commas instead of categories", parameter(categories=",,"), "nothing to train on", "category"),
    refused("unknown category", parameter(categories="brikc"), "a typing error", "brikc", "brick"),
    refused("data with NUL in its path", unspeakable(parameter(root="a\0b")), "no path of a folder", "no such folder"),
    refused("out with NUL in its path", unspeakable(parameter(out="a\0b")), "no path of a folder", "cannot write here"),
    refused("a file as data", parameter(root=lambda kit, folder: place(folder, "x.png", png())), "no folder",
            "no such folder"),
    refused("out is a file", parameter(out=lambda kit, folder: place(folder, "x", b"mine")), "it would be lost",
            "cannot write here"),
    refused("out is the data",
            parameter(root=lambda kit, folder: photos(folder), out=lambda kit, folder: folder / "photos"),
            "what a run draws would be trained on next time", "photos", "out_dir"),
    refused("out is inside the data",
            parameter(root=lambda kit, folder: photos(folder), out=lambda kit, folder: folder / "photos/run"),
            "what a run draws would be trained on next time", "photos", "out_dir"),
    refused("the data is a root whose folders are no categories",
            parameter(root=lambda kit, folder: place(folder, "a/train/x.txt", b"").parent.parent.parent),
            "no layout fits, and it holds nothing to read", "no image and no sound"),
]


def photos(folder):
    for number in range(4):
        place(folder, f"photos/{number}.png", png(seed=number))
    return folder / "photos"


PARAMETERS += [
    refused("batch size 0", detect_use("--batch-size", 0, batch_size=0), "nothing would be detected", "batch_size"),
    refused("batch size -1", detect_use("--batch-size", -1, batch_size=-1), "nothing would be detected", "batch_size"),
    refused("unknown category to detect", detect_use("--category", "brikc", category="brikc"), "a typing error",
            "brikc", "brick"),
    refused("a file as model", detect_use(model=lambda kit, folder: place(folder, "model", b"x")), "no folder",
            "model"),
    refused("a model that is not there", detect_use(model=lambda kit, folder: folder / "no/such/model"),
            "nothing to detect with", "model"),
    refused("a file that is not there", detect_use(source=lambda kit, folder: folder / "gone.png"),
            "nothing to detect in", "gone.png",
            "no such file"),
    refused("a folder without pictures",
            detect_use(source=lambda kit, folder: place(folder, "texts/x.txt", b"").parent),
            "nothing to detect in", "holds no image"),
    refused("detections into a file", detect_use(out_dir=lambda folder: place(folder, "out", b"mine")),
            "it would be lost",
            "cannot write here"),
    handled("a folder named x.png with a picture in it",
            detect_use(source=lambda kit, folder: place(folder, "x.png/a.png", png()).parent),
            "searched through",
            lambda found: len(found) == 1 and not found.error.any()),
    handled("detections into the folder of the pictures, a second time",
            detect_use(source=lambda kit, folder: earlier_detections(place(folder, "p/a.png", png()).parent),
                       out_dir=lambda folder: folder / "p"),
            "our own overlays are not looked at",
            lambda found: len(found) == 1 and not found.error.any()),
    refused("detection in our own overlays",
            detect_use(source=lambda kit, folder: earlier_detections(folder / "out") / "overlays",
                       out_dir=lambda folder: folder / "out"),
            "they are not pictures of anything", "overlays", "nothing else"),
    handled("a folder with a link to itself", detect_use(source=lambda kit, folder: linked(folder)),
            "links to folders are not followed",
            lambda found: len(found) == 1 and not found.error.any()),
]


def linked(folder):
    place(folder, "photos/a.png", png())
    (folder / "photos/again").symlink_to(folder / "photos")
    return folder / "photos"


# ---- checkpoints and models

class Malicious:
    "Pickled, it is a call that leaves a file behind."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def torch_bytes(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def zip_bytes(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


OFFICIAL_KEYS = ("cond_stage_model.embedding.weight", "time_embed.0.weight", "input_blocks.0.0.weight")


def official_weights(**shapes):
    sizes = dict(zip(OFFICIAL_KEYS, [(15, 512), (512, 128), (128, 4, 3, 3)])) | shapes
    return {"model": {key: torch.zeros(*size) for key, size in sizes.items()}}


CHECKPOINTS = [
    refused("pickle that runs a command",
            checkpoint(lambda folder: pickle.dumps({"model": Malicious(folder / "executed")})),
            "nothing in a file is run", "800.pt",
            "refused"),
    refused("torch file that runs a command",
            checkpoint(lambda folder: torch_bytes({"model": Malicious(folder / "executed")})),
            "nothing in a file is run", "800.pt",
            "refused"),
    refused("torn torch file", checkpoint(half(torch_bytes(official_weights()))), "half of it is missing", "800.pt",
            "refused"),
    refused("empty file", checkpoint(b""), "nothing in it", "800.pt"),
    refused("zip of something else", checkpoint(zip_bytes(**{"a.txt": "x"})), "no weights", "800.pt"),
    refused("another dictionary of tensors", checkpoint(torch_bytes({"model": {"weight": torch.zeros(3)}})),
            "another network", "800.pt",
            "not in the official"),
    refused("a list", checkpoint(torch_bytes([1, 2])), "another network", "800.pt", "not in the official"),
    refused("weights without axes", checkpoint(torch_bytes({"model": dict.fromkeys(OFFICIAL_KEYS, torch.zeros(()))})),
            "another network",
            "official"),
    refused("width of no known size", checkpoint(torch_bytes(official_weights(**{OFFICIAL_KEYS[1]: (77, 77)}))),
            "another network",
            "known sizes"),
    refused("three weights of many", checkpoint(torch_bytes(official_weights())), "another network",
            "official checkpoint"),
]


def network_file(model):
    return model / "network/diffusion_pytorch_model.safetensors"


def with_weights(change):
    "The network's weights, changed."
    def apply(model, folder):
        state = load_file(network_file(model))
        save_file(change(state), network_file(model), metadata={"format": "pt"})
    return apply


def with_json(name, change):
    "A JSON file of the model (or its text), changed."
    def apply(model, folder):
        path = model / name
        values = json.loads(path.read_text())
        changed = change(values, folder)
        path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    return apply


def lying_header(declared):
    def apply(model, folder):
        content = network_file(model).read_bytes()
        network_file(model).write_bytes(struct.pack("<Q", declared) + content[8:])
    return apply


def huge_tensor(model, folder):
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**30, 2**20], "data_offsets": [0, 2**52]}}).encode()
    network_file(model).write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))


def evil_code(path):
    "A python file that leaves a file behind when imported, as `path`; it defines every class that anyone may look for."
    path.write_text("import os\nos.system(\"touch '%s'\")\nclass Evil: pass\n" % (path.parents[2] / "executed"))


def evil_pipeline(model, folder):
    evil_code(model / "evil.py")
    (model / "pipeline.py").write_text((model / "evil.py").read_text())
    with_json("model_index.json", lambda values, _: {**values, "_class_name": ["evil", "Evil"]})(model, folder)


def evil_part(model, folder):
    evil_code(model / "network/evil.py")
    with_json("model_index.json", lambda values, _: {**values, "network": ["evil", "Evil"]})(model, folder)


def only_pickled(model, folder):
    state = load_file(network_file(model))
    network_file(model).unlink()
    (model / "network/diffusion_pytorch_model.bin").write_bytes(pickle.dumps({**state,
                                                                              "x": Malicious(folder / "executed")}))


def nested_pipeline(model, folder):
    "A part that is a pipeline of diffusers, with code of its own."
    (model / "network/model_index.json").write_text(json.dumps({"_class_name": ["evil", "Evil"],
                                                                "_diffusers_version": "0.42.1"}))
    evil_code(model / "network/evil.py")
    with_json("model_index.json", lambda values, _: {**values, "network": ["diffusers", "DiffusionPipeline"]})(model,
                                                                                                               folder)


def changed_network(**changes):
    return with_json("network/config.json", lambda values, _: {**values, **changes})


def first_shortened(state):
    name = sorted(state)[0]
    return {**state, name: state[name].flatten()[:-1].clone()}


MODELS = [
    refused("torn weights",
            model(lambda model, folder: network_file(model).write_bytes(half(network_file(model).read_bytes()))),
            "half of them are missing",
            "model"),
    refused("empty weights", model(lambda model, folder: network_file(model).write_bytes(b"")), "nothing in them",
            "model"),
    refused("weights whose header declares 2**60 bytes", model(lying_header(2**60)), "longer than the file", "model"),
    refused("weights whose header is shorter than it is", model(lying_header(10)), "cut off in the middle", "model"),
    refused("a tensor of 2**50 declared values", model(huge_tensor), "longer than the file", "model"),
    refused("weights that are NaN",
            model(with_weights(lambda state: {name: torch.full_like(value, torch.nan) for name,
                                              value in state.items()})),
            "every score would be NaN", "NaN"),
    refused("a weight of another shape", model(with_weights(first_shortened)), "another network", "model"),
    refused("a weight that is missing", model(with_weights(lambda state: dict(sorted(state.items())[1:]))),
            "it would be random", "model"),
    refused("weights as a pickle that runs a command", model(only_pickled), "safetensors only", "model"),
    refused("model_index.json is not JSON", model(with_json("model_index.json", lambda values, _: "{")), "torn",
            "model_index.json",
            "not valid JSON"),
    refused("model_index.json is a list", model(with_json("model_index.json", lambda values, _: [1])), "another format",
            "model_index.json"),
    refused("model_index.json without the network",
            model(with_json("model_index.json", lambda values, _: {k: v for k, v in values.items() if k != "codec"})),
            "a part is missing", "model"),
    refused("a part that is os.system",
            model(with_json("model_index.json", lambda values, _: {**values, "network": ["os", "system"]})),
            "no part of a detector",
            "os"),
    refused("a part of a module that is not imported",
            model(with_json("model_index.json", lambda values, _: {**values, "network": ["antigravity", "fly"]})),
            "a model folder imports nothing", "antigravity", "import"),
    refused("a part that is a number", model(with_json("model_index.json", lambda values, _: {**values, "network": 3})),
            "no part",
            "model_index.json"),
    refused("a part with code in its folder", model(evil_part), "a model folder runs nothing", "evil"),
    refused("a pipeline with code in the folder", model(evil_pipeline), "a model folder runs nothing", "model"),
    refused("a part that is a pipeline of diffusers", model(nested_pipeline), "no part of a detector",
            "DiffusionPipeline"),
    refused("a configuration that is torn",
            model(lambda model, folder: (model / "network/config.json").write_text("{")), "torn", "model"),
    refused("a configuration with a key that is unknown and one that is missing",
            model(changed_network(base_channels="many")),
            "another network", "model"),
    refused("a configuration of a gigantic network", model(changed_network(base_channels=2**20)),
            "the weights are of another size, and no memory is taken", "model"),
    refused("a codec of 4**20 channels",
            model(with_json("codec/config.json", lambda values, _: {**values, "levels": 20})),
            "no memory holds it", "model"),
    refused("calibration that is text",
            model(with_json("model_index.json", lambda values, _: {**values, "calibration": "none"})),
            "no thresholds", "calibration"),
    refused("a protocol that is unknown",
            model(with_json("model_index.json", lambda values, _: {**values, "protocol": "../x"})),
            "no processor", "../x"),
    handled("a file that is no part of it",
            model(lambda model, folder: (model / "notes.py").write_text("raise SystemExit")), "left alone",
            lambda found: np.isfinite(found.scores).all()),
]


def author_files(content):
    "A codec folder as its author publishes it, with `content` as its encoder."
    def make(codec, folder):
        place(codec, "x_encoder.pth", content(folder) if callable(content) else content)
        place(codec, "x_decoder.pth", torch_bytes({"0.weight": torch.zeros(3)}))
    return make


def codec_config(**values):
    return lambda codec, folder: place(codec, "config.json", json.dumps(values).encode())


MODELS += [
    refused("codec: a pickle that runs a command",
            codec(author_files(lambda folder: pickle.dumps({"x": Malicious(folder / "executed")}))),
            "nothing in a file is run",
            "x_encoder.pth"),
    refused("codec: a torn file", codec(author_files(half(torch_bytes({"x": torch.zeros(100)})))),
            "half of it is missing",
            "x_encoder.pth"),
    refused("codec: another network's weights", codec(author_files(torch_bytes({"x": torch.zeros(100)}))),
            "another network",
            "x_encoder.pth"),
    refused("codec: a configuration of something else", codec(codec_config(_class_name="os.system")), "no codec",
            "config.json",
            "os.system"),
    refused("codec: a configuration that is a list", codec(lambda codec, folder: place(codec, "config.json", b"[1]")),
            "no codec",
            "config.json"),
    refused("codec: a configuration without weights", codec(codec_config(_class_name="AutoencoderTiny")),
            "weights are missing", "codec"),
    refused("codec: a name that leaves the folder of weights", overrides({"codec": {"kind": "../../etc"}}),
            "no codec and no folder",
            "../../etc"),
]


def broken_checkpoints(content):
    "Training that goes on from checkpoints that are broken."
    def use(kit, folder):
        run = folder / "run"
        shutil.copytree(kit.run, run,
                        ignore=shutil.ignore_patterns("model", "*.json", "*.csv", "*.html", "figures", "pixels",
                                                      "examples"))
        shutil.copy(kit.run / "config.json", run)
        for path in (run / "checkpoints").iterdir():
            path.write_bytes(content(path.read_bytes(), folder))
        made = fit_use(kit.images, run)
        return Use([*made.command, "--resume"],
                   lambda: fit("deco", kit.images, run, device="cpu", overrides=TINY, resume=True),
                   (made.notebook[0], {**made.notebook[1], "resume": True}))
    return use


MODELS += [
    refused("checkpoints that are torn", broken_checkpoints(lambda content, folder: half(content)),
            "beginning anew without a word would lose hours", "checkpoints", "damaged"),
    refused("checkpoints that would run a command",
            broken_checkpoints(lambda content, folder: pickle.dumps(Malicious(folder / "executed"))),
            "not run; beginning anew without a word would lose hours", "checkpoints", "damaged"),
]

# ---- results


def written(name, content):
    return lambda run: place(run, name, content)


def edited(name, change):
    def apply(run):
        (run / name).write_text(json.dumps(change(json.loads((run / name).read_text()))))
    return apply


RESULTS = [
    refused("metrics.json is torn", evaluated_run(lambda run: (run / "metrics.json").write_text('{"method"')),
            "half of it is missing",
            "metrics.json", "not valid JSON"),
    refused("metrics.json is empty", evaluated_run(written("metrics.json", b"")), "nothing in it", "metrics.json",
            "not valid JSON"),
    refused("metrics.json is a list", evaluated_run(written("metrics.json", b"[]")), "not ours", "metrics.json"),
    refused("metrics.json without its keys", evaluated_run(written("metrics.json", b"{}")), "not ours", "metrics.json"),
    refused("metrics.json with a word for a number",
            evaluated_run(edited("metrics.json", lambda metrics: {**metrics, "categories": {"brick": {
        **metrics["categories"]["brick"], "aupro": "high"}}})), "no number", "metrics.json"),
    refused("metrics.json in Latin-1", evaluated_run(written("metrics.json", '{"ä": 1}'.encode("latin-1"))), "not JSON",
            "metrics.json",
            "not valid JSON"),
    refused("100000 brackets as config.json", evaluated_run(written("config.json", b"[" * 100_000)),
            "nested deeper than anything needs",
            "config.json"),
    refused("scores.csv is missing", evaluated_run(lambda run: (run / "scores.csv").unlink()),
            "no intervals without scores", "scores.csv"),
    refused("scores.csv is binary", evaluated_run(written("scores.csv", png())), "not ours", "scores.csv"),
    refused("scores.csv without scores", evaluated_run(written("scores.csv", b"path,category,label\nx,brick,1\n")),
            "not ours",
            "scores.csv"),
    refused("pixels of another format",
            evaluated_run(lambda run: [path.write_bytes(b"x") for path in (run / "pixels").iterdir()]),
            "not ours", "brick.npz"),
    refused("pixels as a pickle that runs a command",
            evaluated_run(lambda run: [path.write_bytes(pickle.dumps(Malicious(run.parents[1] / "executed")))
                                       for path in (run / "pixels").iterdir()]),
            "nothing in a file is run", "brick.npz"),
    refused("config.json is torn", evaluation(written("config.json", b'{"method": ')), "half of it is missing",
            "config.json",
            "not valid JSON"),
    refused("config.json without its keys", evaluation(written("config.json", b"{}")), "not ours", "config.json"),
    refused("config.json of a dataset that is gone",
            evaluation(edited("config.json",
                              lambda config: {**config, "dataset": {**config["dataset"], "root": "/no/such"}})),
            "nothing to evaluate on", "/no/such", "no such folder"),
    refused("log.jsonl is torn", evaluation(written("log.jsonl", b'{"step": 1, "loss"')), "half of it is missing",
            "log.jsonl"),
    refused("log.jsonl is empty", evaluation(written("log.jsonl", b"")), "training says nothing", "log.jsonl"),
]

# ---- archives


def member(name, kind=tarfile.REGTYPE, link="", size=1):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size if kind == tarfile.REGTYPE else 0
    return info


def tar(*extra, mode="w"):
    "A tar of the whole toy dataset, then `extra` members."
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as file:
        for info in (member(PICTURE), *extra):
            file.addfile(info, io.BytesIO(bytes(info.size)))
    return buffer.getvalue()


def zipped(*extra):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content, mode in ((PICTURE, b"x", 0), *extra):
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            file.writestr(info, content)
    return buffer.getvalue()


def encrypted():
    "A zip whose member says that it is encrypted."
    content = bytearray(zipped())
    for mark, place_of_flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(mark) + place_of_flags] |= 1
    return bytes(content)


def long_name():
    "A tar whose first member's name is 64 MB long: a few kB when compressed, but read into memory at once."
    buffer = io.BytesIO()
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 64 * 2**20
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        for _ in range(64):
            file.write(b"a" * 2**20)
        file.write(tar())
    return buffer.getvalue()


ARCHIVES = [
    *(refused(f"tar: {name}", archive(tar(info)), "outside of the target, or through a link to it", repr(info.name),
              words) for name, info,
      words in [
        ("absolute path", member("/tmp/evil"), "absolute"),
        ("parent path", member("pictures/../../evil"), "leave the target"),
        ("symbolic link", member("evil", tarfile.SYMTYPE, "/"), "symbolic link"),
        ("hard link", member("evil", tarfile.LNKTYPE, "../x"), "hard link"),
        ("device", member("evil", tarfile.CHRTYPE), "device"), ("pipe", member("evil", tarfile.FIFOTYPE), "device"),
        ("drive letter", member("C:evil"), "absolute"), ("backslashes", member("..\\evil"), "absolute")]),
    *(refused(f"zip: {name}", archive(zipped(extra)), "outside of the target, or through a link to it", repr(extra[0]),
              words) for name,
      extra, words in [
        ("absolute path", ("/tmp/evil", b"x", 0), "absolute"),
        ("parent path", ("../evil", b"x", 0), "leave the target"),
        ("symbolic link", ("evil", b"/etc", stat.S_IFLNK), "symbolic link")]),
    refused("zip: encrypted", archive(encrypted()), "nobody is asked for a password", "encrypted"),
    refused("zip: 50 MB of zeros", archive(zipped(("zeros", bytes(50_000_000), 0))),
            "above the size that the dataset has", "10 MB"),
    refused("tar: 1 TB declared",
            archive(half(tar()) [:1024] + member("big", size=2**40).tobuf(tarfile.GNU_FORMAT) + bytes(1024)),
            "above the size that the dataset has",
            "10 MB"),
    refused("tar.gz: 50 MB of zeros", archive(tar(member("zeros", size=50_000_000), mode="w:gz")),
            "above the size that the dataset has",
            "10 MB"),
    refused("tar.gz: a name of 64 MB", archive(long_name()), "no name is that long, and it is not read",
            "neither a tar nor a zip"),
    refused("tar: 1000 members", archive(tar(*(member(f"{number}.png") for number in range(1000)))),
            "more than the dataset has",
            "100 files"),
    refused("zip: 1000 members", archive(zipped(*((f"{number}.png", b"x", 0) for number in range(1000)))),
            "more than the dataset has",
            "100 files"),
    refused("tar: a name twice", archive(tar(member("twice"), member("twice"))), "one of them would be lost", "'twice'",
            "twice"),
    refused("zip: a name twice", archive(zipped(("twice", b"x", 0), ("./twice", b"y", 0))), "one of them would be lost",
            "twice"),
    refused("tar: a file where a folder is", archive(tar(member("pictures"))), "one of them would be lost",
            "'pictures'"),
    refused("tar: a file below a file", archive(tar(member("a"), member("a/b"))), "one of them would be lost", "'a/b'"),
    refused("tar.gz: truncated", archive(half(tar(mode="w:gz"))), "half of it is missing", "toy.tar"),
    refused("tar.xz: damaged", archive(flipped(lzma.compress(tar()), 40)), "what is in it is unknown", "toy.tar"),
    refused("neither tar nor zip", archive(b"x" * 1000), "a web page, perhaps", "neither a tar nor a zip"),
    refused("empty", archive(b""), "nothing in it", "toy.tar"),
    handled("folders given twice", archive(tar(member("more", tarfile.DIRTYPE), member("more", tarfile.DIRTYPE))),
            "a folder is a folder",
            lambda folder: (folder / PICTURE).is_file()),
]

CORPUS = {"Pictures": IMAGES, "Masks": MASKS, "Sounds": SOUNDS, "Tables": TABLES, "Matrices": MATRICES,
          "Overrides": OVERRIDES,
          "Parameters": PARAMETERS,
          "Official checkpoints": CHECKPOINTS, "Models, codecs, checkpoints": MODELS, "Results of runs": RESULTS,
          "Archives of datasets": ARCHIVES}
ENTRIES = {f"{section}: {entry.name}": entry for section, entries in CORPUS.items() for entry in entries}


def corpus_table():
    "The corpus as a page in Markdown: a table of name, outcome and reason for every section."
    def cell(text):
        return re.sub(r"([\\|*_`])", r"\\\1", " ".join(text.split())).replace("<", "&lt;")

    parts = ["# Bad and odd inputs", "",
             "What happens to input that is broken, odd or hostile. *Refused*: one line that names the file or "
             "parameter, exit code 2, nothing written and nothing changed; in Python an `InputError`. *Handled*: used "
             "as the table says.", "",
             "`tests/test_bad_inputs.py` makes and tries every row on the command line, in Python and, where a "
             "notebook takes such a thing, in the notebooks of experiments. `tests/bad_inputs.py` is the source of "
            "this page.",
             "",
             "Our CSV files hold text as it is: a file with the name `=1+1` has that name in `scores.csv`, as pandas "
             "writes it and reads it back. Open a table of names that you do not trust in a spreadsheet by its import "
             "dialogue, with the columns as text.", ""]
    for section, entries in CORPUS.items():
        parts += [f"## {section}", "", "| input | outcome | why |", "|---|---|---|"]
        parts += [f"| {cell(entry.name)} | {entry.outcome} | {cell(entry.why)} |" for entry in entries] + [""]
    return "\n".join(parts)


if __name__ == "__main__":
    (REPOSITORY / "nbs/bad_inputs.md").write_text(corpus_table(), encoding="utf-8")
