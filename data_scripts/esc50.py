"""Fetches ESC-50 (2000 clips, 0.6 GiB; ESC-10 is part of it): python data_scripts/esc50.py --out data/esc50"""
import csv
import sys

from common import Dataset, count_problem, main

CLIPS, PER_FOLD = 2000, 400
SOUNDS = (".wav", ".flac", ".ogg")  # whoever converted the clips keeps a complete dataset


def problems(folder):
    "What `folder` lacks of meta/esc50.csv and of the clips that it names in audio/, fold by fold."
    table = "meta/esc50.csv"
    try:
        with open(folder / table, newline="", encoding="utf-8") as file:
            names = [row["filename"].rpartition(".")[0] for row in csv.DictReader(file)]
    except FileNotFoundError:
        return [f"{table}: missing"]
    except (KeyError, AttributeError, UnicodeError, csv.Error):
        return [f"{table}: not the official table (column filename)"]
    lines = count_problem(folder, table, len(names), CLIPS, "rows")
    present = {path.stem for path in (folder / "audio").glob("*") if path.suffix.lower() in SOUNDS}
    for fold in range(1, 6):
        found = sum(name.startswith(f"{fold}-") and name in present for name in names)
        lines += [f"audio: {found} of {PER_FOLD} clips of fold {fold}"] if found != PER_FOLD else []
    return lines


DATASET = Dataset(
    name="ESC-50",
    page="https://github.com/karolpiczak/ESC-50",
    url="https://github.com/karolpiczak/ESC-50/archive/master.zip",
    archive="ESC-50-master.zip",  # GitHub packs it anew, so no hash of it is published
    folder="data/esc50",
    licence="CC BY-NC 3.0 (ESC-10: CC BY 3.0; each clip names its author in the archive's LICENSE)",
    top_folder="ESC-50-master",
    problems=problems,
    most_files=5_000,
    most_bytes=3 * 10**9,
)

if __name__ == "__main__":
    sys.exit(main(DATASET))
