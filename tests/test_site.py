"""The static site of a matrix: real notebooks, every link, no network, and a real browser."""
import json
import re
import shutil
import subprocess
import sys
from urllib.parse import unquote, urlsplit

import nbformat
import papermill
import pytest
from bs4 import BeautifulSoup

from adiff.core import InputError, write_json
from adiff.data.demo_images import make_demo_data
from adiff.lab.site import write_site

pytestmark = pytest.mark.slow

OVERRIDES = {"data": {"image_size": 32}, "training": {"length": 2, "batch_size": 4, "augmentations": []}}
STRANGE = '<b>&"x'
RUNS = {"good-1": "deco, seed 0", f"{STRANGE}-2": STRANGE, "half-3": "deco, seed 2", "each-4": "one each",
        "never-5": "deco, seed 4"}


@pytest.fixture(scope="module")
def matrix(repository, tmp_path_factory):
    "What `adiff reproduce` leaves: runs that finished, failed, were killed, have several folders, have not begun."
    folder = tmp_path_factory.mktemp("site") / "out of <it>"
    runs = [{"label": label, "folder": f"runs/{name}", "identity": name, "group": "images",
             "axes": {"method": label[:4], "seed": 10 - seed}}
            for seed, (name, label) in enumerate(RUNS.items())]
    write_json(folder / "matrix.json", {"matrix": "tiny", "description": "<i>A</i> test.",
                                        "command": "adiff reproduce tiny", "runs": runs})

    good = folder / "runs/good-1"
    good.mkdir(parents=True)
    data = make_demo_data(folder.parent / "demo", categories=("cup",), train=4, good=2, per_defect=1)
    parameters = {"data_root": str(data), "out_dir": str(good), "device": "cpu", "overrides": json.dumps(OVERRIDES)}
    papermill.execute_notebook(repository / "nbs/experiments/deco_image.ipynb", good / "notebook.ipynb", parameters,
                               progress_bar=False)
    write_json(good / "run.json", {**runs[0], "matrix": "tiny", "notebook": "deco_image.ipynb",
                                   "parameters": parameters})
    write_json(good / "done.json", {"identity": "good-1", "seconds": 100.0, "finished": "2026-01-01T12:00:00"})

    bad = folder / "runs" / f"{STRANGE}-2"
    bad.mkdir()
    cells = [nbformat.v4.new_code_cell(f"raise ValueError('{STRANGE}')"), nbformat.v4.new_markdown_cell(
        '![badge](https://example.org/badge.svg) ![plot](plot.png) [gone](gone.txt) '
        '<script src="https://example.org/require.js"></script>')]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), bad / "in.ipynb")
    with pytest.raises(papermill.PapermillExecutionError):
        papermill.execute_notebook(bad / "in.ipynb", bad / "notebook.ipynb", progress_bar=False, kernel_name="python3")
    shutil.copy(good / "figures/loss.png", bad / "plot.png")
    (bad / "log.txt").write_text("".join(f"line {n}\n" for n in range(100))
                                 + f"step: 1%\rstep: 100%\nValueError: {STRANGE}\n")
    write_json(bad / "failed.json", {"error": f"ValueError: {STRANGE}", "seconds": 20.0,
                                     "finished": "2026-01-01T12:00:00"})

    (folder / "runs/half-3").mkdir()
    (folder / "runs/half-3/log.txt").write_text("training: 10%")
    (folder / "runs/half-3/notebook.ipynb").write_text('{"cells": [{"cell')

    each = folder / "runs/each-4"
    shutil.copytree(good, each / "cup", ignore=shutil.ignore_patterns("model", "checkpoints", "*.ipynb", "done.json",
                                                                      "run.json"))
    for name in ("notebook.ipynb", "metrics.json", "done.json"):
        shutil.copy(good / name, each / name)

    (folder / "tables").mkdir()
    (folder / "tables/cup.html").write_text('<h3>Cup</h3><table><tr><th>DeCo-Diff</th>'
                                            '<td><a href="../runs/good-1/notebook.ipynb">99.1</a></td>'
                                            '<td><a href="https://example.org/paper">98.0</a></td></tr></table>'
                                            '<p>A note.</p>')
    (folder / "tables/results.csv").write_text("value\n0.991\n")
    (folder / "figures").mkdir()
    shutil.copy(good / "figures/loss.png", folder / "figures/a & b.png")
    (folder / "figures/a & b.txt").write_text(f"Caption of {STRANGE}.\n")
    shutil.copy(good / "notebook.ipynb", folder / "figures.ipynb")
    write_site(folder)
    return folder


def pages(folder):
    return {path: BeautifulSoup(path.read_text(), "html.parser") for path in sorted((folder / "site").rglob("*.html"))}


def chromium(*arguments):
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs chromium to open the pages in a browser")
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def test_one_page_per_run_that_has_begun(matrix):
    found = {path.name for path in (matrix / "site/runs").iterdir()}
    assert found == {f"{page_name(name)}.html" for name in RUNS if name != "never-5"}
    text = (matrix / "site/index.html").read_text()
    index = BeautifulSoup(text, "html.parser")
    states = [row["data-state"] for row in index.select(".runs tbody tr")]
    assert states == ["finished", "failed", "unfinished", "finished", "not run"]
    assert "adiff reproduce tiny" in text and "A note." in text
    assert index.select_one("section.table a")["href"] == "runs/good-1.html"
    assert index.select_one("figcaption").text.strip() == f"Caption of {STRANGE}."


def page_name(name):
    "The name of a run's page: its folder's, where a document of Sphinx may be called so."
    return re.sub(r"[^\w.=+-]", "_", name)


def test_a_finished_run_shows_its_notebook(matrix):
    page = BeautifulSoup((matrix / "site/runs/good-1.html").read_text(), "html.parser")
    assert len(page.select("article img[src^='data:image/png']")) >= 4
    assert page.select_one("article table").find("th", string="cup") and "mask" in page.select_one("ul.notes").text
    assert not page.select("article .output.stderr") and page.select("article details")
    assert {"report.html", "config.json", "notebook.ipynb"} <= {link.text for link in page.select("dd a")}
    assert page.select_one("article a[href='../index.html#runs']").text == "All runs"
    assert [title.text.rstrip("¶") for title in page.select("h1")] == ["deco, seed 0"]
    each = BeautifulSoup((matrix / "site/runs/each-4.html").read_text(), "html.parser")
    assert "../../runs/each-4/cup/report.html" in {link["href"] for link in each.select("dd a")}


def test_a_failed_run_shows_its_error_and_the_end_of_its_log(matrix):
    page = BeautifulSoup((matrix / "site/runs" / f"{page_name(STRANGE)}-2.html").read_text(), "html.parser")
    assert page.select_one("h1").text.rstrip("¶") == STRANGE
    assert page.select_one(".error").text == f"ValueError: {STRANGE}"
    log = page.select_one("pre.log").text.split("\n")
    assert len(log) == 40 and log[-2:] == ["step: 100%", f"ValueError: {STRANGE}"]
    assert page.select_one("article img[alt=plot]")["src"].endswith("-2/plot.png") and not page.find("a", string="gone")
    assert "cannot be read" in (matrix / "site/runs/half-3.html").read_text()


def test_nothing_given_is_taken_for_markup(matrix):
    for path, page in pages(matrix).items():
        assert STRANGE not in path.read_text(), path
        assert not page.select(".sidebar-tree b, h1 b, td b, dd b, figcaption b, p > i"), path


def test_every_link_leads_somewhere_also_elsewhere(matrix, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(matrix, moved)
    shutil.move(matrix, matrix.with_name("away"))
    try:
        links = [(path, page, tag.get("href") or tag.get("src")) for path,
                 page in pages(moved).items() for tag in page.select("[href], [src]")]
        inner = [(path, page, urlsplit(link)) for path, page, link in links
                 if not link.startswith(("data:", "https://"))]
        assert len(inner) > 30
        for path, _, link in inner:
            target = path if not link.path else path.parent / unquote(link.path)
            assert not link.scheme and not link.path.startswith("/") and target.exists(), (path, link)
            assert not link.fragment or has_place(target, link.fragment), (path, link)
    finally:
        shutil.move(matrix.with_name("away"), matrix)


def has_place(target, name):
    page = BeautifulSoup(target.read_text(), "html.parser")
    return page.find(id=unquote(name)) or page.find(attrs={"name": unquote(name)})


def test_no_page_needs_the_network(matrix):
    for path, page in pages(matrix).items():
        loaded = [tag["src"] for tag in page.select("[src]")] + [tag["href"] for tag in page.select("link[href]")]
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], path
        assert "example.org/require" not in path.read_text(), path
        assert "default-src 'self'" in page.select_one("meta[http-equiv='Content-Security-Policy']")["content"], path
    for path in (matrix / "site").rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", path.read_text()), path


def test_the_second_time_only_what_changed_is_rendered(matrix):
    (matrix / "runs/half-3/notebook.ipynb").unlink()
    write_site(matrix)
    before = {path: path.stat().st_mtime_ns for path in (matrix / "site/runs").rglob("*.html")}
    write_site(matrix)
    assert before == {path: path.stat().st_mtime_ns for path in (matrix / "site/runs").rglob("*.html")}
    notebook = matrix / "runs/each-4/notebook.ipynb"
    notebook.write_text(notebook.read_text().replace("## Train", "## Learn"))
    write_site(matrix)
    changed = {path.name for path in before if path.stat().st_mtime_ns != before[path]}
    assert changed == {"each-4.html"} and "Learn" in (matrix / "site/runs/each-4.html").read_text()


def test_another_folder_and_runs_that_left(matrix, tmp_path):
    other = write_site(matrix, tmp_path / "elsewhere").parent
    page = BeautifulSoup((other / "runs/good-1.html").read_text(), "html.parser")
    link = page.find("a", string="report.html")["href"]
    assert (other / "runs" / unquote(link)).exists()
    (other / "runs/notes.html").write_text("somebody else's")
    shorter = tmp_path / "shorter"
    shutil.copytree(matrix, shorter)
    plan = json.loads((shorter / "matrix.json").read_text())
    write_json(shorter / "matrix.json", {**plan, "runs": plan["runs"][:1]})
    write_site(shorter, other)
    assert {path.name for path in (other / "runs").iterdir()} == {"good-1.html", "notes.html"}
    with pytest.raises(InputError, match="matrix.json"):
        write_site(tmp_path)


def test_import_leaves_torch_alone():
    code = "import adiff.lab.site, sys; print([name for name in ('torch', 'sphinx') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout.strip() == "[]"


def test_in_a_browser(matrix):
    index = matrix / "site/index.html"
    click = """<script>
    const seed = [...document.querySelectorAll(".runs thead button")].find(button => button.textContent === "seed");
    const order = () => [...document.querySelectorAll(".runs tbody tr")].map(row => row.cells[3].textContent).join();
    seed.click(); document.body.dataset.up = order(); seed.click(); document.body.dataset.down = order();
    document.querySelector("#words").value = "ONE each"; document.querySelector("#words").dispatchEvent(new
    Event("input")); document.body.dataset.count = document.querySelector("#count").textContent;
    window.addEventListener("load", () => {
      document.body.dataset.width = document.querySelector("figure img").naturalWidth; });</script>"""
    copy = index.with_name("clicked.html")
    copy.write_text(index.read_text().replace('loading="lazy"', "").replace("</body>", f"{click}</body>"))
    try:
        page = BeautifulSoup(chromium("--dump-dom", copy.as_uri()), "html.parser")
    finally:
        copy.unlink()
    assert page.body["data-up"] == "6,7,8,9,10" and page.body["data-down"] == "10,9,8,7,6"
    assert int(page.body["data-width"]) > 100
    assert page.body["data-count"] == "1 of 5" and len(page.select(".runs tbody tr[hidden]")) == 4
    failed = index.parent / "runs" / f"{page_name(STRANGE)}-2.html"
    run = BeautifulSoup(chromium("--dump-dom", failed.as_uri()), "html.parser")
    assert run.select_one("h1").text.rstrip("¶") == STRANGE and run.select_one("article .output.traceback")
