"""Real processes without the seconds of their imports: forked from a server that has imported everything.

Each has memory, signals, standard streams and an exit code of its own, like one that a shell starts. What comes before
its first line is not in it: the console script is tested by test_bad_input_in_a_real_process, the rest by test_wheel.py.
"""
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["adiff.runs.command_line", "adiff.runs.evaluate", "adiff.runs.report",
                                 "adiff.methods.adiff", "adiff.methods.official", "adiff.data.demo_images",
                                 "matplotlib.pyplot", "seaborn", "nbdev.test", "fastcore.test", "pytest"])


def adiff_command(arguments, clock=None):
    "What such a process does: the command `adiff`, under a clock that may run backwards."
    from adiff.runs.command_line import main

    sys.argv = ["adiff", *arguments]
    if clock == "backwards":
        real, start = time.time, time.time()
        time.time = lambda: start - 100 * (real() - start)
    main(arguments)


def _act(function, arguments, streams, folder, environment):
    for number, path in zip((1, 2), streams):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background would have it ignored
    function(*arguments)


def start(function, *arguments, out, error=None, cwd=None, env=None):
    """Starts a process that calls `function`, whose output goes into the file `out`, and into `error` what it says on
    standard error (None: both into one); returns the `multiprocessing.Process`."""
    process = _context.Process(target=_act, args=(function, arguments, (out, error or out), cwd or os.getcwd(),
                                                  dict(env or os.environ)))
    process.start()
    return process


def finish(function, *arguments, **options):
    "Starts such a process and waits for it; returns its `subprocess.CompletedProcess`, with what it printed as text."
    folder = Path(tempfile.mkdtemp(prefix="adiff-said-"))
    try:
        process = start(function, *arguments, out=folder / "out", error=folder / "error", **options)
        process.join()
        printed = [(folder / name).read_text(errors="replace") for name in ("out", "error")]
    finally:
        shutil.rmtree(folder)
    return subprocess.CompletedProcess(arguments, process.exitcode, *printed)


def adiff(*arguments, **options):
    "Runs the command `adiff` with these arguments in a process of its own; returns its `CompletedProcess`."
    return finish(adiff_command, [str(argument) for argument in arguments], **options)
