"""Makes the picture of screws in docs/own_files.md from two evaluated runs:

    adiff fit knn DATA --categories screw --out runs/whole -o data.protocol=full_frame && adiff evaluate runs/whole
    adiff fit knn DATA --categories screw --out runs/tiles -o data.protocol=full_frame -o data.tile=512
    adiff evaluate runs/tiles
    python nbs/images/make_screw.py DATA runs/whole runs/tiles

Shown are the two highest and the two lowest scores of defects in the second run, and its highest normal picture.
"""
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from PIL import Image

from adiff import AnomalyDetector, read_dataset
from adiff.figures import overlay

data, *runs = map(Path, sys.argv[1:])
dataset = read_dataset(data, "screw")
test = dataset.select("test").set_index("path")
scores = {run: pd.read_csv(run / "scores.csv").set_index("path").sort_values("score") for run in runs}
last = scores[runs[-1]]
defects = last.index[last.label == 1]
shown = [*defects[:-3:-1], *defects[:2], last.index[last.label == 0][-1]]
figure, axes = plt.subplots(3, 5, figsize=(9, 5.6), layout="compressed")
for column, path in zip(axes.T, shown):
    picture, row = Image.open(dataset.root / path).convert("RGB"), test.loc[path]
    column[0].imshow(picture)
    column[0].set_title(row.defect.replace("_", " ") if row.label else "highest normal", fontsize=8)
    if row.label:
        mask = np.asarray(Image.open(dataset.root / row["mask"])) > 0
        column[0].contour(mask, levels=[0.5], colors="red", linewidths=0.8)
    for axis, (run, table) in zip(column[1:], scores.items()):
        normal, score = table.score[table.label == 0], table.score[path]
        heat = AnomalyDetector.from_pretrained(run / "model")(str(dataset.root / path)).maps[0]
        axis.imshow(overlay(picture.resize((256, 256)), heat, None, 0.6 * normal.median(), 1.3 * normal.max()))
        above = f"above {100 * (normal < score).mean():.0f} % of normals"
        axis.set_title(above if row.label else f"score {score:.1f}", fontsize=8)
for axis, name in zip(axes[:, 0], ("picture, defect", "whole", "tiles of 512")):
    axis.set_ylabel(name, fontsize=8)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
figure.savefig(Path(__file__).with_name("screw.jpg"), dpi=100, pil_kwargs={"quality": 80})
