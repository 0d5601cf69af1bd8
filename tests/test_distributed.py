"""Several processes train as one does. Run as a script by torchrun, this file is what two processes do side by side."""
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

import adiff.runs.evaluate
import adiff.runs.fit
from adiff import AnomalyDetector
from adiff.codecs.load import load_codec
from adiff.core import InputError, derive_seed, locked
from adiff.data.reading import read_dataset
from adiff.data.demo_images import make_demo_data
from adiff.diffusion.deviation_correction import DeviationCorrection
from adiff.diffusion.masked import MaskedForwardProcess, official_patches
from adiff.scores.deviation import DeviationDiscrepancy
from adiff.runs.evaluate import evaluate
from adiff.runs.fit import fit
from adiff.diffusion.gaussian import GaussianForwardProcess
from adiff.networks.class_token_unet import ClassTokenUNet
from adiff.training.checkpoints import load_checkpoint
from adiff.training.processes import count_processes, run_in_processes
from adiff.training.train import TrainingConfig, train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

PLAIN = dict(unit="steps", length=3, warmup=0, horizon=None, learning_rate=0.1, gradient_accumulation_steps=1,
             validate_every=2)
CASES = {  # of 9 images
    "one update": dict(length=1, batch_size=9, learning_rate=1.0),  # the weights have moved by the gradient
    "uneven batches": dict(batch_size=5),  # 5 and 4 images
    "a process without images": dict(batch_size=8),  # 8 and 1
    "accumulated, clipped, averaged": dict(batch_size=5, gradient_accumulation_steps=2, gradient_clip=0.5,
                                           ema_decay=0.9),
    "weighted by timestep": dict(batch_size=5),
}
OVERRIDES = {"codec": {"levels": 2}, "data": {"image_size": 32}, "discrepancy": {"kind": "deviation"},
             "network": {"dropout": 0.2},  # with dropout, resuming shows whether each process finds its seeds again
             "training": {"length": 20, "batch_size": 5, "checkpoint_every": 4, "learning_rate": 1e-3}}
NO_DROPOUT = {**OVERRIDES, "network": {"dropout": 0.0}, "training": {**OVERRIDES["training"], "ema_decay": 0.9}}


def small_detector(dataset, process):
    torch.manual_seed(0)
    codec = load_codec("wavelet", levels=2)
    network = ClassTokenUNet(in_channels=codec.latent_channels, num_classes=1, base_channels=32, num_heads=2,
                             class_embedding_dim=64, channel_multipliers=(1, 2), dropout=0.0)
    return AnomalyDetector(codec, process, network, DeviationCorrection(), DeviationDiscrepancy(),
                           categories=dataset.categories, image_size=32)


def train_cases(data):
    """Every case with plain gradient descent, which makes a difference of weights a difference of gradients.

    AdamW would divide small gradients by their own size. Returns per case the weights, the losses, all that was drawn,
    and the seed in force in each forward.
    """
    dataset, results = read_dataset(data, "cup"), {}
    assert len(dataset.select("train")) == 9
    sizes, probabilities = official_patches(8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", lambda parameters, lr, **others: torch.optim.SGD(parameters, lr=lr))
        for name, values in CASES.items():
            process = (GaussianForwardProcess(min_snr_gamma=5.0) if "weighted" in name
                       else MaskedForwardProcess(patch_sizes=sizes, patch_probabilities=probabilities))
            detector, drawn, seeds = small_detector(dataset, process), [], []
            sample = process.sample
            process.sample = lambda z0: drawn.append(sample(z0)) or drawn[-1]
            detector.network.register_forward_pre_hook(
                lambda network, _: seeds.append(torch.initial_seed()) if network.training else None)
            log = train(detector, dataset, TrainingConfig(**{**PLAIN, **values}), device="cpu")
            results[name] = {"weights": detector.network.state_dict(), "losses": [line["loss"] for line in log],
                             "drawn": [one.noisy for one in drawn], "seeds": seeds,
                             "calibration": detector.config.calibration}
    return results


def process_of_two():
    "What torchrun starts twice: the cases, and a whole run that nobody interrupts."
    data, folder = Path(sys.argv[1]), Path(sys.argv[2])
    torch.save(train_cases(data), folder / f"cases_{os.environ['RANK']}.pt")
    for name, overrides in {"own": OVERRIDES, "plain": NO_DROPOUT}.items():
        fit("deco", data, folder / name, categories="cup", device="cpu", overrides=overrides)
        assert (folder / name / "model/model_index.json").exists()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_demo_data(tmp_path_factory.mktemp("data") / "demo", categories=("cup",), train=10, good=2, per_defect=1)


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    "The folder that two processes have filled."
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, data,
               folder]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return folder


def test_gradients_and_draws_of_two_processes_are_those_of_one(data, two):
    alone, ranks = train_cases(data), [torch.load(two / f"cases_{rank}.pt") for rank in range(2)]
    for name, one in alone.items():
        for rank in ranks:
            assert all(torch.equal(a, b) for a, b in zip(one["drawn"], rank[name]["drawn"], strict=True)), name
            worst = max((a - b).abs().max() for a, b in zip(one["weights"].values(), rank[name]["weights"].values()))
            assert worst < 1e-6, (name, worst)
            assert rank[name]["losses"] == pytest.approx(one["losses"], abs=1e-6), name
            for key in ("threshold", "mean", "std", "scores"):
                assert rank[name]["calibration"]["cup"][key] == pytest.approx(one["calibration"]["cup"][key], rel=1e-4)
        assert one["seeds"] == [derive_seed(0, "batch", k) for k in range(len(one["seeds"]))]
        assert not set(ranks[0][name]["seeds"]) & set(ranks[1][name]["seeds"])  # dropout differs


def ranks():
    "The training processes of this test."
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.cmdline()[1:4] == ["-u", "-m", "adiff.runs.fit"]:
                found.append(child)
    return found


@contextlib.contextmanager
def soon(ready, act):
    "While the body runs, calls `act` once `ready()`, from another thread."
    def wait():
        while not ready():
            if over.wait(0.02):
                return
        act()
    over = threading.Event()
    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_interrupted_and_killed_runs_go_on_and_leave_no_process_behind(data, two, tmp_path, capsys):
    run, seen = tmp_path / "run", []
    overrides = {**OVERRIDES, "training": {**OVERRIDES["training"], "checkpoint_every": 1}}
    # so that there is time between the first update and the tenth
    again = partial(fit, "deco", data, run, categories="cup", device="cpu", overrides=overrides, processes=2,
                    resume=True)

    def interrupt():
        seen.extend(ranks())
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), soon((run / "checkpoints/step_00000001.pt").exists, interrupt):
        again()
    stopped = load_checkpoint(run / "checkpoints")["step"]
    assert stopped % 10 == 0 and not (run / "model").exists()  # all have agreed on an update after which they stop

    def kill_one():
        seen.extend(ranks())
        seen[-1].kill()

    died = pytest.raises(RuntimeError, match=r"processes\.log: one of 2 .* died")
    with died, soon(lambda: len(ranks()) == 2, kill_one):
        again()
    assert "SIGKILL" in (run / "processes.log").read_text() and "training" in capsys.readouterr().err
    assert len(seen) == 4 and not psutil.wait_procs(seen, timeout=10)[1] and not (run / "model").exists()

    resumed = again().network.state_dict()
    never_stopped = AnomalyDetector.from_pretrained(two / "own/model").network.state_dict()
    assert all(torch.equal(resumed[name], never_stopped[name]) for name in never_stopped)
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21)) and json.loads((run / "config.json").read_text())["processes"] == 2


SRUN = """import sys, time; from pathlib import Path; import psutil
run, once = psutil.Popen(sys.argv[1:]), Path(sys.argv[0]).with_name("stopped")
while not once.exists() and run.poll() is None:
    time.sleep(0.05)
    if list(Path("runs/joint/checkpoints").glob("step_*.pt")):
        once.touch()
        for one in [run, *run.children(recursive=True)]:
            one.terminate()
sys.exit(run.wait())"""
ADIFF = "from adiff.runs.command_line import main; main()"


def test_the_commands_of_the_page_on_gpus(data, two, tmp_path, repository):
    "Slurm's script, whose srun tells all processes to stop once, as Slurm does, and its scontrol; then torchrun's line."
    page = (repository / "nbs/docs/gpu.md").read_text()
    small = [f"-o {section}.{name}={value}" for section, values in OVERRIDES.items() for name, value in values.items()]
    here = {"/datasets/mvtec_ad": str(data), "--nproc_per_node=8": "--nproc_per_node=2",
            "--preset gpu": " ".join(["--categories cup --device cpu", *small])}
    script = re.search(r"```sh\n(#!/bin/bash\n.*?)```", page, re.DOTALL)[1].replace("fit deco", "fit deco --processes 2")
    line = re.search(r"^torchrun .*", page, re.MULTILINE)[0].replace("runs/joint", "runs/torchrun")
    for old, new in here.items():
        script, line = script.replace(old, new), line.replace(old, new)
    programs = {"srun": SRUN, "adiff": ADIFF, "torchrun": "from torch.distributed.run import main; main()"}
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!{sys.executable}\n{text}\n")
    (tmp_path / "scontrol").write_text("#!/bin/bash\necho $@ >> requeued\n")
    for name in (*programs, "scontrol"):
        (tmp_path / name).chmod(0o755)
    bash = partial(subprocess.run, cwd=tmp_path, text=True, capture_output=True, env={
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "OMP_NUM_THREADS": "1"})
    first = bash(["bash", "-c", script])
    assert first.returncode == 143, first.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 7\n" and not (tmp_path / "runs/joint/model").exists()
    for command in (script, line):
        done = bash(["bash", "-c", command])
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    weights = [AnomalyDetector.from_pretrained(run / "model").network.state_dict()
               for run in (two / "own", tmp_path / "runs/joint", tmp_path / "runs/torchrun")]
    assert all(torch.equal(weights[0][name], other[name]) for other in weights[1:] for name in other)


def test_maps_of_two_processes_are_those_of_one(data, two, tmp_path):
    alone = fit("deco", data, tmp_path / "run", categories="cup", device="cpu", overrides=NO_DROPOUT)
    images = sorted((data / "cup/test").rglob("*.png"))
    loaded = AnomalyDetector.from_pretrained(two / "plain/model")
    one, together = (detector(images).maps for detector in (alone, loaded))
    assert abs(one - together).max() < 1e-4 * abs(one).max()


def test_what_a_process_refuses_is_one_line_here(data, tmp_path, capsys):
    with pytest.raises(InputError, match="unknown method 'dceo'; known:"):
        run_in_processes("adiff.runs.fit", 2, tmp_path, {"method": "dceo", "data_root": data, "out_dir": tmp_path,
                                                         "device": "cpu"})
    assert "Traceback" not in capsys.readouterr().err


def test_misuse(data, tmp_path, monkeypatch):
    for processes in (0, -1, 1.5, "2"):
        with pytest.raises(InputError, match="processes: must be a whole number from 1"):
            fit("deco", data, tmp_path / "run", device="cpu", processes=processes)
    with pytest.raises(InputError, match="padim cannot be divided"):
        fit("padim", data, tmp_path / "run", device="cpu", processes=2)
    assert not (tmp_path / "run").exists() and count_processes(None, "cpu") == 1 and count_processes(5, "cpu") == 5

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [count_processes(None, device) for device in ("auto", "cuda", "cuda:1", "cpu")] == [2, 2, 1, 1]
    for processes, device in ((3, "cuda"), (3, "auto"), (2, "cuda:1")):
        with pytest.raises(InputError, match=f"processes: {processes}, but device cuda.* has room for"):
            count_processes(processes, device)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert count_processes(None, "cpu") == 2
    with pytest.raises(InputError, match="torchrun has started 2"):
        count_processes(1, "cpu")


def test_processes_that_do_not_see_one_another_are_refused(data, tmp_path, monkeypatch):
    "accelerate, told that there are two processes but not which is this one, would train alone and say nothing."
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(adiff.runs.fit, "PartialState", lambda cpu: type("Alone", (), {"num_processes": 1}))
    with pytest.raises(InputError, match="each sees 1"):
        fit("deco", data, tmp_path / "run", device="cpu", overrides=OVERRIDES)
    assert not list((tmp_path / "run").iterdir())


HOLD = """import sys, time; from adiff.core import locked
with locked(sys.argv[1]): print(flush=True); time.sleep(float(sys.argv[2]))"""


def test_a_run_folder_has_one_writer(data, tmp_path, monkeypatch):
    for module in (adiff.runs.fit, adiff.runs.evaluate):
        monkeypatch.setattr(module, "locked", partial(locked, patience=0.3))
    (tmp_path / "config.json").write_text("{}")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path, "60"], stdout=subprocess.PIPE)
    holder.stdout.readline()
    for write in (partial(fit, "deco", data, tmp_path, device="cpu", overrides=OVERRIDES),
                  partial(evaluate, tmp_path, device="cpu")):
        with pytest.raises(InputError, match="another process is writing here"):
            write()
    holder.kill()  # the lock goes with its holder
    holder.communicate()
    with locked(tmp_path, patience=0.0):
        pass
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path, "0.5"], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with locked(tmp_path, patience=30):  # it waits for one that finishes
            pass


if __name__ == "__main__":
    process_of_two()
