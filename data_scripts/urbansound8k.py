"""Fetches UrbanSound8K (10 folds, 5.6 GiB): python data_scripts/urbansound8k.py --out data/urbansound8k"""
import csv
import sys
from collections import Counter

from common import Dataset, count_problem, main

CLIPS = 8732
FOLDS = range(1, 11)
SOUNDS = (".wav", ".flac", ".ogg")  # whoever converted the clips keeps a complete dataset


def problems(folder):
    "What `folder` lacks of metadata/UrbanSound8K.csv and of the clips that it names in audio/fold1 to fold10."
    table = "metadata/UrbanSound8K.csv"
    try:
        with open(folder / table, newline="", encoding="utf-8") as file:
            rows = [(row["slice_file_name"].rpartition(".")[0], int(row["fold"])) for row in csv.DictReader(file)]
    except FileNotFoundError:
        return [f"{table}: missing"]
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error):
        return [f"{table}: not the official table (columns slice_file_name, fold)"]
    lines = count_problem(folder, table, len(rows), CLIPS, "rows")
    named = Counter(fold for _, fold in rows)
    for fold in FOLDS:
        name = f"audio/fold{fold}"
        present = {path.stem for path in (folder / name).glob("*") if path.suffix.lower() in SOUNDS}
        found = sum(clip in present for clip, where in rows if where == fold)
        lines += count_problem(folder, name, found, named[fold], "clips")
    return lines


DATASET = Dataset(
    name="UrbanSound8K",
    page="https://zenodo.org/records/1203745",
    url="https://zenodo.org/records/1203745/files/UrbanSound8K.tar.gz?download=1",
    archive="UrbanSound8K.tar.gz",
    folder="data/urbansound8k",
    licence="CC BY-NC (3.0 in the archive, 4.0 on its page; no commercial use)",
    md5="9aa69802bbf37fb986f71ec1483a196e",  # all that Zenodo publishes
    top_folder="UrbanSound8K",
    problems=problems,
    most_files=20_000,
    most_bytes=20 * 10**9,
)

if __name__ == "__main__":
    sys.exit(main(DATASET))
