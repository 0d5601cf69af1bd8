"""What one data-centre GPU does with adiff, in ten minutes: one JSON and one Markdown table.

    python tests/gpu/check.py --out gpu                  # or: make gpu
    python tests/gpu/check.py --out gpu --rehearse       # the same code on the CPU, with tiny sizes: minutes

Needs the core of the package and nothing else: `pip install -e .` with a torch for CUDA (2.11 or newer), Python 3.11 or
newer. Beside the wheels of torch, diffusers and so on it needs 12 MB of wheels (PyWavelets, soundfile and the two of
EfficientNet-Lite0), and for the last part the 5 MB of TAEF2 in the folder that ADIFF_WEIGHTS names. The last part
learns --data, a dataset in the MVTec AD layout; without it the demo's photographs. Parts come in the order of the
table; one that fails says why in its row and the next one goes on. The last one has the minutes that are left.
"""
import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from adiff.core import read_json, write_json
from adiff.data.demo_images import make_demo_data
from adiff.lab.benchmark import Settings, contestants, fill_zeros, gpu_memory, measure, updates_time, work
from adiff.machine import use_machine
from adiff.networks.class_token_unet import ClassTokenUNet
from adiff.networks.ideal import IdealDenoiser
from adiff.networks.multiscale_unet import MultiScaleUNet

PARTS = {}
NOT_MEASURED = "not measured"
COMMAND = [sys.executable, "-c", "from adiff.runs.command_line import main; main()"]


def part(function):
    "Registers a part: a function of a `Job` that yields rows (what, text, numbers)."
    PARTS[function.__name__] = function
    return function


class Job:
    "The device, the sizes, the scratch folder, and when all must be done."

    def __init__(self, device, rehearse, minutes, data, folder):
        self.device, self.rehearse, self.data, self.folder = torch.device(device), rehearse, data, folder
        self.end = time.monotonic() + 60 * minutes
        self.settings = Settings(self.device, seconds=0.5 if rehearse else 3.0, rounds=2 if rehearse else 5)

    def size(self, name):
        "The size to use for one that is asked for."
        return "nano" if self.rehearse else name

    def left(self):
        "Seconds that are left."
        return self.end - time.monotonic()

    def number(self, wanted, tiny):
        "`wanted`, or in a rehearsal `tiny`."
        return tiny if self.rehearse else wanted

    def median(self, function):
        "Median seconds of a call."
        times = sorted(measure({"one": function}, self.settings.seconds, self.settings.rounds,
                               self.settings.synchronize)["one"])
        return times[len(times) // 2]


def networks(job):
    "Name -> (network with weights that answer, latents, arguments) of the three sizes of the table."
    z = torch.randn(job.number(8, 2), 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(job.device)
    labels, t = torch.zeros(len(z), dtype=torch.int64, device=job.device), torch.full((len(z),), 5, device=job.device)
    made = {f"UNet_{size}": ClassTokenUNet.of_size(job.size(size), channels=4, num_classes=1, dropout=0.0)
            for size in ("S", "L")}
    made["multi-scale M"] = MultiScaleUNet.of_size(job.size("M"), channels=4)
    for name, network in made.items():
        yield name, fill_zeros(network).to(job.device).eval(), (z, t, labels)


@part
@torch.no_grad()
def precision(job):
    "Outputs in TF32 and bf16 beside those in float32."
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for name, network, inputs in networks(job):
        answers = {}
        for kind in ("float32", "TF32", "bf16"):
            torch.set_float32_matmul_precision("high" if kind == "TF32" else "highest")
            torch.backends.cudnn.allow_tf32 = kind == "TF32"
            with torch.autocast(job.device.type, torch.bfloat16) if kind == "bf16" else nullcontext():
                answers[kind] = network(*inputs).sample.float()
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
        errors = {kind: _error(answers[kind], answers["float32"]) for kind in ("TF32", "bf16")}
        text = ", ".join(f"{kind} {mean:.1e} ({largest:.1e})" for kind, (mean, largest) in errors.items())
        good = job.rehearse or max(mean for mean, _ in errors.values()) <= 1e-2  # bf16 of a CPU is another one
        yield f"{name}: error of outputs beside float32, root mean square (largest); limit 0.01", (
            text if good else f"NO, above the limit: {text}"), errors


def _error(answer, expected):
    "(root mean square, largest) difference, each in those of `expected`."
    far = answer - expected
    return (far.norm() / expected.norm()).item(), (far.abs().max() / expected.abs().max()).item()


@part
def training(job):
    "Samples per second of a training step of UNet_S, by kind and batch, and its peak of memory."
    for batch, tiny in ((32, 2), (128, 4)):
        made = contestants(job.size("S"), job.device)
        best = made.get("ours bf16", made["ours"])
        steps = {"plain maths, float32": made["plain"], "ours, TF32": made["ours"], "ours, bf16": best}
        for name, mode in (("torch.compile", "default"), ("CUDA graphs", "reduce-overhead")):
            if job.device.type == "cuda" and job.left() > 300:  # compiling takes a minute, and the other parts come
                steps[f"ours, bf16, {name}"] = twin = deepcopy(best)
                twin.network = torch.compile(twin.network, mode=mode)
        for name, one in steps.items():
            yield one_row(f"training step of UNet_S, batch {batch}: {name}", job,
                          work("training step", one, job.number(batch, tiny), job.device), job.number(batch, tiny))


def one_row(what, job, step, batch):
    "The row of a step: samples per second and memory, or why it failed."
    try:
        seconds = job.median(step)
    except Exception as error:  # a compiler that fails must not take the other rows with it
        return what, f"failed: {type(error).__name__}", {"error": str(error)[:300]}
    graphs = "CUDA graphs" in what  # replaying one allocates nothing, so that its peak would look like zero
    memory = {} if graphs else gpu_memory(job.settings, step)
    return what, f"{batch / seconds:.3g} samples/s{peak(memory)}", {"seconds": seconds, "batch": batch, **memory}


def peak(memory):
    "The peak of `gpu_memory` as text; empty on a CPU."
    return f", peak {memory['peak_mb']:.0f} MB" if memory else ""


@part
def detection(job):
    "From images to maps: latency and throughput."
    for size in ("S", "L"):
        made = contestants(job.size(size), job.device)
        best = made.get("ours bf16", made["ours"])
        with best.prepared():
            for batch, tiny in ((1, 1), (8, 2), (64, 4)):
                call = work("detection", best, job.number(batch, tiny), job.device)
                seconds, memory = job.median(call), gpu_memory(job.settings, call)
                yield (f"detection with UNet_{size}, batch {batch}",
                       f"{1000 * seconds:.3g} ms, {job.number(batch, tiny) / seconds:.3g} images/s{peak(memory)}",
                       {"seconds": seconds, "batch": job.number(batch, tiny), **memory})


@part
def updates(job):
    "10,400 updates of UNet_L at batch 2 x 128, from some that are measured."
    if job.device.type == "cuda":
        found = updates_time(job.settings, "L", minutes=0.75)
    else:
        one = contestants(job.size("L"), "cpu", only="ours")["ours"]
        found = {"seconds": 10_400 * job.median(work("training step", one, 2, "cpu", 2))}
    yield "10,400 updates of UNet_L, extrapolated", f"{found['seconds'] / 3600:.2f} h", found


def fit(job, name, deterministic=True, program=COMMAND):
    "The command of a short training of the demo's cup, and its run folder."
    out = job.folder / name
    settings = ("-o", "codec.kind=wavelet", "-o", f"network.size={job.size('S')}", "-o", "data.image_size=64",
            "-o", "codec.levels=2", "-o", f"training.length={job.number(60, 8)}", "-o", "training.batch_size=8",
            "-o", "discrepancy.kind=deviation", "-o", f"training.checkpoint_every={job.number(10, 2)}",
            "-o", f"training.deterministic={str(deterministic).lower()}")
    command = [*program, "fit", "deco", str(job.folder / "demo"), "--categories", "cup", "--preset",
               "gpu", "--out", str(out), "--device", job.device.type, *settings]
    return command, out


def finish(command, out):
    "Runs `command` to its end; returns the seconds of an update in its later half, and the network's weights."
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-300:])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    half = log[len(log) // 2:]
    rate = (half[-1]["seconds"] - half[0]["seconds"]) / max(1, len(half) - 1)
    return rate, load_file(next((out / "model/network").glob("*.safetensors")))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@part
def determinism(job):
    "The same training twice, killed and resumed, and as one process of a process group."
    make_demo_data(job.folder / "demo", categories=("cup",), train=16, good=2, per_defect=1)
    free, _ = finish(*fit(job, "free", deterministic=False))
    bound, first = finish(*fit(job, "first"))
    yield ("update of UNet_S with deterministic off and on", f"{1000 * free:.3g} ms, {1000 * bound:.3g} ms",
           {"off": free, "on": bound})
    second = finish(*fit(job, "second"))[1]
    yield "deterministic twice: the same bits", "yes" if equal(first, second) else "NO", {}
    command, out = fit(job, "killed")
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and not list((out / "checkpoints").glob("[!.]*")):
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    third = finish([*command, "--resume"], out)[1]
    yield "killed and resumed: the same bits", "yes" if equal(first, third) else "NO", {"code": child.returncode}
    backend = "nccl" if job.device.type == "cuda" else "gloo"
    group = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", __file__, "adiff"]
    fourth = finish(*fit(job, "group", program=group))[1]
    far = max((first[name].float() - fourth[name].float()).abs().max().item() for name in first)
    yield ("one process under torchrun (nccl; on a CPU gloo): largest difference of weights", f"{far:.1g}",
           {"backend": backend, "difference": far})


@part
@torch.no_grad()
def ideal(job):
    "The ideal denoiser of 112 channels on 28 x 28 cells with a memory of 100,000 patches."
    count, generator = job.number(100_000, 2_000), torch.Generator().manual_seed(0)
    network = IdealDenoiser(112, memory_size=count)
    network.memory.copy_(torch.randn(network.memory.shape, generator=generator))
    network.places.copy_(28 * torch.rand(network.places.shape, generator=generator))
    network.log_prior.zero_()
    network.spread.fill_(1.0)
    network.to(job.device)
    z = torch.randn(job.number(8, 2), 112, 28, 28, generator=generator).to(job.device)
    call = partial(network, z, 0)
    seconds, memory = job.median(call) / len(z), gpu_memory(job.settings, call)
    yield ("ideal denoiser, 100,000 patches, per image of 28 x 28 cells", f"{1000 * seconds:.3g} ms{peak(memory)}",
           {"seconds": seconds, "patches": count, **memory})


@part
def joint_model(job):
    "One model of all categories of the data at 256 px, preset gpu, as long as there is time; with metrics."
    data = job.data or make_demo_data(job.folder / "all", train=job.number(160, 6), good=job.number(10, 1),
                                      per_defect=job.number(4, 1))
    left = max(30.0, 0.6 * job.left())  # the rest is for encoding, calibration and evaluation
    one = contestants(job.size("S"), job.device)
    step = job.median(work("training step", one.get("ours bf16", one["ours"]), job.number(32, 2), job.device))
    length = job.number(int(min(4000, max(100, left / (2 * step)))), 6)
    out, tiny = job.folder / "joint", ["-o", "network.size=nano", "-o", "training.batch_size=4"] * job.rehearse
    weights = [] if os.environ.get("ADIFF_WEIGHTS") else ["-o", "codec.kind=wavelet", "-o", "codec.levels=3"]
    subprocess.run([*COMMAND, "fit", "deco", str(data), "--preset", "gpu", "--out", str(out), "--device",
                    job.device.type, "-o", f"training.length={length}", *tiny, *weights], check=True)
    subprocess.run([*COMMAND, "evaluate", str(out), "--device", job.device.type], check=True,
                   stdout=subprocess.DEVNULL)
    metrics = read_json(out / "metrics.json")
    mean, names = metrics["mean"], {"image_auroc": "image AUROC", "pixel_ap": "pixel AP", "aupro": "AUPRO"}
    shown = ", ".join(f"{title} {100 * mean[name]:.1f}" for name, title in names.items() if mean[name] is not None)
    yield ("one joint model at 256 px, preset gpu, in the minutes that were left", f"{length} updates: {shown}",
           {"updates": length, "data": metrics["dataset"], "mean": mean,
            "train_seconds": metrics["train_seconds"], "seconds_per_image": metrics["seconds_per_image"]})


def run_parts(job, only=None):
    "All rows, as dicts: part, what, text, numbers."
    rows = []
    for name, function in PARTS.items():
        if only and name not in only:
            continue
        try:
            for what, text, numbers in function(job):
                rows.append({"part": name, "what": what, "text": text, "numbers": numbers})
                print(f"{what}: {text}", file=sys.stderr, flush=True)
        except Exception as error:  # the others are still worth their minutes
            said = " ".join(str(error).split())[:200]
            rows.append({"part": name, "what": name, "text": f"failed: {type(error).__name__}",
                         "numbers": {"error": said}})
            print(f"{name}: failed: {type(error).__name__}: {said}", file=sys.stderr, flush=True)
        if job.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def table(folder):
    "The Markdown table of gpu.json and rehearsal.json in `folder`, whichever are there."
    found = {kind: read_json(folder / f"{kind}.json") for kind in ("gpu", "rehearsal")
             if (folder / f"{kind}.json").is_file()}
    texts = {kind: {row["what"]: row["text"] for row in one["rows"]} for kind, one in found.items()}
    names = list(dict.fromkeys(what for one in texts.values() for what in one))
    heads = [found[kind]["machine"] if kind in found else empty
             for kind, empty in (("gpu", "one GPU"), ("rehearsal", "rehearsal"))]
    lines = [f"| | {heads[0]} | {heads[1]} |", "|---|---|---|"]
    for name in names:
        cells = [texts.get(kind, {}).get(name, NOT_MEASURED) for kind in ("gpu", "rehearsal")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for the JSON and gpu.md")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together, about")
    parser.add_argument("--data", type=Path, help="dataset of the joint model; default: the demo's photographs")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="these parts alone")
    options = parser.parse_args()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several GPUs one, for the commands that are started, too
    if not options.rehearse and not torch.cuda.is_available():
        parser.exit(2, "check.py: torch sees no GPU here; --rehearse runs the same code on the CPU\n")
    device = "cpu" if options.rehearse else "cuda"
    use_machine(device)
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="adiff-gpu-"))
    try:
        rows = run_parts(Job(device, options.rehearse, options.minutes, options.data, folder), options.only)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    machine = "CPU, tiny sizes" if options.rehearse else torch.cuda.get_device_name()
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / ("rehearsal.json" if options.rehearse else "gpu.json"),
               {"machine": machine, "torch": torch.__version__, "python": platform.python_version(),
                "seconds": round(time.monotonic() - began, 1), "rows": rows})
    (options.out / "gpu.md").write_text(table(options.out))
    print(table(options.out))
    sys.exit(any(row["text"].startswith(("failed", "NO")) for row in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["adiff"]:  # started by torchrun: the command adiff
        from adiff.runs.command_line import main as adiff
        sys.argv[1:2] = []
        adiff(standalone_mode=False)
        torch.distributed.destroy_process_group()
    else:
        main()
