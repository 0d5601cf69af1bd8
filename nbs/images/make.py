"""Makes the strip of pictures at the top of the README from two evaluated runs:

    adiff demo --out runs/demo
    adiff fit deco runs/demo/demo --out runs/cup && adiff evaluate runs/cup
    adiff fit adiff runs/demo/sounds --out runs/pump && adiff evaluate runs/pump
    python nbs/images/make.py runs/cup cup missing_part runs/pump pump rattle

Each example shows what the detector saw, what it thinks a normal one would look like, and its anomaly map.
"""
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

COLUMNS = {"input": "picture", "reconstruction": "reconstruction", "anomaly map": "map"}


def example(run, category, defect):
    "The first example of a defect in a run folder: {name of the array: its row}."
    arrays = np.load(Path(run) / "examples" / f"{category}.npz")
    index = list(arrays["defect"]).index(defect)
    return {name: arrays[name][index] for name in arrays}


def strip(examples):
    "A figure with three pictures for each of the `examples`, side by side."
    figure, axes = plt.subplots(1, 3 * len(examples), figsize=(4.4 * len(examples), 1.7), layout="constrained")
    for axis, (one, name) in zip(axes, [(one, name) for one in examples for name in COLUMNS], strict=True):
        options = {"cmap": "inferno", "vmin": 0} if name == "anomaly map" else {}  # up to its largest value
        axis.imshow(one[COLUMNS[name]], **options)
        if name == "anomaly map" and one["mask"].any():
            axis.contour(one["mask"], levels=[0.5], colors="cyan", linewidths=0.8)
        kind = "an image" if one["mask"].any() else "a sound"  # only images have masks
        axis.set_title(kind if name == "input" else name, fontsize=9)
        axis.set_axis_off()
    return figure


if __name__ == "__main__":
    asked = [sys.argv[start:start + 3] for start in range(1, len(sys.argv), 3)]
    if not asked or len(asked[-1]) < 3:
        sys.exit(__doc__)
    out = Path(__file__).with_name("strip.png")
    strip([example(*three) for three in asked]).savefig(out, dpi=100)
    Image.open(out).convert("RGB").quantize(224, kmeans=2).save(out, optimize=True)
    print(f"{out.name}: {out.stat().st_size / 1000:.0f} kB")
