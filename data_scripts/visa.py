"""Fetches VisA (12 categories, 1.8 GiB): python data_scripts/visa.py --out data/visa"""
import sys

from common import Dataset, count_files, count_problem, main

# normal images of each category, from the dataset's page; each has 100 anomalous images with a mask
NORMAL = {
    "candle": 1000, "capsules": 602, "cashew": 500, "chewinggum": 503, "fryum": 500, "macaroni1": 1000,
    "macaroni2": 1000, "pcb1": 1004, "pcb2": 1001, "pcb3": 1006, "pcb4": 1005, "pipe_fryum": 500,
}
ANOMALOUS = 100
IMAGES = {".jpg", ".jpeg", ".png"}


def problems(folder):
    "What `folder` lacks of split_csv/1cls.csv and CATEGORY/Data/{Images/Normal, Images/Anomaly, Masks/Anomaly}."
    lines = [] if (folder / "split_csv/1cls.csv").is_file() else ["split_csv/1cls.csv: missing"]
    for category, normal in NORMAL.items():
        if not (folder / category).is_dir():
            lines.append(f"{category}: missing")
            continue
        for name, expected in (("Images/Normal", normal), ("Images/Anomaly", ANOMALOUS), ("Masks/Anomaly", ANOMALOUS)):
            name = f"{category}/Data/{name}"
            lines += count_problem(folder, name, count_files(folder / name, IMAGES), expected, "images")
    return lines


DATASET = Dataset(
    name="VisA",
    page="https://github.com/amazon-science/spot-diff",
    url="https://amazon-visual-anomaly.s3.us-west-2.amazonaws.com/VisA_20220922.tar",
    archive="VisA_20220922.tar",
    folder="data/visa",
    licence="CC BY 4.0",
    # The page publishes none; the value that anomalib checks, and that independent downloads report.
    sha256="2eb8690c803ab37de0324772964100169ec8ba1fa3f7e94291c9ca673f40f362",
    top_folder="VisA",
    problems=problems,
    most_files=30_000,
    most_bytes=10 * 10**9,
)

if __name__ == "__main__":
    sys.exit(main(DATASET))
