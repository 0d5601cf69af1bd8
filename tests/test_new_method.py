"""A method of the user's own: registered, trained, evaluated, and its parts loaded where their module is known and only there."""
import subprocess
import sys

import pytest

from adiff import AnomalyDetector, InputError, evaluate, fit
from adiff.methods.deco_diff import DECO_DIFF_PRESETS, DeCoDiffConfig, build_deco_diff
from adiff.data.demo_images import make_demo_data
from adiff.methods.registry import METHODS, Method

# a subclass need not import diffusers' base classes
PART = """
from adiff.diffusion.masked import MaskedForwardProcess


class OwnForwardProcess(MaskedForwardProcess):
    pass
"""
LOAD = """
import sys
from adiff import AnomalyDetector, InputError
try: AnomalyDetector.from_pretrained(sys.argv[1])
except InputError as error: print(error)
import process_share
print(type(AnomalyDetector.from_pretrained(sys.argv[1]).forward_process).__name__)
"""


def test_own_method_from_data_to_a_fresh_process(tmp_path, monkeypatch):
    (tmp_path / "process_share.py").write_text(PART)
    monkeypatch.syspath_prepend(str(tmp_path))
    from process_share import OwnForwardProcess

    def build(config, categories, processor):
        detector = build_deco_diff(config, categories, processor)
        detector.register_modules(forward_process=OwnForwardProcess(patch_sizes=(2,), patch_probabilities=(1.0,)))
        return detector

    monkeypatch.setitem(METHODS, "own", Method(DeCoDiffConfig, build, DECO_DIFF_PRESETS, conditional=True))
    data = make_demo_data(tmp_path / "demo", categories=("cup",), train=8, good=3, per_defect=1)
    overrides = {"length": 2, "batch_size": 4, "augmentations": [], "image_size": 32, "wavelet_levels": 1}
    fit("own", data, tmp_path / "run", device="cpu", overrides=overrides)
    assert evaluate(tmp_path / "run", device="cpu")["method"] == "own"

    model = tmp_path / "run" / "model"
    elsewhere = subprocess.run([sys.executable, "-c", LOAD, model], cwd=tmp_path, capture_output=True, text=True)
    refused, opened = elsewhere.stdout.splitlines() or [elsewhere.stderr, ""]
    assert "'process_share', which is not imported" in refused and opened == "OwnForwardProcess"

    monkeypatch.delattr(sys.modules["process_share"], "OwnForwardProcess")
    with pytest.raises(InputError, match="no part 'OwnForwardProcess'"):
        AnomalyDetector.from_pretrained(model)
