"""What the dataset scripts share: download with resume, check of the hash, safe unpacking, check of the layout.

A dataset is one `Dataset`; a script builds it and hands it to `main`. Needs the standard library and tqdm, not adiff.
"""
import argparse
import hashlib
import http.client
import lzma
import os
import shutil
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from tqdm import tqdm

ATTEMPTS = 5           # broken connections in a row that brought not one new byte
FIRST_WAIT = 1.0       # seconds before the second attempt, doubled each time
TIMEOUT = 60           # seconds without a byte after which a connection counts as broken
BLOCK = 1 << 20
PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP answers that may be different a moment later
BROKEN_CONNECTION = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
BROKEN_ARCHIVE = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, UnicodeError,
                  NotImplementedError)


class DataError(Exception):
    "Something the user can act on; the message is one line: what, why, what to do."


@dataclass(frozen=True)
class Dataset:
    """What a script knows of its dataset.

    `problems` takes a folder and returns one line for each thing that the complete dataset has and the folder has not.
    `archive` is the name of the official file, `folder` the target's default, `top_folder` the folder inside the
    archive that holds everything ('' where there is none). `sha256` or `md5` is the archive's hash, in lower case.
    An archive with more than `most_files` members, or with more than `most_bytes` in them, is not unpacked: both are
    well above what the dataset has.
    """
    name: str
    page: str
    url: str
    archive: str
    folder: str
    licence: str
    problems: Callable[[Path], list[str]]
    most_files: int
    most_bytes: int
    sha256: str | None = None
    md5: str | None = None
    top_folder: str = ""

    @property
    def by_hand(self):
        return f"get {self.archive} by hand from {self.page} and pass it with --archive FILE"


# ---- layout

def count_files(folder, suffixes):
    "How many files with one of `suffixes` (lower case) lie directly in `folder`; hidden files do not count."
    if not folder.is_dir():
        return 0
    return sum(not path.name.startswith(".") and path.suffix.lower() in suffixes for path in folder.iterdir())


def count_problem(root, name, found, expected, what):
    "A list with the line that says that `found` is not what was `expected` of `root`/`name`, or an empty one."
    if found == expected:
        return []
    return [f"{name}: {f'{found} of {expected} {what}' if (root / name).exists() else 'missing'}"]


# ---- download

def download(url, destination, by_hand):
    """Downloads `url` to `destination`, going on from `destination`.part where there is one.

    A broken connection is tried again, `ATTEMPTS` times in a row without a new byte. Raises DataError after that, and
    at once when the server says that there is no such file.
    """
    part, furthest, failures = destination.with_name(destination.name + ".part"), 0, 0
    while True:
        try:
            fetch_rest(url, part, by_hand)
            break
        except BROKEN_CONNECTION as error:
            if isinstance(error, urllib.error.HTTPError) and error.code not in PASSING:
                raise DataError(f"{url}: the server answered {error.code} {error.reason}, "
                                f"the link may have changed; {by_hand}") from None
            reached = part.stat().st_size if part.exists() else 0
            failures = 1 if reached > furthest else failures + 1
            furthest = max(furthest, reached)
            if failures >= ATTEMPTS:
                raise DataError(f"{url}: the connection broke {failures} times in a row ({error}); run the same "
                                f"command again later to go on from byte {reached}, or {by_hand}") from None
            print(f"connection broken at byte {reached} ({error}), trying again", flush=True)
            time.sleep(FIRST_WAIT * 2 ** (failures - 1))
    os.replace(part, destination)
    validator_path(part).unlink(missing_ok=True)


def validator_path(part):
    "Where the server's name for this version of the file is kept, so that two versions are never joined."
    return part.with_name(part.name + ".version")


def fetch_rest(url, part, by_hand):
    "One connection: appends to `part` what it lacks; starts anew if the server cannot resume or has another version."
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "adiff-data-scripts"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if validator_path(part).exists():
            headers["If-Range"] = validator_path(part).read_text()
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":  # nothing left to fetch
            return
        part.unlink(missing_ok=True)
        raise ConnectionError("the partial file is longer than the server's, starting anew") from None
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink(missing_ok=True)
            raise ConnectionError("the server resumed at another byte, starting anew")
        if response.headers.get_content_type() == "text/html":
            raise DataError(f"{url}: this is a web page, not the archive, the link may have changed; {by_hand}")
        if not resumed:
            have = 0
            part.write_bytes(b"")
            etag = response.headers.get("ETag", "")
            validator = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
            validator_path(part).unlink(missing_ok=True)
            if validator:
                validator_path(part).write_text(validator)
        total = None if response.length is None else have + response.length
        with open(part, "ab") as file, progress(total=total, initial=have, desc="download") as bar:
            while block := response.read1(BLOCK):
                file.write(block)
                bar.update(len(block))
    reached = part.stat().st_size
    if total is not None and reached != total:
        raise ConnectionError(f"closed after {reached} of {total} bytes")


def progress(iterable=None, unit="B", **options):
    "A bar with time left on a terminal; nothing elsewhere, so that standard error holds errors only."
    return tqdm(iterable, unit=unit, unit_scale=True, disable=None, **options)


# ---- hash

def file_hashes(path):
    "The SHA-256 and the MD5 of a file, as a dictionary of lower-case hexadecimal strings."
    digests = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    with open(path, "rb") as file, progress(total=path.stat().st_size, desc="hash") as bar:
        while block := file.read(BLOCK):
            for digest in digests.values():
                digest.update(block)
            bar.update(len(block))
    return {name: digest.hexdigest() for name, digest in digests.items()}


def check_hash(dataset, path, accept_any, put_aside):
    """Compares the archive with the published hash and prints what was compared.

    On a difference it raises DataError, unless `accept_any`; `put_aside` renames the file first, to NAME.wrong-hash.
    """
    found = file_hashes(path)
    kind, published = ("MD5", dataset.md5) if dataset.md5 and not dataset.sha256 else ("SHA-256", dataset.sha256)
    have = found["md5" if kind == "MD5" else "sha256"]
    if not published:
        print(f"SHA-256 {have}: could not be compared, no hash of this archive is known")
    elif have == published:
        note = f" (only an MD5 is published; its SHA-256 is {found['sha256']})" if kind == "MD5" else ""
        print(f"{kind} {have}: as published{note}")
    elif accept_any:
        print(f"{kind} {have}: NOT the published {published}; accepted because of --accept-any-hash")
    else:
        kept = path
        if put_aside:
            kept = path.with_name(path.name + ".wrong-hash")
            os.replace(path, kept)
        raise DataError(f"{kept}: {kind} is {have}, published is {published}, so it is damaged or another version and "
                        f"nothing was unpacked; {dataset.by_hand}; to use this one all the same, pass it with "
                        "--archive and --accept-any-hash")


# ---- unpacking

class Header(tarfile.TarInfo):
    "A tar header that refuses names and comments of more than a megabyte, which would be read into memory as a whole."

    @classmethod
    def frombuf(cls, *arguments):
        header = super().frombuf(*arguments)
        if not (header.isreg() or header.isdir()) and header.size > BLOCK:
            raise tarfile.ReadError(f"a name or comment of {header.size} bytes")
        return header


def tar_members(path):
    """Yields (name, kind, size in bytes, open file or None) of each member, in one pass; kind is 'file', 'folder' or an
    unwanted one."""
    others = {tarfile.SYMTYPE: "symbolic link", tarfile.LNKTYPE: "hard link"}
    with open(path, "rb") as raw, tqdm.wrapattr(raw, "read", path.stat().st_size, desc="unpack", disable=None) as file:
        with tarfile.open(fileobj=file, mode="r|*", tarinfo=Header) as tar:
            for member in tar:
                kind = "file" if member.isfile() else "folder" if member.isdir() else others.get(member.type, "device")
                yield member.name, kind, member.size, tar.extractfile(member) if kind == "file" else None


def zip_members(path):
    "The same for a zip archive."
    others = {stat.S_IFLNK: "symbolic link", 0: "file", stat.S_IFREG: "file", stat.S_IFDIR: "folder"}
    with zipfile.ZipFile(path) as archive:
        for member in progress(archive.infolist(), unit=" files", desc="unpack"):
            kind = "folder" if member.is_dir() else others.get(stat.S_IFMT(member.external_attr >> 16), "device")
            if member.flag_bits & 1:
                kind = "encrypted file"
            yield member.filename, kind, member.file_size, archive.open(member) if kind == "file" else None


def refusal(name, kind):
    "Why a member must not be unpacked, or None. Only plain files and folders below the target are wanted."
    if kind not in ("file", "folder"):
        return f"is a {kind}"
    path = PurePosixPath(name)
    if path.is_absolute() or PureWindowsPath(name).drive or "\\" in name:
        return "has an absolute or foreign path"
    if ".." in path.parts or "\0" in name or (kind == "file" and not path.parts):
        return "would leave the target"
    return None


def unpack(path, folder, dataset):
    """Unpacks a tar (plain, gz, bz2, xz) or zip of `dataset` into the empty `folder`, with ordinary permissions.

    Raises DataError naming the first member that is not a plain file or folder below the target, is there twice or
    exceeds the dataset's limits, or if the archive is damaged. Links are never created, so that no later member can be
    written through one.
    """
    if is_tar(path):
        members = tar_members(path)
    elif zipfile.is_zipfile(path):
        members = zip_members(path)
    else:
        raise DataError(f"{path}: neither a tar nor a zip archive; {dataset.by_hand}")
    files, size = 0, 0
    try:
        for name, kind, length, source in members:
            files, size = files + 1, size + length
            reason = refusal(name, kind)
            target = folder / PurePosixPath(name)
            if not reason and taken(target, kind, folder):
                reason = "is there twice, or in the way of another"
            if not reason and (files > dataset.most_files or size > dataset.most_bytes):
                reason = (f"is beyond the limit for {dataset.name} of {dataset.most_files} files and "
                          f"{dataset.most_bytes / 1e6:g} MB; "
                          "if that is what the dataset has now, raise the limit in the script")
            if reason:
                raise DataError(f"{path}: member {name!r} {reason}, so nothing was unpacked; {dataset.by_hand}")
            (target if kind == "folder" else target.parent).mkdir(parents=True, exist_ok=True)
            if kind == "file":
                with source, open(target, "wb") as file:
                    shutil.copyfileobj(source, file, BLOCK)
    except BROKEN_ARCHIVE as error:
        message = f"{path}: the archive is damaged ({error}), so nothing was unpacked; {dataset.by_hand}"
        raise DataError(message) from None


def is_tar(path):
    "Whether the file begins as a tar archive does, compressed or not."
    try:
        with tarfile.open(path, tarinfo=Header):
            return True
    except BROKEN_ARCHIVE:
        return False


def taken(target, kind, folder):
    "Whether something that was unpacked before stands where `target` (a file or folder below `folder`) is to be."
    if target.exists():
        return kind == "file" or not target.is_dir()
    return any(parent.is_file() for parent in target.parents if parent.is_relative_to(folder))


def install(dataset, path, out):
    "Unpacks the archive beside `out`, checks the layout, then renames: `out` appears whole or not at all."
    staging = out.with_name(f".{out.name}.unpacking")
    shutil.rmtree(staging, ignore_errors=True)  # what a killed run left
    staging.mkdir()
    try:
        unpack(path, staging, dataset)
        inner = staging / dataset.top_folder
        whole = inner if inner.is_dir() else staging
        problems = dataset.problems(whole)
        if problems:
            raise DataError(f"{path}: is not the whole of {dataset.name}, so nothing was installed: "
                            f"{summary(problems)}; {dataset.by_hand}")
        if out.is_dir():
            out.rmdir()  # empty, checked by main
        os.rename(whole, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def summary(problems):
    "The first three problems in one line, and how many more there are."
    return "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")


# ---- command line

class Parser(argparse.ArgumentParser):
    "An argument parser whose errors are one line."

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parse(dataset, arguments):
    parser = Parser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Fetches {dataset.name}, checks it and lays it out.\n"
                    f"Page: {dataset.page}\nLicence: {dataset.licence}",
        epilog="Run the same command again to go on with an interrupted download.\n\nexample:\n"
               f"  python data_scripts/%(prog)s --out {dataset.folder}\n"
               f"  python data_scripts/%(prog)s --out {dataset.folder} --check")
    parser.add_argument("--out", type=Path, default=Path(dataset.folder), metavar="FOLDER",
                        help="where the dataset goes (default: %(default)s); the archive is kept beside it")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--archive", type=Path, metavar="FILE", help="use this archive, downloaded by hand")
    source.add_argument("--url", default=dataset.url, help="download the archive from a mirror")
    source.add_argument("--check", action="store_true", help="only list what an existing folder lacks")
    parser.add_argument("--accept-any-hash", action="store_true",
                        help="go on with an archive that is not the published one (a mirror's own packing, say)")
    return parser.parse_args(arguments)


def check(dataset, out):
    "Prints what `out` lacks, one line each; raises DataError if it lacks anything."
    if not out.is_dir():
        raise DataError(f"{out}: no such folder; name the dataset's folder with --out")
    problems = dataset.problems(out)
    for problem in problems:
        print(problem)
    if problems:
        raise DataError(f"{out}: not the whole of {dataset.name}, {len(problems)} lines above say what is missing; "
                        "move the folder away and run without --check to fetch it")
    print(f"{out}: {dataset.name} is complete")


def get(dataset, options):
    "Brings the dataset to `options.out`; does nothing if it is there already."
    out = options.out
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; name a folder with --out")
    if out.is_dir() and any(out.iterdir()):
        problems = dataset.problems(out)
        if problems:
            raise DataError(f"{out}: not empty and not the whole of {dataset.name} ({summary(problems)}); "
                            "move it away or choose another --out")
        print(f"{out}: {dataset.name} is already complete, nothing to do")
        return
    if urllib.parse.urlsplit(options.url).scheme not in ("http", "https"):
        raise DataError(f"--url {options.url}: not a web address (http or https); for a local file use --archive")
    if options.archive and not options.archive.is_file():
        raise DataError(f"--archive {options.archive}: no such file; {dataset.by_hand}")
    print(f"{dataset.name}: licence {dataset.licence}, {dataset.page}")
    out.parent.mkdir(parents=True, exist_ok=True)
    path = options.archive or out.parent / dataset.archive
    if not path.exists():
        print(f"downloading {options.url} to {path}", flush=True)
        download(options.url, path, dataset.by_hand)
    check_hash(dataset, path, options.accept_any_hash, put_aside=not options.archive)
    install(dataset, path, out)
    print(f"{out}: {dataset.name} is complete" + ("" if options.archive else f"; {path} is no longer needed"))


def main(dataset, arguments=None):
    "Runs a dataset's command line; returns the exit code: 0 success, 2 bad input or no data, 130 interrupted."
    options = parse(dataset, arguments)
    options.out = options.out.expanduser().resolve()  # a link to a larger disk: unpack there
    try:
        if options.check:
            check(dataset, options.out)
        else:
            get(dataset, options)
        return 0
    except DataError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or options.out}: {error.strerror or error}; choose another --out or make room"
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    print(" ".join(message.split()), file=sys.stderr)
    return 2
