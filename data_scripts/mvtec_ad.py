"""Fetches MVTec AD (15 categories, 4.9 GiB): python data_scripts/mvtec_ad.py --out data/mvtec_ad"""
import sys

from common import Dataset, count_files, count_problem, main

# category: training images, normal test images, defective test images (each with one mask); Bergmann et al. 2021
COUNTS = {
    "bottle": (209, 20, 63), "cable": (224, 58, 92), "capsule": (219, 23, 109), "carpet": (280, 28, 89),
    "grid": (264, 21, 57), "hazelnut": (391, 40, 70), "leather": (245, 32, 92), "metal_nut": (220, 22, 93),
    "pill": (267, 26, 141), "screw": (320, 41, 119), "tile": (230, 33, 84), "toothbrush": (60, 12, 30),
    "transistor": (213, 60, 40), "wood": (247, 19, 60), "zipper": (240, 32, 119),
}


def count_below(folder):
    "Images in the defect folders of `folder`, all but good."
    if not folder.is_dir():
        return 0
    return sum(count_files(defect, {".png"}) for defect in folder.iterdir() if defect.name != "good")


def problems(folder):
    "What `folder` lacks of CATEGORY/{train/good, test/good, test/DEFECT, ground_truth/DEFECT}, a line each."
    lines = []
    for category, (train, good, defective) in COUNTS.items():
        root = folder / category
        if not root.is_dir():
            lines.append(f"{category}: missing")
            continue
        for name, found, expected, what in (
                ("train/good", count_files(root / "train/good", {".png"}), train, "images"),
                ("test/good", count_files(root / "test/good", {".png"}), good, "images"),
                ("test", count_below(root / "test"), defective, "defective images"),
                ("ground_truth", count_below(root / "ground_truth"), defective, "masks")):
            lines += count_problem(folder, f"{category}/{name}", found, expected, what)
    return lines


DATASET = Dataset(
    name="MVTec AD",
    page="https://www.mvtec.com/research-teaching/datasets/mvtec-ad",
    # MVTec's share links change from time to time.
    url="https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/download/420938113-1629960298/"
        "mvtec_anomaly_detection.tar.xz",
    archive="mvtec_anomaly_detection.tar.xz",
    folder="data/mvtec_ad",
    licence="CC BY-NC-SA 4.0 (no commercial use)",
    # MVTec publishes none; the value that anomalib checks, and that independent downloads report.
    sha256="cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d",
    problems=problems,
    most_files=20_000,
    most_bytes=20 * 10**9,
)

if __name__ == "__main__":
    sys.exit(main(DATASET))
