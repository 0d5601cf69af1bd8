"""What threads that wait cost: seconds and CPU seconds for one update of ADiff's nano network (latents 48 x 16 x 16,
batch 16), with each way of waiting, beside whatever else runs on the machine.

`python tests/benchmark_threads.py` prints the table of nbs/docs/speed.md in minutes; with a number, so many other
trainings run at the same time.
"""
import json
import os
import statistics
import subprocess
import sys
import time

WAITS = {"as torch comes": {}, "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
         "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"}, "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"}}


def train(seconds):
    "Trains for so long after a warm-up; prints the median seconds and the mean CPU seconds of an update, and a digit."
    import torch

    from adiff.networks.multiscale_unet import MultiScaleUNet

    torch.manual_seed(0)
    network, z = MultiScaleUNet.of_size("nano", 48), torch.randn(16, 48, 16, 16)
    optimizer, steps = torch.optim.AdamW(network.parameters(), 1e-3), torch.arange(16)

    def update():
        loss = (network(z, steps).sample - z).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses = [update() for _ in range(2)]
    times, cpu = [time.perf_counter()], time.process_time()
    while times[-1] < times[0] + seconds:
        update()
        times.append(time.perf_counter())
    cpu = (time.process_time() - cpu) / (len(times) - 1)
    took = statistics.median(after - before for before, after in zip(times, times[1:]))
    print(json.dumps({"seconds": took, "cpu": cpu, "loss": losses[-1]}), flush=True)


def start(wait, threads, seconds):
    "A process that trains, in an environment that says how threads wait."
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = {**clean, "OMP_NUM_THREADS": str(threads), **wait}
    return subprocess.Popen([sys.executable, __file__, "train", str(seconds)], env=environment, stdout=subprocess.PIPE, text=True)


def measure(wait, threads, others, seconds=20):
    "What `train` prints while so many `others` train as well, in the same way."
    first, *rest = [start(wait, threads, seconds + 20 * bool(number)) for number in range(1 + others)]
    found = json.loads(first.communicate()[0])
    for other in rest:
        other.kill()
        other.communicate()
    return found


def main(others):
    print(f"load average before: {os.getloadavg()[0]:.1f}; {others} others\n")
    print("| threads that wait | seconds | CPU seconds |\n|---|---|---|")
    losses = set()
    for name, wait, threads in [*((name, wait, 2) for name, wait in WAITS.items()), ("one thread", {}, 1)]:
        found = measure(wait, threads, others)
        losses.add((threads, found["loss"]))
        print(f"| {name} | {found['seconds']:.2f} | {found['cpu']:.2f} |", flush=True)
    print("\nloss after two updates, (threads, loss):", *sorted(losses))


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train(float(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
