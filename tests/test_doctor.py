"""adiff doctor: what is broken is a finding with a meaning and a remedy, never a traceback; the network is not
touched."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adiff.lab import doctor
from adiff.lab.doctor import Finding, _checks, _disk, _gpus, examine, findings_record, findings_text, works

REPORT = """
import json
import sys
from adiff.lab import doctor
for name in sys.argv[2:]: del doctor._checks[name]
print(json.dumps(doctor.findings_record(doctor.examine(sys.argv[1]))))
"""


def report(out, *packages, without=(), **environment):
    """Whether adiff works and {what: finding}, as a new process finds them, with the folder `packages` before all
    others."""
    path = os.pathsep.join([*map(str, packages), *filter(None, sys.path)])
    result = subprocess.run([sys.executable, "-c", REPORT, str(out), *without], capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": path, **environment})
    assert result.returncode == 0 and result.stderr == "", result.stderr
    answer = json.loads(result.stdout)
    assert answer["works"] == all(one["state"] != "error" for one in answer["findings"])
    return answer["works"], {one["what"]: one for one in answer["findings"]}


def package(folder, name, code, version="0.1"):
    "A package whose import runs `code`, installed as far as metadata can tell."
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    (folder / f"{name}-{version}.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(metadata)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    weights = tmp_path_factory.mktemp("weights")
    (weights / "taesd").mkdir()
    proxy = "http://127.0.0.1:9"  # nobody listens there: whatever asks the network fails
    return report(tmp_path_factory.mktemp("out") / "not" / "yet", ADIFF_WEIGHTS=str(weights),
                  HF_HOME=str(weights / "cache"),
                  HTTPS_PROXY=proxy, HTTP_PROXY=proxy, OMP_NUM_THREADS="64")


@pytest.mark.slow
def test_a_healthy_machine(healthy, repository):
    works, found = healthy
    assert works, [one for one in found.values() if one["state"] == "error"]
    for name in ("torch", "diffusers", "torchaudio", "soundfile", "adiff", "memory", "feature weights",
                 "jupyter kernel"):
        assert found[name]["state"] == "ok", found[name]
    assert found["codec taesd"]["state"] == "ok" and found["codec taef2"]["state"] == "missing"
    assert "hub" in found["codec taef2"]["detail"] and "ADIFF_WEIGHTS" in found["codec taef2"]["remedy"]
    assert found["cores"]["state"] == "warning" and "OMP_NUM_THREADS=64" in found["cores"]["detail"]
    for path in (repository / "nbs/experiments/matrices").glob("*.yaml"):
        assert path.stem in found["matrices"]["detail"]
    assert not (Path(found["output folder"]["detail"].split(":")[0]) / "not").exists()


@pytest.mark.slow
def test_every_finding_that_is_not_well_says_what_it_means_and_what_to_do(healthy):
    for one in healthy[1].values():
        assert "\n" not in one["detail"] and one["state"] in ("ok", "missing", "warning", "error")
        assert one["state"] == "ok" or (one["meaning"] and one["remedy"]), one
    assert all(state in ("missing", "warning", "error") and meaning and remedy for _, state, meaning,
               remedy in _checks.values())


@pytest.mark.slow
def test_broken_packages_are_findings(tmp_path):
    """torchvision raises, and diffusers with it; torchaudio misses a library that is not CUDA's; psutil takes its
    process with it."""
    package(tmp_path, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist\\nand more')")
    package(tmp_path, "torchaudio", "raise OSError('libgone.so: cannot open shared object file')")
    package(tmp_path, "psutil", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", version="5.0")
    works, found = report(tmp_path, tmp_path,
                          without=("adiff", "cores", "GPU", "weights", "feature weights", "jupyter kernel", "matrices"))
    assert not works
    assert found["torchvision"]["state"] == "warning" and "uninstall torchvision" in found["torchvision"]["remedy"]
    assert found["diffusers"]["state"] == "error" and "torchvision::nms" in found["diffusers"]["detail"]
    assert found["torchaudio"]["state"] == "error" and "libgone.so" in found["torchaudio"]["detail"]
    assert found["memory"]["state"] == "warning" and "SIGSEGV" in found["memory"]["detail"]
    assert found["output folder"]["state"] == found["packages"]["state"] == "ok"  # what comes later is still looked at


def test_extras(tmp_path, monkeypatch):
    "What of an extra is missing is one finding, which says how to install it; no command of the core is concerned."
    asked = {None: ["torch"], "lab": ["papermill", "psutil", "pyarrow"], "export": ["onnx"]}
    monkeypatch.setattr(doctor, "_requirements", lambda: asked)
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name in ("papermill", "psutil") else "1.0")
    found = {finding.what: finding for finding in doctor._extras(tmp_path) + doctor._memory(tmp_path)}
    assert found["adiff[lab]"].state == "missing" and found["adiff[lab]"].detail == "not installed: papermill, psutil"
    assert "reproduce" in found["adiff[lab]"].meaning and found["adiff[lab]"].remedy == "pip install 'adiff[lab]'"
    assert found["memory"].state == "missing" and found["adiff[export]"].state == "ok" and works(found.values())


def test_another_version_than_tested(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_installed", lambda name: "5.0")
    found = {finding.what: finding for finding in doctor._packages(tmp_path)}
    assert found["torch"].state == "warning" and found["torch"].detail.startswith("5.0, tested with")


def test_a_check_that_never_ends_is_given_up(tmp_path, monkeypatch):
    package(tmp_path, "torch", "import time; time.sleep(60)")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in set(_checks) - {"torch", "python"}:
        monkeypatch.delitem(_checks, name)
    findings = {finding.what: finding for finding in examine(tmp_path, seconds=3)}
    assert findings["torch"].state == "error" and "no answer in 3 s" in findings["torch"].detail
    assert findings["python"].state == "ok"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_to():
    finding = _disk("output folder", "/proc/self/task/runs")
    assert finding.state == "error" and "cannot write" in finding.detail and finding.remedy


def test_a_gpu_that_torch_cannot_use_and_one_that_it_can(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H100, 570.1, 81559 MiB'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding, = _gpus(tmp_path)
    assert finding.state == "warning" and "NVIDIA H100" in finding.detail and "pytorch.org" in finding.remedy
    for name, answer in {"is_available": True, "device_count": 1, "mem_get_info": (40e9, 80e9),
                         "get_device_name": "NVIDIA H100",
                         "get_device_capability": (9, 0)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    finding, = _gpus(tmp_path)
    assert finding.state == "ok" and finding.detail == "NVIDIA H100, 40 GB free of 80 GB, driver 570.1, bfloat16"


def test_text_and_json_say_the_same():
    findings = [Finding("torch", "ok", "2.0"), Finding("GPU", "missing", "none", "slow", "wait"),
                Finding("disk", "error", "full", "no runs", "make room")]
    text = findings_text(findings)
    assert not works(findings) and works(findings[:2])
    assert "cannot work" in text and "1 error" in text and "means: no runs" in text and "to do: make room" in text
    assert "can work" in findings_text(findings[:2]) and findings_record(findings[:2])["works"]
    assert [one["what"] for one in findings_record(findings)["findings"]] == ["torch", "GPU", "disk"]
