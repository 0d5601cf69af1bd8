"""The benchmark: the package agrees with plain maths, a short run writes complete files, and wrong checkouts are
refused in one line."""
import json
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from benchmark_reference import plain_correction, plain_maps, plain_network
from click.testing import CliRunner

from adiff import InputError
from adiff.diffusion.deviation_correction import DeviationCorrection
from adiff.lab import benchmark
from adiff.lab.benchmark import (Settings, blob_maps, contestants, differences, load_official, loop_aupro, measure,
                                 measure_training, quartiles,
                                 ratios, record, run_benchmark, work)
from adiff.runs.command_line import main
from adiff.scores.deviation import DeviationDiscrepancy
from adiff.scores.metrics import aupro, official_aupro

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
quick = Settings(torch.device("cpu"), seconds=0.0, rounds=1)
LABELS = torch.tensor([0, 3])


@pytest.fixture(scope="module")
def made():
    return contestants("nano")


def contest(made):
    "All contestants make the same corrections and maps as ours, of two images."
    corrected, maps = (work(part, made["ours"], 2)() for part in ("correction", "detection"))
    z = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    assert (z - corrected).abs().mean() > 0.05 and maps.std() > 1e-4  # not zero against zero
    for name, one in made.items():
        assert torch.allclose(work("correction", one, 2)(), corrected, atol=1e-4), name
        assert torch.allclose(work("detection", one, 2)(), maps, atol=1e-3), name


def test_the_contestants_agree(made):
    assert set(made) == {"ours", "plain"}
    contest(made)


def test_plain_maths_is_ours(made):
    network, z = made["plain"].network, torch.randn(2, 4, 16, 16)
    answer = plain_network(network)
    with torch.no_grad():
        found = network(z, torch.tensor([4, 4]), LABELS).sample
        assert found.abs().max() > 0.1 and torch.allclose(found, answer(z, torch.tensor([4, 4]), LABELS), atol=1e-5)
        corrected = DeviationCorrection().correct(z, lambda z, t: network(z, torch.full((len(z),), t), LABELS).sample)
    assert torch.allclose(corrected, plain_correction(answer, z, LABELS), atol=1e-4)
    images, repaired = torch.rand(2, 2, 3, 256, 256)
    expected = DeviationDiscrepancy(latent_cap=2.0)(z, corrected, images, repaired, 128)
    for name, one in plain_maps(z, corrected, images, repaired, 128, latent_cap=2.0).items():
        assert np.abs(expected[name].numpy() - one).max() < 1e-3, name


def test_the_loop_for_aupro_is_ours():
    masks, maps = blob_maps(8, 64, seed=3)
    assert abs(loop_aupro(masks, maps) - official_aupro(masks, maps)) < 1e-6
    assert abs(loop_aupro(masks, maps) - aupro(masks, maps)) < 0.01


def test_ratios_do_not_depend_on_drift():
    now = [0.0]

    def work(cost):
        now[0] += cost * (1 + now[0] / 50)

    times = measure({"ours": lambda: work(1.0), "plain": lambda: work(2.0)}, seconds=100, clock=lambda: now[0])
    assert times["ours"][-1] > 1.5 * times["ours"][0] and abs(ratios(times)["plain"]["median"] - 2) < 0.1
    assert quartiles([1, 2, 3]) == {"median": 2, "q1": 1.5, "q3": 2.5}


def test_no_time_without_equal_outputs():
    with pytest.raises(InputError, match="official.*differ.*no time"):
        differences({"ours": torch.zeros(2), "official": torch.full((2,), torch.nan)}, {"official": 1e-4}, "outputs")
    made = contestants("nano")
    with torch.no_grad():
        made["plain"].network.unet.conv_out.bias += 0.01
    with pytest.raises(InputError, match="correction of plain and ours differ"):
        record(quick, "correction", {name: work("correction", one, 1) for name, one in made.items()}, 1)


def test_wrong_checkouts(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="git clone"):
            load_official(folder)
    (tmp_path / "diffusion").mkdir()
    (tmp_path / "models.py").write_text("UNet_models = {}")
    with pytest.raises(InputError, match="no checkout"):
        load_official(tmp_path)
    late = "def late(**_):\n    import another_package_nobody_has\n\n\nUNET_models = {'UNet_XS': late}"
    (tmp_path / "models.py").write_text(late)
    (tmp_path / "diffusion/__init__.py").write_text("def create_diffusion(*_, **__):\n    return None")
    with pytest.raises(InputError, match="pip install another_package_nobody_has"):
        load_official(tmp_path).network("XS")
    (tmp_path / "models.py").write_text("import a_package_nobody_has")
    result = CliRunner().invoke(main, ["benchmark", "--official", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "pip install a_package_nobody_has" in result.output
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(main, ["benchmark", "--sizes", "tiny", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "nano" in result.output


def test_a_short_benchmark_is_complete(tmp_path, monkeypatch):
    monkeypatch.delitem(benchmark.STARTS, "import adiff.runs.evaluate")  # seconds each time, and nothing new
    result = run_benchmark(tmp_path, "cpu", ["nano"], [1, 2], seconds=0.0, rounds=1, training_batch_size=2, maps=4)
    assert result == json.loads((tmp_path / "benchmark.json").read_text())
    parts = [one["part"] for one in result["measurements"]]
    assert parts == ["AUPRO", "pixel metrics", "detection", "detection", "correction", "training step"]
    for one in result["measurements"]:
        ours, plain = one["contestants"]["ours"], one["contestants"]["plain"]
        assert ours["seconds"]["median"] > 0 and plain["ratio"]["median"] > 0 and plain["difference"] <= plain["limit"]
    memory = [one["contestants"][name]["peak_mb"] for one in result["measurements"] for name in ("ours", "plain")
              if one["part"] == "training step"]
    assert len(memory) == 2 and min(memory) > 100
    assert result["starts"]["adiff --help"]["median"] > 0 and result["training"]["seconds"] is None
    assert result["machine"]["cpu"] and result["versions"]["torch"]
    table = pd.read_csv(tmp_path / "benchmark.csv")
    assert set(table.contestant) >= {"ours", "plain"} and table.seconds_median.notna().sum() == len(table) - 1
    assert (tmp_path / "benchmark.png").stat().st_size < 120_000


def test_notebook_has_the_parameters(repository):
    known = papermill.inspect_notebook(repository / "nbs/experiments/benchmark.ipynb")
    assert {"out_dir", "device", "sizes", "batch_sizes", "official", "seconds", "rounds", "minutes"} == set(known)
    assert all(one["help"] for one in known.values())


def test_official_code_is_ours():
    folder = os.environ.get("ADIFF_OFFICIAL")
    if not folder:
        pytest.skip("needs a checkout of the official code: set ADIFF_OFFICIAL to its folder")
    code = load_official(folder)
    made = contestants("XS", official=code)
    assert set(made) == {"ours", "plain", "official"}
    contest(made)
    theirs = measure_training(replace(quick, official=code), "XS", 2)["contestants"]["official"]
    assert theirs["difference"] < 1e-4 and np.isfinite(theirs["ratio"]["median"])
