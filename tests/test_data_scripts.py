"""The dataset scripts: download and resume against a local server, hashes, hostile archives, layout, kill -9."""
import csv
import hashlib
import http.server
import io
import os
import re
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "data_scripts"
sys.path.insert(0, str(SCRIPTS))

import common  # noqa: E402  the scripts are not part of the package
import esc50  # noqa: E402
import mvtec_ad  # noqa: E402
import urbansound8k  # noqa: E402
import visa  # noqa: E402

CONTENT = {f"pictures/{number:03d}.png": os.urandom(4000) for number in range(100)}


def toy_problems(folder):
    return common.count_problem(folder, "pictures", common.count_files(folder / "pictures", {".png"}), 100, "images")


def toy(**changes):
    facts = dict(name="Toy", page="http://example.org/toy", url="http://example.org/toy.tar", archive="toy.tar",
                 folder="toy", licence="none", problems=toy_problems, most_files=1000, most_bytes=10**7)
    return common.Dataset(**{**facts, **changes})


def tar_bytes(content=CONTENT, extra=(), mode="w"):
    "A tar of `content` (name: bytes), then the TarInfo objects of `extra`."
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member in extra:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return buffer.getvalue()


ARCHIVE = tar_bytes()
SHA256 = hashlib.sha256(ARCHIVE).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    "Serves `body`; `cuts` are the lengths after which the coming connections break; keeps the headers it was sent."

    def __init__(self, body, ranges=True, etag='"one"', kind="application/x-tar", status=200):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.ranges, self.etag, self.kind, self.status = body, ranges, etag, kind, status
        self.cuts, self.requests = [], []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/toy.tar"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        "Silent."

    def do_GET(self):
        server, start, status = self.server, 0, self.server.status
        wanted, version = self.headers.get("Range"), self.headers.get("If-Range")
        server.requests.append((wanted, version))
        if wanted and server.ranges and version in (None, server.etag):
            start, status = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]), 206
        if start >= len(server.body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.body)}")
            self.end_headers()
            return
        body = server.body[start:]
        self.send_response(status)
        self.send_header("Content-Type", server.kind)
        self.send_header("Content-Length", str(len(body)))
        if server.etag:
            self.send_header("ETag", server.etag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
        self.end_headers()
        self.wfile.write(body[:server.cuts.pop(0)] if server.cuts else body)


@pytest.fixture
def serve(monkeypatch):
    "Starts servers, stops them at the end; no proxy and no waiting between attempts."
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(common, "FIRST_WAIT", 0.0)
    running = []

    def start(body=ARCHIVE, **options):
        server = Server(body, **options)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def run(tmp_path, capsys):
    "Runs the command line on tmp_path/data/toy; returns exit code, standard output and standard error."
    def run(dataset, *arguments):
        code = common.main(dataset, ["--out", str(tmp_path / "data/toy"), *map(str, arguments)])
        output = capsys.readouterr()
        assert output.err.count("\n") == (code != 0) and "Traceback" not in output.err
        return code, output.out, output.err
    return run


def is_whole(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.png")} == CONTENT


def left_over(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- download

def test_download_unpack_and_second_run(serve, run, tmp_path):
    server = serve()
    code, output, _ = run(toy(sha256=SHA256, licence="CC BY-NC-SA 4.0"), "--url", server.url)
    assert code == 0 and "CC BY-NC-SA 4.0" in output and "as published" in output
    assert is_whole(tmp_path / "data/toy")
    assert left_over(tmp_path / "data") == ["toy", "toy.tar"]
    code, output, _ = run(toy(sha256=SHA256), "--url", server.url)
    assert code == 0 and "already complete" in output and len(server.requests) == 1


def test_broken_connection_resumes(serve, run, tmp_path):
    server = serve()
    server.cuts = [100_000, 50_000]
    assert run(toy(sha256=SHA256), "--url", server.url)[0] == 0
    assert server.requests == [(None, None), ("bytes=100000-", '"one"'), ("bytes=150000-", '"one"')]
    assert is_whole(tmp_path / "data/toy")


def test_gives_up_then_goes_on_in_the_next_run(serve, run, tmp_path):
    server = serve()
    server.cuts = [100_000] + [0] * common.ATTEMPTS
    code, _, error = run(toy(sha256=SHA256), "--url", server.url)
    assert code == 2 and "run the same command again" in error and "byte 100000" in error
    assert (tmp_path / "data/toy.tar.part").read_bytes() == ARCHIVE[:100_000]
    assert run(toy(sha256=SHA256), "--url", server.url)[0] == 0
    assert server.requests[-1] == ("bytes=100000-", '"one"')
    assert left_over(tmp_path / "data") == ["toy", "toy.tar"]


def test_server_without_ranges_starts_anew(serve, run, tmp_path):
    server = serve(ranges=False)
    server.cuts = [100_000]
    assert run(toy(sha256=SHA256), "--url", server.url)[0] == 0 and is_whole(tmp_path / "data/toy")


def test_another_version_on_the_server_is_never_joined(serve, run, tmp_path):
    server = serve(body=bytes(len(ARCHIVE)))
    server.cuts = [100_000] + [0] * common.ATTEMPTS
    assert run(toy(sha256=SHA256), "--url", server.url)[0] == 2
    server.body, server.etag, server.cuts = ARCHIVE, '"two"', []
    assert run(toy(sha256=SHA256), "--url", server.url)[0] == 0 and is_whole(tmp_path / "data/toy")


@pytest.mark.parametrize("part", [ARCHIVE, ARCHIVE + b"more"], ids=["complete", "too long"])
def test_partial_file_that_lacks_nothing(serve, run, tmp_path, part):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/toy.tar.part").write_bytes(part)
    assert run(toy(sha256=SHA256), "--url", serve(etag="").url)[0] == 0 and is_whole(tmp_path / "data/toy")


@pytest.mark.parametrize("options", [dict(status=404), dict(kind="text/html")], ids=["404", "web page"])
def test_dead_link_says_what_to_do(serve, run, tmp_path, options):
    server = serve(**options)
    code, _, error = run(toy(), "--url", server.url)
    assert code == 2 and "http://example.org/toy" in error and "--archive" in error and len(server.requests) == 1
    assert left_over(tmp_path / "data") == []


def test_busy_server_is_asked_again(serve, run):
    server = serve(status=503)
    assert run(toy(), "--url", server.url)[0] == 2 and len(server.requests) == common.ATTEMPTS


# ---- hash

def test_wrong_hash_is_put_aside(serve, run, tmp_path):
    code, _, error = run(toy(sha256="0" * 64), "--url", serve().url)
    assert code == 2 and SHA256 in error and "0" * 64 in error
    assert left_over(tmp_path / "data") == ["toy.tar.wrong-hash"]


def test_archive_by_hand(run, tmp_path):
    mine = tmp_path / "mine.tar"
    mine.write_bytes(ARCHIVE)
    assert run(toy(sha256="0" * 64), "--archive", mine)[0] == 2
    assert mine.exists() and left_over(tmp_path / "data") == []
    code, output, _ = run(toy(sha256="0" * 64), "--archive", mine, "--accept-any-hash")
    assert code == 0 and "NOT the published" in output and is_whole(tmp_path / "data/toy") and mine.exists()


def test_md5_only_and_no_hash_are_said(run, tmp_path):
    mine = tmp_path / "mine.tar"
    mine.write_bytes(ARCHIVE)
    code, output, _ = run(toy(md5=hashlib.md5(ARCHIVE).hexdigest()), "--archive", mine)
    assert code == 0 and "only an MD5 is published" in output and SHA256 in output
    code, _, error = run(toy(md5="0" * 32), "--archive", mine, "--out", tmp_path / "other")
    assert code == 2 and "MD5" in error
    code, output, _ = run(toy(), "--archive", mine, "--out", tmp_path / "third")
    assert code == 0 and f"{SHA256}: could not be compared" in output


# ---- unpacking

def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, 1 if kind == tarfile.REGTYPE else 0
    return info


HOSTILE = {
    "parent": member("../evil"), "parent inside": member("pictures/../../evil"), "absolute": member("/tmp/evil"),
    "drive": member("C:evil"), "backslash": member("..\\evil"), "link": member("evil", tarfile.SYMTYPE, "/"),
    "link inside": member("evil", tarfile.SYMTYPE, "pictures"), "hard link": member("evil", tarfile.LNKTYPE, "../x"),
    "device": member("evil", tarfile.CHRTYPE), "pipe": member("evil", tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("extra", HOSTILE.values(), ids=HOSTILE)
def test_hostile_tar_is_refused(run, tmp_path, extra):
    mine = tmp_path / "mine.tar"
    mine.write_bytes(tar_bytes(extra=[extra]))
    code, _, error = run(toy(), "--archive", mine)
    assert code == 2 and repr(extra.name) in error
    assert left_over(tmp_path / "data") == [] and left_over(tmp_path) == ["data", "mine.tar"]


@pytest.mark.parametrize("name, mode", [("../evil", stat.S_IFREG), ("/evil", 0), ("evil", stat.S_IFLNK),
                                        ("evil", stat.S_IFCHR)])
def test_hostile_zip_is_refused(run, tmp_path, name, mode):
    mine = tmp_path / "mine.zip"
    with zipfile.ZipFile(mine, "w") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, "/etc")
    code, _, error = run(toy(), "--archive", mine)
    assert code == 2 and repr(name) in error and left_over(tmp_path / "data") == []


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "zip"])
def test_every_kind_of_archive(run, tmp_path, mode):
    mine = tmp_path / "archive"
    inside = {f"Toy/{name}": data for name, data in CONTENT.items()}
    locked = member("Toy/locked", tarfile.DIRTYPE)
    locked.mode = 0o000  # nobody can move or delete a dataset with such folders: the archive's modes are not taken over
    if mode == "zip":
        with zipfile.ZipFile(mine, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in inside.items():
                archive.writestr(name, data)
    else:
        mine.write_bytes(tar_bytes(inside, [locked], mode))
    assert run(toy(top_folder="Toy"), "--archive", mine)[0] == 0
    assert is_whole(tmp_path / "data/toy") and left_over(tmp_path / "data") == ["toy"]
    assert mode == "zip" or (tmp_path / "data/toy/locked").stat().st_mode & 0o700 == 0o700


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_damaged_or_incomplete_archive_installs_nothing(run, tmp_path, mode):
    mine = tmp_path / "mine"
    whole = tar_bytes(mode=mode)
    mine.write_bytes(whole[:len(whole) // 2])
    assert run(toy(), "--archive", mine)[0] == 2
    mine.write_bytes(b"not an archive")
    assert "neither a tar nor a zip" in run(toy(), "--archive", mine)[2]
    mine.write_bytes(tar_bytes({"pictures/000.png": b"x"}, mode=mode))
    code, _, error = run(toy(), "--archive", mine)
    assert code == 2 and "1 of 100 images" in error and left_over(tmp_path / "data") == []


def test_killed_while_unpacking_leaves_no_half_target(run, tmp_path):
    mine, out = tmp_path / "mine.tar", tmp_path / "data/toy"
    mine.write_bytes(ARCHIVE)
    slow = ("import sys, time, shutil; sys.path[:0] = sys.argv[1:3]; import common, test_data_scripts as tests\n"
            "copy = shutil.copyfileobj\n"
            "common.shutil.copyfileobj = lambda *a: (time.sleep(0.1), copy(*a))\n"
            "common.main(tests.toy(), ['--out', sys.argv[3], '--archive', sys.argv[4]])\n")
    child = subprocess.Popen([sys.executable, "-c", slow, SCRIPTS, Path(__file__).parent, out, mine])
    staging = tmp_path / "data/.toy.unpacking"
    deadline = time.monotonic() + 30
    while len(list(staging.rglob("*.png"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert staging.exists() and not out.exists()
    assert run(toy(), "--archive", mine)[0] == 0
    assert is_whole(out) and left_over(tmp_path / "data") == ["toy"]


# ---- target and command line

def test_target_that_is_in_the_way(run, tmp_path):
    out = tmp_path / "data/toy"
    out.mkdir(parents=True)
    mine = tmp_path / "mine.tar"
    mine.write_bytes(ARCHIVE)
    (out / "notes.txt").write_text("mine")
    code, _, error = run(toy(), "--archive", mine)
    assert code == 2 and "not empty" in error and left_over(out) == ["notes.txt"]
    (out / "notes.txt").unlink()
    assert run(toy(), "--archive", mine)[0] == 0 and is_whole(out)


def test_check_lists_what_is_missing(run, tmp_path):
    assert "no such folder" in run(toy(), "--check")[2]
    (tmp_path / "data/toy/pictures").mkdir(parents=True)
    code, output, _ = run(toy(), "--check")
    assert code == 2 and output == "pictures: 0 of 100 images\n"


@pytest.mark.parametrize("arguments, part", [
    (["--archive", "nowhere.tar"], "no such file"), (["--url", "file:///etc/passwd"], "not a web address")])
def test_bad_input_is_one_line(run, arguments, part):
    code, _, error = run(toy(), *arguments)
    assert code == 2 and part in error


@pytest.mark.parametrize("script", ["mvtec_ad", "visa", "urbansound8k", "esc50"])
def test_script_runs_without_adiff(script, tmp_path):
    def start(*arguments):
        return subprocess.run([sys.executable, SCRIPTS / f"{script}.py", *arguments], cwd=tmp_path, text=True,
                              capture_output=True)
    help_page = start("--help")
    assert help_page.returncode == 0 and "example:" in help_page.stdout and "Licence: CC BY" in help_page.stdout
    unknown = start("--nonsense")
    assert unknown.returncode == 2 and unknown.stderr.count("\n") == 1
    missing = start("--check")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and "no such folder" in missing.stderr
    assert "adiff" not in re.findall(r"^(?:from|import) (\w+)", (SCRIPTS / f"{script}.py").read_text(), re.M)


# ---- the facts of the three datasets

def test_counts_add_up_to_the_published_totals():
    train, good, defective = map(sum, zip(*mvtec_ad.COUNTS.values()))
    assert (len(mvtec_ad.COUNTS), train, good, defective, good + defective) == (15, 3629, 467, 1258, 1725)
    assert (len(visa.NORMAL), sum(visa.NORMAL.values())) == (12, 9621)
    for dataset in (mvtec_ad.DATASET, visa.DATASET, urbansound8k.DATASET):
        assert re.fullmatch("[0-9a-f]{64}", dataset.sha256 or "") or re.fullmatch("[0-9a-f]{32}", dataset.md5 or "")


def fill(folder, count, suffix):
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:04d}{suffix}").touch()


def test_mvtec_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(mvtec_ad, "COUNTS", {"bottle": (3, 2, 4), "cable": (1, 1, 1)})
    fill(tmp_path / "bottle/train/good", 3, ".png")
    fill(tmp_path / "bottle/test/good", 2, ".png")
    fill(tmp_path / "bottle/test/broken", 3, ".png")
    fill(tmp_path / "bottle/test/dirty", 1, ".png")
    fill(tmp_path / "bottle/ground_truth/broken", 3, ".png")
    assert mvtec_ad.problems(tmp_path) == ["bottle/ground_truth: 3 of 4 masks", "cable: missing"]


def test_visa_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(visa, "NORMAL", {"candle": 3, "pcb1": 2})
    monkeypatch.setattr(visa, "ANOMALOUS", 2)
    fill(tmp_path / "candle/Data/Images/Normal", 3, ".JPG")
    fill(tmp_path / "candle/Data/Images/Anomaly", 1, ".JPG")
    assert visa.problems(tmp_path) == ["split_csv/1cls.csv: missing", "candle/Data/Images/Anomaly: 1 of 2 images",
                                       "candle/Data/Masks/Anomaly: missing", "pcb1: missing"]


def test_urbansound_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(urbansound8k, "CLIPS", 20)
    assert urbansound8k.problems(tmp_path) == ["metadata/UrbanSound8K.csv: missing"]
    (tmp_path / "metadata").mkdir()
    with open(tmp_path / "metadata/UrbanSound8K.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["slice_file_name", "fold"])
        table.writerows([f"{number:04d}.wav", fold] for fold in range(1, 11) for number in range(2))
    for fold in range(1, 10):
        fill(tmp_path / f"audio/fold{fold}", 2, ".ogg" if fold == 3 else ".wav")
    (tmp_path / "audio/fold7/0001.wav").rename(tmp_path / "audio/fold7/other.wav")
    assert urbansound8k.problems(tmp_path) == ["audio/fold7: 1 of 2 clips", "audio/fold10: missing"]
    (tmp_path / "metadata/UrbanSound8K.csv").write_text("a,b\n1,2\n")
    assert "not the official table" in urbansound8k.problems(tmp_path)[0]


def test_esc50_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(esc50, "CLIPS", 10)
    monkeypatch.setattr(esc50, "PER_FOLD", 2)
    assert esc50.problems(tmp_path) == ["meta/esc50.csv: missing"]
    names = [f"{fold}-{fold}0{take}-{take}-0" for fold in range(1, 6) for take in "AB"]
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/esc50.csv").write_text("filename,fold\n" + "".join(f"{name}.wav,{name[0]}\n" for name in names))
    (tmp_path / "audio").mkdir()
    for name in names[:-1]:
        (tmp_path / "audio" / f"{name}.{'ogg' if name[0] == '2' else 'wav'}").touch()
    assert esc50.problems(tmp_path) == ["audio: 1 of 2 clips of fold 5"]
    (tmp_path / "meta/esc50.csv").write_text("a,b\n1,2\n")
    assert "not the official table" in esc50.problems(tmp_path)[0]


def test_development_data_has_what_it_says(shared):
    lacking = mvtec_ad.problems(shared / "data/mvtec_ad")
    assert "toothbrush/train/good: 48 of 60 images" in lacking and not any("bottle" in line for line in lacking)
    lacking = urbansound8k.problems(shared / "data/urbansound8k")
    assert lacking == [f"audio/fold{fold}: missing" for fold in range(3, 10)]
