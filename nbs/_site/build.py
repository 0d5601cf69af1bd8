"""Builds the documentation site, without network: `make docs`, or `python nbs/_site/build.py [OUT]`, writes OUT/html/index.html.

Sphinx reads a copy of the notebooks (OUT/source), not the notebooks: in the copy nbdev's directives are gone, cells of the
package have an address, and the pages that can be derived are written: the landing page from README.md, one page of API
reference for every module, one for the matrices.
"""
import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pandas as pd
from bs4 import BeautifulSoup

HERE = Path(__file__).resolve().parent
NOTEBOOKS, REPOSITORY = HERE.parent, HERE.parent.parent
PACKAGE = REPOSITORY / "adiff"

CHAPTERS = {"0": "Core", "1": "Data", "2": "Spaces, diffusion, networks", "3": "Methods", "4": "Scores and figures",
            "5": "Detector, training, runs", "6": "Experiments in batches"}
FOLDERS = {"tutorials": "Tutorials", "": "", "experiments": "Experiments", "experiments/results": "Executed results"}
WORDS = {"auroc": "AUROC", "ap": "AP", "f1": "F1", "pauc": "pAUC", "aupro": "AUPRO"}


def notebooks():
    "Paths in nbs/ without suffix, of every notebook that nbdev would read, sorted: '22_deviation', 'tutorials/01_photo_folder'."
    names = (path.relative_to(NOTEBOOKS).with_suffix("").as_posix() for path in NOTEBOOKS.rglob("*.ipynb"))
    return sorted(name for name in names if not re.search(r"(^|/)[._]", name))


def modules():
    "Name of every module of the package -> its notebook in nbs/, in the notebooks' order."
    found = {}
    for path in PACKAGE.glob("*.py"):
        source = re.search(r"File to edit: \.\./nbs/(.+)\.ipynb\.", path.read_text(encoding="utf-8"))
        if source: found["adiff" if path.stem == "__init__" else f"adiff.{path.stem}"] = source[1]
    return dict(sorted(found.items(), key=lambda item: item[1]))


def link_notebooks(text, known):
    "Markdown in which every `22_deviation` or `nbs/22_deviation.ipynb` in backticks, outside of code, links to that page."
    def link(match):
        name = match[2].removesuffix(".ipynb")
        numbered = re.match(r"(.*/)?\d\d_", name) or match[0].endswith(".ipynb`")
        return f"[{match[0]}](/{name}.ipynb)" if name in known and numbered else match[0]

    parts = re.split(r"(^```.*?^```|\[[^\]]*\]\([^)]*\))", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 2 else re.sub(r"`(nbs/)?([\w/]+(?:\.ipynb)?)`", link, part) for i, part in enumerate(parts))


def tidy(page):
    "An output's HTML with every tag closed, so that it cannot end the page around it, and without links to files of a run."
    soup = BeautifulSoup(page, "html.parser")
    for tag in soup.find_all(href=re.compile(r"^(?!\w+:|//|#)")): del tag["href"]
    return str(soup)


def stage_notebook(name, known):
    "The notebook as the site shows it, as JSON: no directives, no hidden cells, exported cells tagged and with an address."
    notebook, cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")), []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        directives = re.findall(r"^#\| *(\w+)", source, re.MULTILINE)
        if cell["cell_type"] == "markdown":
            if not cells and name.startswith("experiments/results/"):
                source = re.sub(r"^# (.*)", rf"# \1: {Path(name).name}", source)
            cell["source"] = link_notebooks(source, known)
        elif "hide" in directives or not (code := re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE)).strip():
            continue
        else:
            cell["source"] = code
            for data in (output["data"] for output in cell["outputs"] if "text/html" in output.get("data", {})):
                data["text/html"] = tidy("".join(data["text/html"]))
            if {"export", "exports", "exporti"} & set(directives):
                cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "export"]
                address = {"cell_type": "markdown", "id": f"at-{cell['id']}", "metadata": {}, "source": f"(cell-{cell['id']})="}
                cells.append(address)
        cells.append(cell)
    return json.dumps({**notebook, "cells": cells}, ensure_ascii=False)


def toctree(caption, entries):
    "A hidden table of contents: `entries` are page names or (title, page name)."
    lines = [entry if isinstance(entry, str) else f"{entry[0]} <{entry[1]}>" for entry in entries]
    return "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}" if caption else ":maxdepth: 1", "", *lines, "```", ""])


def contents(known, api, extra):
    "The tables of contents of the site: tutorials, the package's chapters, experiments, results, API."
    folders = {folder: [name for name in known if str(Path(name).parent).strip(".") == folder] for folder in FOLDERS}
    for name in known:
        folder = str(Path(name).parent).strip(".")
        if folder not in FOLDERS: folders.setdefault(folder, []).append(name)
    trees = []
    for folder, names in folders.items():
        if folder:
            # Runs of one notebook share its title, so that results are listed by their file's name.
            entries = [(Path(name).name, name) for name in names] if folder == "experiments/results" else names
            if folder == "experiments": entries = [*entries, *extra]
            if entries: trees.append(toctree(FOLDERS.get(folder, folder), entries))
            continue
        for digit in sorted({name[0] for name in names}):
            entries = [(name.replace("_", " ", 1), name) for name in names if name[0] == digit]
            trees.append(toctree(CHAPTERS.get(digit, "More"), entries))
    return "".join([*trees, toctree("Reference", ["api/index", "bad_inputs"])])


def landing_page(known):
    "README.md with links into the site; what the site does not hold is named, not linked."
    def local(match):
        text, target = match[1], match[2]
        if re.match(r"https?:|#", target): return match[0]
        inside = target.removeprefix("nbs/")
        return f"[{text}]({inside})" if target != inside and (NOTEBOOKS / inside.split("#")[0]).is_file() else text

    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    return link_notebooks(re.sub(r"(?<!!)\[([^\]]*)\]\(([^)]*)\)", local, text), known)


def api_page(module, notebook):
    "One module's reference as reStructuredText: a table of its names, then each with its docstring."
    title = f"``{module}``"
    return "\n".join([title, "=" * len(title), "", f"Defined in the notebook :doc:`{notebook} </{notebook}>`.", "",
                      f".. automodule:: {module}", ""])


def api_index(api):
    "The list of all modules by chapter, each with the first sentence of its docstring."
    pages = "\n".join(f"   {module}" for module in api)
    parts = ["API reference", "=============", "",
             "What every module offers. The link at the right of every name leads to the notebook's cell that defines it.", ""]
    for digit in sorted({notebook[0] for notebook in api.values()}):
        names = [f"   {module}" for module, notebook in api.items() if notebook[0] == digit]
        parts += [CHAPTERS.get(digit, "More"), "-" * 40, "", ".. autosummary::", "", *names, ""]
    return "\n".join([*parts, ".. toctree::", "   :hidden:", "", pages, ""])


def published_page(path):
    "The means of published.csv: per dataset and setting, a row per method and a column per metric; in percent."
    rows = pd.read_csv(path, dtype=str, keep_default_na=False).query("category == 'mean'")
    parts = ["# Published numbers", "", "Means over categories, in percent, as their sources print them; an empty cell: not available. With the "
             "numbers of single categories: {download}`published.csv`.", ""]
    for (dataset, setting), part in rows.groupby(["dataset", "setting"]):
        metrics, sources = list(part.metric.unique()), []
        header = ["method", "venue", *(" ".join(WORDS.get(word, word) for word in metric.split("_")) for metric in metrics), "source"]
        parts += [f"## {dataset}, {setting}", "", f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        for (method, venue), row in part.groupby(["method", "venue"], sort=False):
            values = [" ".join(row.value[row.metric == metric]) for metric in metrics]
            source = "; ".join(dict.fromkeys(filter(None, [*row.source, *row.note])))
            if source not in sources: sources.append(source)
            cells = [method, venue, *values, str(sources.index(source) + 1)]
            parts.append("| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |")
        parts += ["", *(f"{number}. {source}" for number, source in enumerate(sources, 1)), ""]
    return "\n".join(parts)


def matrices_page(paths):
    "The YAML files of experiments/matrices, each as it is."
    parts = ["# Matrices", "", "What `adiff reproduce NAME` runs: one file per set of experiments.", ""]
    for path in paths: parts += [f"## {path.stem}", "", f"```{{literalinclude}} matrices/{path.name}", ":language: yaml", "```", ""]
    return "\n".join(parts)


def stage(source):
    "Writes everything Sphinx reads to the new folder `source`."
    known, api, files = notebooks(), modules(), {}
    for path in NOTEBOOKS.rglob("*"):
        inside = path.relative_to(NOTEBOOKS)
        if path.is_file() and path.suffix != ".ipynb" and not any(part[0] in "._" for part in inside.parts):
            files[str(inside)] = path.read_bytes()
    files |= {f"{name}.ipynb": stage_notebook(name, known) for name in known}
    files |= {f"api/{module}.rst": api_page(module, notebook) for module, notebook in api.items()}
    files["api/index.rst"] = api_index(api)
    matrices = sorted((NOTEBOOKS / "experiments/matrices").glob("*.yaml"))
    if matrices: files["experiments/matrices.md"] = matrices_page(matrices)
    published = NOTEBOOKS / "experiments/published.csv"
    if published.is_file(): files["experiments/published.md"] = published_page(published)
    extra = [name for name in ("experiments/matrices", "experiments/published") if f"{name}.md" in files]
    files["index.md"] = landing_page(known) + contents(known, api, extra)
    for name, content in files.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def main():
    parser = argparse.ArgumentParser(description="Build the documentation site from the notebooks, without network.")
    parser.add_argument("out", nargs="?", type=Path, default=REPOSITORY / "_docs", help="folder to write (default: _docs)")
    out = parser.parse_args().out.resolve()
    try: from sphinx.cmd.build import main as sphinx_build
    except ImportError: sys.exit("adiff: the site needs Sphinx: pip install -c constraints.txt -e '.[docs]'")
    # An earlier build would leave the pages of notebooks that are gone; only a folder that looks like one is cleared.
    if (out / "source/api/index.rst").is_file():
        for name in ("source", "doctrees", "html", "jupyter_execute"): shutil.rmtree(out / name, ignore_errors=True)
    stage(out / "source")
    sys.exit(sphinx_build(["-W", "--keep-going", "-q", "-c", str(HERE), "-d", str(out / "doctrees"), str(out / "source"), str(out / "html")])
             or print(f"site: {os.path.relpath(out / 'html/index.html')}"))


if __name__ == "__main__":
    main()
