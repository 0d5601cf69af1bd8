"""Fixtures for every test: where the development data is, and the repository."""
import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


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
