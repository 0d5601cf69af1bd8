"""What goes wrong in the middle: kills, signals, full and read-only disks, files that vanish, damaged bits.

Real processes and real signals. To save the seconds of their imports, they are forked from a server that has imported
everything (processes.py). `ADIFF_FAULTS=long` kills more often, and a matrix of several methods.
"""
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import processes
import psutil
import pytest
import torch

from adiff import AnomalyDetector
from adiff.core import InputError, StopRequest, atomic_folder, atomic_path, remove_leftovers, signals_to
from adiff.data.demo_images import make_demo_data
from adiff.runs.fit import check_same_run
from adiff.lab.matrix import matrices_folder
from adiff.training.checkpoints import CHECKPOINT_PARTS, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.slow

LONG = os.environ.get("ADIFF_FAULTS") == "long"
SMALL = {"codec": {"levels": 2},
         "network": {"channel_multipliers": [1], "attention_levels": [], "wavelet_sampling": False, "dropout": 0.1},
         "correction": {"num_seeds": 1, "num_inference_steps": 1},
         "discrepancy": {"kind": "semantic", "scales": [1], "semantic_weight": 0.0},
         "data": {"image_size": 32},
         "training": {"length": 40, "batch_size": 4, "gradient_accumulation_steps": 1, "checkpoint_every": 5,
                      "validate_every": 15, "ema_decay": 0.9, "augmentations": ["translate"]}}
TIMES = ("train_seconds", "seconds_per_image", "peak_memory_mb")


# ---- processes

@pytest.fixture(scope="module")
def start(tmp_path_factory):
    "Starts `adiff ARGUMENTS` as a process; its attribute `said` is the file with its output."
    folder, started = tmp_path_factory.mktemp("said"), []

    def start(*arguments, clock=None):
        said = folder / f"{len(started)}.txt"
        child = processes.start(processes.adiff_command, [str(argument) for argument in arguments], clock, out=said)
        child.said = said
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.join()


@pytest.fixture(scope="module")
def finish(start):
    "Runs `adiff ARGUMENTS` to its end, which must have this exit code; returns what it said."
    def finish(*arguments, code=0, **options):
        return ended(start(*arguments, **options), code)
    return finish


def ended(child, code):
    "Waits for `child`; returns what it has said."
    child.join(600)
    text = child.said.read_text(errors="replace")
    assert child.exitcode == code, text
    assert "Traceback" not in text, text
    return text


def work(child, enough=float("inf")):
    """Waits until `child` and its children have computed for `enough` seconds, then kills it; or until it has ended.

    Returns the seconds that were computed and whether it was killed. Seconds of the processor, not of the clock: they
    mean the same moment on a busy machine.
    """
    spent = {}
    while child.is_alive() and sum(spent.values()) < enough:
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in (whole := psutil.Process(child.pid), *whole.children(recursive=True)):
                spent[one.pid] = sum(one.cpu_times()[:2])
        time.sleep(0.01)
    killed = child.is_alive()
    child.kill()
    child.join()
    return sum(spent.values()), killed and child.exitcode == -signal.SIGKILL


def line(text):
    "The one line in which a command says what is wrong."
    [found] = [one for one in text.splitlines() if one.startswith("adiff: ")]
    return found


def until(there, child=None, seconds=600):
    "Waits until `there()`, while `child` runs."
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline and (child is None or child.is_alive()), child and child.said.read_text()
        time.sleep(0.005)


# ---- runs

def assignments(overrides):
    "Nested overrides as options of the command line."
    return [option for name, section in overrides.items() for option in ("-o", f"{name}={json.dumps(section)}")]


def fit_command(data, out, method="adiff", **training):
    return ["fit", method, data, "--out", out, "--categories", "brick", "--device", "cpu",
            *assignments({**SMALL, "training": {**SMALL["training"], **training}})]


def files_of(folder):
    files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def tensors(value, name=""):
    "All leaves of nested dicts and lists, by their name."
    if isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: one for part, inside in pairs for key, one in tensors(inside, f"{name}/{part}").items()}
    return {name: value}


def results(run):
    "Everything of a run that must be alike, bit by bit: all but times and memory."
    run = Path(run)
    checkpoint = tensors(load_checkpoint(run / "checkpoints"))
    found = {f"checkpoint{name}": value.numpy().tobytes() if isinstance(value, torch.Tensor) else value
             for name, value in checkpoint.items() if not name.endswith("/seconds")}
    found.update({f"model/{name}": content for name, content in files_of(run / "model").items()})
    log = [json.loads(text) for text in (run / "log.jsonl").read_text().splitlines()]
    found["log"] = [{key: value for key, value in one.items() if key != "seconds"} for one in log]
    assert [one["seconds"] for one in log] == sorted(one["seconds"] for one in log)
    if (run / "metrics.json").exists():
        metrics = json.loads((run / "metrics.json").read_text())
        assert all(metrics.pop(name) > 0 for name in TIMES)
        found.update(metrics=metrics, scores=(run / "scores.csv").read_bytes())
    return found


def same(run, reference):
    "Whether a run is bit-equal to `reference`, also what a run has that was not evaluated; says what differs."
    found = results(run)
    different = [name for name in found if found[name] != reference[name]]
    different += [name for name in reference if name not in found and name not in ("metrics", "scores")]
    print("different:", different[:5]) if different else None
    return not different


def tidy(folder):
    "Whether a killed process has left nothing in `folder`."
    left = (".evaluating", ".latents", ".lock", ".run")
    return not [path for path in Path(folder).rglob(".*") if ".tmp-" in path.name or path.name in left]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "images"
    return make_demo_data(folder, categories=("brick",), train=10, good=3, per_defect=1)


@pytest.fixture(scope="module")
def whole(data, start, tmp_path_factory):
    "A run that nobody interrupted, evaluated; how many seconds it computed, and its results."
    out = tmp_path_factory.mktemp("faults") / "whole"
    child = start(*fit_command(data, out), "--each")
    seconds, _ = work(child)
    ended(child, 0)
    return out, seconds, results(out)


# ---- kills

def test_killed_at_random_moments(data, whole, start, tmp_path, record_property):
    "SIGKILL, then the same command with --resume, until it ends: the end is bit-equal to never having been killed."
    wanted, generator, kills, ends, equal = 20 if LONG else 4, random.Random(0), 0, 0, 0
    while kills < wanted:
        out, resume = tmp_path / str(ends), []
        for attempt in range(6):
            child = start(*fit_command(data, out), "--each", *resume)
            enough = generator.uniform(0, 1) * whole[1] if kills < wanted and attempt < 5 else float("inf")
            _, killed = work(child, enough)
            if not killed:
                ended(child, 0)  # so the kills before it were survived
                break
            kills, resume = kills + 1, ["--resume"]
        ends, equal = ends + 1, equal + (same(out, whole[2]) and tidy(out))
    record_property("training", {"kills survived": kills, "resumed runs": ends, "bit-equal": equal})
    print(f"\ntraining and evaluation: {kills} of {kills} kills survived, {equal} of {ends} runs bit-equal")
    assert equal == ends


def write_matrix(folder, methods):
    training = {"batch_size": 4, "checkpoint_every": 5, "length": 8}
    small = {"codec": SMALL["codec"], "data": SMALL["data"], "training": training}
    overrides = {method: json.dumps(SMALL if method == "adiff" else small) for method in methods}
    made = "{make: demo_images, options: {categories: [brick], train: 10, good: 3, per_defect: 1}}"
    groups = "".join(f"  {method}:\n    notebook: {matrices_folder().parent / 'method.ipynb'}\n    parameters: "
                     f"{{data_root: images, method: {method}, overrides: {overrides[method]}}}\n" for method in methods)
    (folder / "small.yaml").write_text(f"description: small\ndatasets:\n  images: {made}\ngroups:\n{groups}")
    return folder / "small.yaml"


def test_a_matrix_is_stopped_and_killed(whole, start, finish, tmp_path, record_property):
    "SIGTERM in a training, SIGKILL at random moments, and the same command again: every run ends as alone."
    methods, kills, wanted = ["adiff", "deco"] if LONG else ["adiff"], 0, 10 if LONG else 1
    generator = random.Random(1)
    out, alone = tmp_path / "out", {"adiff": whole[2]}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # a thread each
    command = ["reproduce", write_matrix(tmp_path, methods), "--out", out, "--device", "cpu", "--jobs", cores]
    child = start(*command)
    until(lambda: list(out.glob("runs/adiff*/checkpoints/step_*.pt")), child)
    os.kill(child.pid, signal.SIGTERM)
    assert "adiff: stopped; the same command goes on" in ended(child, 143)
    assert not list(out.glob("runs/*/failed.json")) and "interrupted" in finish(*command, "--dry-run")
    while kills < wanted:
        child = start(*command)
        _, killed = work(child, generator.uniform(1, 30 if LONG else 12))
        if killed:
            kills += 1
        else:
            ended(child, 0)
            shutil.rmtree(out)
    finish(*command)
    for method in set(methods) - set(alone):
        overrides = json.loads(next(out.glob(f"runs/{method}*/config.json")).read_text())["overrides"]
        finish("fit", method, out / "data/images", "--out", tmp_path / method, "--device", "cpu", "--each",
               *assignments(overrides))
        alone[method] = results(tmp_path / method)
    equal = sum(same(next(out.glob(f"runs/{method}*")), alone[method]) for method in methods)
    record_property("matrix", {"kills survived": kills, "runs": len(methods), "bit-equal": equal})
    print(f"\nmatrix: {kills} of {kills} kills and a SIGTERM survived, {equal} of {len(methods)} runs bit-equal")
    assert equal == len(methods) and tidy(out) and (out / "site/index.html").exists()


def test_a_conversion_is_killed(shared, finish, start, tmp_path):
    "The folder is whole or not there; the next command clears up and succeeds."
    checkpoint, generator = shared / "golden/official_deco/official_layout.pt", random.Random(2)
    command = ["convert-official", checkpoint, tmp_path / "model", "--network-only"]
    child = start(*command)
    seconds, _ = work(child)
    ended(child, 0)
    whole_model = files_of(tmp_path / "model")
    for _ in range(10 if LONG else 3):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        work(start(*command), generator.uniform(0.3, 1) * seconds)
        assert not (tmp_path / "model").exists() or files_of(tmp_path / "model") == whole_model
    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:  # certainly in the middle: what such a kill leaves
        patch.setattr("adiff.core._discard", lambda folder, lock: lock.release())
        with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "model"):
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir())
    finish(*command)
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and files_of(tmp_path / "model") == whole_model


def test_leftovers_of_the_living_stay(tmp_path):
    with atomic_path(tmp_path / "scores.csv") as path, atomic_folder(tmp_path / "model") as folder:
        remove_leftovers(tmp_path)
        assert path.exists() and folder.exists()
    (tmp_path / ".hidden").write_text("not ours")
    (tmp_path / ".scores.csv.tmp-abcdefgh").mkdir()
    (tmp_path / ".scores.csv.tmp-abcdefgh/scores.csv").write_text("of a killed process")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/.model.tmp-abcdefgh").mkdir()
    remove_leftovers(tmp_path, skip="runs")
    assert {path.name for path in tmp_path.iterdir()} == {"scores.csv", "model", ".hidden", "runs"}
    assert list((tmp_path / "runs").iterdir())


# ---- signals

@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_with_a_checkpoint(data, whole, start, finish, tmp_path, number, code):
    out = tmp_path / "run"
    child = start(*fit_command(data, out), "--each")
    until(lambda: list(out.glob("checkpoints/step_*.pt")), child)
    os.kill(child.pid, number)
    said = line(ended(child, code))
    step = load_checkpoint(out / "checkpoints")["step"]
    assert f"stopped after update {step} of {whole[2]['log'][-1]['step']}, a checkpoint is written" in said
    assert "adiff fit adiff" in said and said.endswith("--each --resume") and not (out / "model").exists()
    finish(*fit_command(data, out), "--each", "--resume")
    assert same(out, whole[2]) and tidy(out)


def test_a_second_ctrl_c_does_not_wait():
    stop, before = StopRequest(), signal.signal(signal.SIGINT, signal.default_int_handler)
    with signals_to(stop):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.number == signal.SIGTERM and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGINT, before)


# ---- damaged checkpoints

def flipped(content, at, bit):
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1:]


DAMAGES = {
    "emptied": lambda content: b"",
    "cut": lambda content: content[:len(content) // 2],
    "cut by a byte": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "foreign": lambda content: b"not a checkpoint at all" * 100,
    **{f"bit {seed}": lambda content, seed=seed: flipped(content, random.Random(seed).randrange(len(content)), seed % 8)
       for seed in range(200)},
}


def test_every_damage_is_noticed(tmp_path, caplog):
    parts = {**dict.fromkeys(CHECKPOINT_PARTS - {"step"}), "network": {"weight": torch.randn(50)}}
    for step in (1, 2):
        save_checkpoint(tmp_path, step, **parts)
    newest = tmp_path / "step_00000002.pt"
    content, noticed = newest.read_bytes(), 0
    for damage in DAMAGES.values():
        newest.write_bytes(damage(content))
        caplog.clear()
        noticed += load_checkpoint(tmp_path)["step"] == 1 and str(newest) in caplog.text
        (tmp_path / "step_00000002.pt.damaged").unlink()
    print(f"\n{noticed} of {len(DAMAGES)} damages noticed")
    assert noticed == len(DAMAGES)
    save_checkpoint(tmp_path, 3, **{name: part for name, part in parts.items() if name != "optimizer"})
    assert load_checkpoint(tmp_path)["step"] == 1 and "lacks optimizer" in caplog.text
    (tmp_path / "step_00000001.pt").write_bytes(b"")
    with pytest.raises(InputError, match="all 1 checkpoints are damaged.*put a good copy back, or remove the folder"):
        load_checkpoint(tmp_path)
    (tmp_path / "step_00000001.pt").unlink()
    assert load_checkpoint(tmp_path) is None


def test_a_run_goes_on_from_the_checkpoint_before(data, whole, start, finish, tmp_path):
    out = tmp_path / "run"
    child = start(*fit_command(data, out))
    until(lambda: len(list(out.glob("checkpoints/step_*.pt"))) == 2, child)
    os.kill(child.pid, signal.SIGTERM)
    ended(child, 143)
    shutil.copytree(out, tmp_path / "hopeless")
    newest = sorted(out.glob("checkpoints/step_*.pt"))[-1]
    newest.write_bytes(DAMAGES["bit 7"](newest.read_bytes()))
    said = finish(*fit_command(data, out), "--resume")
    assert f"{newest}: damaged" in said and "trying the checkpoint before it" in said and same(out, whole[2])
    for path in (tmp_path / "hopeless").glob("checkpoints/step_*.pt"):
        path.write_bytes(b"")
    said = line(finish(*fit_command(data, tmp_path / "hopeless"), "--resume", code=2))
    assert "all 2 checkpoints are damaged" in said


def test_an_older_run_goes_on_though_keys_have_come_since(whole, tmp_path):
    config = json.loads((whole[0] / "config.json").read_text())
    record = json.loads(json.dumps(config))
    del config["parameters"]["training"]["deterministic"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_same_run(tmp_path, record)
    record["parameters"]["training"]["deterministic"] = True
    with pytest.raises(InputError, match="another parameters"):
        check_same_run(tmp_path, record)


# ---- a training that diverges

def test_a_diverging_training_keeps_its_last_good_checkpoint(data, finish, tmp_path):
    options = {"warmup": 3, "unit": "steps", "checkpoint_every": 2, "gradient_clip": None}
    wild = fit_command(data, tmp_path / "run", learning_rate=1e30, **options)
    said = line(finish(*wild, code=2))
    advice = "try a lower learning_rate or gradient_clip 1.0, in another out_dir (the last checkpoint is kept here)"
    assert "at step" in said and advice in said
    checkpoints = sorted((tmp_path / "run/checkpoints").glob("*"))
    assert checkpoints and not (tmp_path / "run/model").exists()
    for path in checkpoints:
        values = tensors(torch.load(path, weights_only=True)).values()
        numbers = [one for one in values if isinstance(one, torch.Tensor)]
        assert all(one.isfinite().all() for one in numbers)
    tamer = fit_command(data, tmp_path / "run", learning_rate=1e-3, **options)
    assert "another overrides, parameters; choose another out_dir" in line(finish(*tamer, "--resume", code=2))


# ---- files that vanish or change

@pytest.mark.parametrize("fault", ["vanished", "changed"])
def test_a_training_file(data, whole, start, finish, tmp_path, fault):
    "The run ends with one line that counts and names; with the file put back as it was, it goes on and ends bit-equal."
    copy, out = tmp_path / "demo", tmp_path / "run"
    shutil.copytree(data, copy)
    victim, kept = copy / "brick/train/good/003.png", tmp_path / "kept.png"
    command = fit_command(copy, out, cache_latents=fault == "changed")
    child = start(*command)
    until(lambda: list(out.glob("checkpoints/step_*.pt")), child)
    victim.rename(kept)
    if fault == "changed":
        shutil.copy(copy / "brick/train/good/004.png", victim)
    said = line(ended(child, 2))
    assert "1 of 10 files are missing or have changed since the start, the first brick/train/good/003.png" in said
    assert "--resume" in said
    assert not (out / "model").exists() and list(out.glob("checkpoints/step_*.pt"))
    victim.unlink(missing_ok=True)
    kept.rename(victim)
    finish(*command, "--resume")
    weights = "model/network/diffusion_pytorch_model.safetensors"
    assert (out / weights).read_bytes() == whole[2][weights] and tidy(out)


def test_a_test_file_vanishes(data, whole, start, finish, tmp_path):
    copy, run = tmp_path / "demo", tmp_path / "run"
    shutil.copytree(data, copy)
    shutil.copytree(whole[0], run)
    (run / "metrics.json").unlink(), (run / "scores.csv").unlink()
    config = json.loads((run / "config.json").read_text())
    config["dataset"]["root"] = str(copy)
    (run / "config.json").write_text(json.dumps(config))
    victim = copy / "brick/test/hole/000.png"
    count = len(list((copy / "brick/test").rglob("*.png"))) + len(list((copy / "brick/ground_truth").rglob("*.png")))
    child = start("evaluate", run, "--device", "cpu")
    until((run / ".evaluating").exists, child)
    victim.rename(tmp_path / "kept.png")
    said = line(ended(child, 2))
    assert f"1 of {count} files are missing or have changed since the start, the first brick/test/hole/000.png" in said
    assert not (run / "metrics.json").exists() and not (run / "scores.csv").exists() and tidy(run)
    (tmp_path / "kept.png").rename(victim)
    finish("evaluate", run, "--device", "cpu")
    assert same(run, whole[2])


# ---- clock, disk, rights, a second process

def test_a_clock_that_runs_backwards(data, whole, finish, tmp_path):
    finish(*fit_command(data, tmp_path / "run"), "--each", clock="backwards")
    assert same(tmp_path / "run", whole[2]) and results(tmp_path / "run").keys() == whole[2].keys()


@contextlib.contextmanager
def mounted(folder, size):
    "A file system of `size` bytes at `folder`; skips where none can be mounted."
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


def test_full_disk(data, whole, finish, tmp_path):
    "The disk is full at the first checkpoint, at a later one, or for the model; with more room it goes on."
    size = max(path.stat().st_size for path in whole[0].glob("checkpoints/*"))
    with mounted(tmp_path / "disk", "1g") as remount:
        out, resume = tmp_path / "disk/run", []
        for count, room in enumerate((size // 2, size * 3 // 2, size * 5 // 2)):
            remount(f"size={room + 1_000_000}")  # a million bytes are for latents and the log
            said = line(finish(*fit_command(data, out), *resume, code=2))
            assert "no space left on device" in said and "make room" in said
            assert len(list(out.glob("checkpoints/step_*.pt"))) == count and not (out / "model").exists()
            assert not list(out.rglob(".*.tmp-*")) and (count == 0) == (load_checkpoint(out / "checkpoints") is None)
            resume = ["--resume"]
        remount("size=1g")
        finish(*fit_command(data, out), "--resume")
        assert same(out, whole[2])
        shutil.rmtree(out)
        remount("size=100k")
        detector = AnomalyDetector.from_pretrained(whole[0] / "model")
        with pytest.raises(OSError, match="No space left"), atomic_folder(tmp_path / "disk/model") as folder:
            detector.save_pretrained(folder)
        assert not list((tmp_path / "disk").iterdir())


def test_read_only_output(data, whole, finish, tmp_path):
    with mounted(tmp_path / "disk", "100m") as remount:
        shutil.copytree(whole[0], tmp_path / "disk/run")
        remount("ro")
        before = files_of(tmp_path / "disk")
        for command in (fit_command(data, tmp_path / "disk/new"),
                        [*fit_command(data, tmp_path / "disk/run"), "--resume"],
                        ["evaluate", tmp_path / "disk/run"], ["reproduce", "demo", "--out", tmp_path / "disk/out"]):
            assert "cannot write here" in line(finish(*command, code=2))
        assert files_of(tmp_path / "disk") == before


def test_two_processes_on_one_run(data, whole, start, finish, tmp_path):
    "While one trains or evaluates, here held still by SIGSTOP, others are refused; then it goes on."
    out = tmp_path / "run"
    for first, there in (([*fit_command(data, out), "--each"], "checkpoints/step_*.pt"),
                         (["evaluate", out, "--device", "cpu"], ".evaluating")):
        child = start(*first)
        until(lambda: list(out.glob(there)), child)
        os.kill(child.pid, signal.SIGSTOP)
        before = files_of(out)
        others = [start(*fit_command(data, out), "--resume"), start("evaluate", out, "--device", "cpu")]
        for other in others:
            assert "another process is writing here" in line(ended(other, 2))
        assert files_of(out) == before
        os.kill(child.pid, signal.SIGCONT)
        ended(child, 0)
        assert same(out, whole[2]) and tidy(out)


# ---- the same bits

def test_deterministic_settings(data, whole, finish, tmp_path):
    "On a CPU they change nothing; that they can be used is what is tried here."
    said = finish(*fit_command(data, tmp_path / "run", deterministic=True), "--each")
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["machine"]["deterministic"] and config["parameters"]["training"]["deterministic"], said
    weights = "network/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "run/model" / weights).read_bytes() == whole[2][f"model/{weights}"]
