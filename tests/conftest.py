"""Fixtures for every test: where the development data is, and the repository; which tests go to one worker."""
import os
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for what the tests start: the same digits on every machine
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].split(",")[0]))
# as in the background of a script, where no child would hear Ctrl-C
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def repository():
    return REPOSITORY


@pytest.fixture(scope="session")
def shared():
    "The folder with real data, golden values and weights: ADIFF_SHARED, or `shared` beside the repository."
    folder = Path(os.environ.get("ADIFF_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"needs the development data: set ADIFF_SHARED to its folder (looked at {folder.name}/data)")
    return folder


@pytest.fixture(scope="module")
def one_thread():
    "Small tensors: several threads would only wait for one another."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def urban_tree():
    "A function that writes a tiny tree like UrbanSound8K's: two classes, training folds 1 and 2, test fold 10."
    def write(root):
        rows, generator = [], np.random.default_rng(0)
        for number, (fold, name, class_id) in enumerate((f, n, c) for f in (1, 2, 10) for n,
                                                        c in (("dog_bark", 3), ("siren", 8)) for _ in range(4)):
            file = f"{1000 + number}-{class_id}-0-0.wav"
            rows.append((file, 1000 + number, 0, 1.5, 1, fold, class_id, name))
            path = root / f"audio/fold{fold}" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            tone = np.sin(np.arange(24000) / (50 if class_id == 3 else 9))
            soundfile.write(path, generator.normal(0, 0.1, 24000) * tone, 16000)
        (root / "metadata").mkdir()
        columns = ["slice_file_name", "fsID", "start", "end", "salience", "fold", "classID", "class"]
        pd.DataFrame(rows, columns=columns).to_csv(root / "metadata/UrbanSound8K.csv", index=False)
        return root
    return write
