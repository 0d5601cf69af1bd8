"""What threads that wait cost: seconds and CPU seconds for one update of ADiff's nano network (latents 48 x 16 x 16,
batch 16), alone and beside a second process that trains as well, with each way of waiting.

`python tests/benchmark_threads.py` prints the table of nbs/docs/speed.md; about three minutes on two cores.
"""
import json
import os
import statistics
import subprocess
import sys
import time

WAITS = {"as torch comes": {}, "spin count 10000": {"GOMP_SPINCOUNT": "10000"},
         "spin count 1000": {"GOMP_SPINCOUNT": "1000"}, "spin count 100": {"GOMP_SPINCOUNT": "100"},
         "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}


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
    return subprocess.Popen([sys.executable, __file__, str(seconds)], env=environment, stdout=subprocess.PIPE, text=True)


def measure(wait, threads, beside, seconds=10):
    "What `train` prints, with a second process that trains meanwhile where `beside`."
    first, *others = [start(wait, threads, seconds + 10 * number) for number in range(1 + beside)]
    found = json.loads(first.communicate()[0])
    for other in others:
        other.kill()
        other.communicate()
    return found


def main(threads=2):
    print("| waiting | alone (s) | CPU | beside another (s) | CPU |\n|---|---|---|---|---|")
    losses = set()
    for name, wait, count in [*((name, wait, threads) for name, wait in WAITS.items()), ("one thread", {}, 1)]:
        alone, beside = (measure(wait, count, other) for other in (False, True))
        print(f"| {name} | {alone['seconds']:.2f} | {alone['cpu']:.2f} | {beside['seconds']:.2f} | {beside['cpu']:.2f} |",
              flush=True)
        losses |= {(count, alone["loss"]), (count, beside["loss"])}
    print("losses after two updates, (threads, loss):", *sorted(losses))


if __name__ == "__main__":
    train(float(sys.argv[1])) if len(sys.argv) > 1 else main()
