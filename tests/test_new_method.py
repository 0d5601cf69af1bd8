"""A method of the user's own: registered, trained, evaluated; its part loads only where its module is known."""
import subprocess
import sys

import pytest

from adiff import AnomalyDetector, InputError, evaluate, fit
from adiff.data.demo_images import make_demo_data
from adiff.diffusion.registry import FORWARD_PROCESSES
from adiff.methods.configuration import merged
from adiff.methods.deco_diff import DECO_DIFF_PRESETS
from adiff.methods.registry import METHODS, Method

pytestmark = pytest.mark.slow

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
import own_part
print(type(AnomalyDetector.from_pretrained(sys.argv[1]).forward_process).__name__)
"""


def test_own_method_from_data_to_a_fresh_process(tmp_path, monkeypatch):
    (tmp_path / "own_part.py").write_text(PART)
    monkeypatch.syspath_prepend(str(tmp_path))
    from own_part import OwnForwardProcess

    monkeypatch.setitem(FORWARD_PROCESSES, "own", OwnForwardProcess)
    own = {"forward": {"kind": "own", "patch_sizes": [2], "patch_probabilities": [1.0]}}
    presets = {name: merged(preset, own) for name, preset in DECO_DIFF_PRESETS.items()}
    monkeypatch.setitem(METHODS, "own", Method(presets, conditional=True))
    data = make_demo_data(tmp_path / "demo", categories=("cup",), train=8, good=3, per_defect=1)
    overrides = {"codec": {"levels": 1}, "data": {"image_size": 32},
                 "training": {"length": 2, "batch_size": 4, "augmentations": []}}
    detector = fit("own", data, tmp_path / "run", device="cpu", overrides=overrides)
    assert list(detector.forward_process.config.patch_sizes) == [2]
    assert evaluate(tmp_path / "run", device="cpu")["method"] == "own"

    model = tmp_path / "run" / "model"
    elsewhere = subprocess.run([sys.executable, "-c", LOAD, model], cwd=tmp_path, capture_output=True, text=True)
    refused, opened = elsewhere.stdout.splitlines() or [elsewhere.stderr, ""]
    assert "'own_part', which is not imported" in refused and opened == "OwnForwardProcess"

    monkeypatch.delattr(sys.modules["own_part"], "OwnForwardProcess")
    with pytest.raises(InputError, match="no part 'OwnForwardProcess'"):
        AnomalyDetector.from_pretrained(model)
