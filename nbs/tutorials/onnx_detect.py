"""An exported detector on one picture, without torch: onnx_detect.py detector.onnx photo.png found.png [category]"""
import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

model, picture, out, *category = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
facts = json.loads(session.get_modelmeta().custom_metadata_map["adiff"])
if facts["processor"].get("tile") or "resize" not in facts["processor"]:
    sys.exit("this detector looks at tiles or hears sounds, which are not prepared here; use adiff detect")
if len(category or facts["categories"]) != 1 or not set(category) <= set(facts["categories"]):
    sys.exit(f"say which category the picture shows: {', '.join(facts['categories'])}")
category = (category or facts["categories"])[0]
image = ImageOps.exif_transpose(Image.open(picture))
known, deep = facts["processor"]["value_range"], image.mode[0] in "IF"  # more than 8 bits: as the training normals
low, high = known or ((0, 65535) if image.mode[0] == "I" else (0, 1))
values = np.float64(image) if deep else np.zeros(1)
if (deep < bool(known) or high > 2 and 0 < values.max() < (1.001 if known else 4096)  # floats up to 1, or 12 bits in 16
        or not np.isfinite(values).all()):
    sys.exit(f"{picture}: its values are of another kind than those that were learned; adiff detect says more")
if deep:
    image = Image.fromarray(np.rint((np.clip((values - low) / (high - low), 0, 1)) * 255).astype(np.uint8))
if image.has_transparency_data:
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
side, size = facts["processor"]["resize"], facts["processor"]["size"]  # squeezed to a square, then its centre
margin = (side - size) // 2
image = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
image = image.crop((margin, margin, margin + size, margin + size))
inputs = {"inputs": np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1,
          "class_labels": np.array([facts["categories"].index(category)])}
maps, scores = session.run(["maps", "scores"], {name: inputs[name] for name in facts["inputs"]})
calibration = (facts["calibration"] or {}).get(category)
verdict = "not calibrated" if not calibration else "anomalous" if scores[0] > calibration["threshold"] else "normal"
print(f"score {scores[0]:.6f} {verdict}")
low, high = (calibration["threshold"] / 2 if calibration else 0), facts["map_limit"] or maps.max()
heat = np.clip((maps[0] - low) / max(high - low, 1e-6), 0, 1)  # red from half the threshold on
Image.composite(Image.new("RGB", image.size, "red"), image, Image.fromarray(np.uint8(200 * heat))).save(out)
