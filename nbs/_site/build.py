"""Builds the documentation site, without network: `make docs`, or `python nbs/_site/build.py [OUT]`.

The site is OUT/html/index.html, its landing page nbs/index.md. Sphinx reads a copy of the notebooks (OUT/source): in
the copy nbdev directives are gone, cells of the package have an address, and the pages that can be derived are written:
contributing, changes, one page of API reference for every module, the matrices and the published numbers.
"""
import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
NOTEBOOKS, REPOSITORY = HERE.parent, HERE.parent.parent
PACKAGE = REPOSITORY / "adiff"
sys.path.insert(0, str(REPOSITORY))

GUIDES = ("own_files", "trouble", "deployment", "reproduce", "results", "sounds", "ablations", "speed", "gpu", "app",
          "glossary")
CHAPTERS = {"docs": "Guides", "tutorials": "Tutorials", "": "Core", "data": "Data", "codecs": "Codecs",
            "diffusion": "Diffusion",
            "networks": "Networks", "scores": "Scores", "detector": "Detector", "training": "Training",
            "methods": "Methods",
            "runs": "Runs", "lab": "Lab: experiments in batches", "facade": "What import adiff offers",
            "experiments": "Experiments",
            "experiments/results": "Executed results"}  # folder of nbs/ -> caption in the sidebar, in reading order
PAGES = {"CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog", "CODE_OF_CONDUCT.md": "code_of_conduct"}
WORDS = {"auroc": "AUROC", "ap": "AP", "f1": "F1", "pauc": "pAUC", "aupro": "AUPRO"}


def folder_of(name):
    "The folder in nbs/ of a page: '' at the top, and 'facade' for what stands last there."
    return "facade" if re.match("9\\d_", name) else name.rpartition("/")[0]


def pages(suffix):
    "Paths in nbs/ without suffix of every page of a kind, sorted: 'index', 'codecs/01_wavelets', 'docs/speed'."
    names = (path.relative_to(NOTEBOOKS).with_suffix("").as_posix() for path in NOTEBOOKS.rglob(f"*{suffix}"))
    return sorted(name for name in names if not re.search(r"(^|/)[._]", name))


def module_path(module):
    "The file of a module of the package."
    inside = module.partition(".")[2].replace(".", "/")
    return PACKAGE / f"{inside or '__init__'}.py"


def modules():
    "Dotted name of every module of the package -> its notebook in nbs/, chapter by chapter, in the notebooks' order."
    found = {}
    for path in PACKAGE.rglob("*.py"):
        source = re.search(r"File to edit: (?:\.\./)+nbs/(.+)\.ipynb\.", path.read_text(encoding="utf-8"))
        name = ".".join(["adiff", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
        if source: found[name] = source[1]
    order = list(CHAPTERS)
    return dict(sorted(found.items(), key=lambda item: (order.index(folder_of(item[1])), item[1])))


def link_notebooks(text, known):
    "Markdown in which every `codecs/01_wavelets` or `nbs/00_core.ipynb` in backticks links to that page."
    def link(match):
        name = match[2].removesuffix(".ipynb")
        return f"[{match[0]}](/{name}.ipynb)" if name in known and re.search(r"(^|/)\d\d_|\.ipynb$",
                                                                             match[2]) else match[0]

    parts = re.split(r"(^```.*?^```|\[[^\]]*\]\([^)]*\))", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 2 else re.sub(r"`(nbs/)?([\w/]+(?:\.ipynb)?)`", link, part) for i,
                   part in enumerate(parts))


def tidy(page):
    "An output's HTML with every tag closed, so that it cannot end its page, and without links to files of a run."
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(page, "html.parser")
    for tag in soup.find_all(href=re.compile(r"^(?!\w+:|//|#)")): del tag["href"]
    return str(soup)


def stage_notebook(name, known):
    "The notebook as the site shows it, as JSON: no directives, no hidden cells, an address for exported cells."
    notebook, cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")), []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        directives = re.findall(r"^#\| *(\w+)", source, re.MULTILINE)
        if cell["cell_type"] == "markdown":
            if not cells and folder_of(name) == "experiments/results":  # runs of one notebook share its title
                source = re.sub("^# .*", f"# Results: {Path(name).name.replace('_', ' ')}", source)
            cell["source"] = local_links(link_notebooks(source, known), NOTEBOOKS / name)
        elif "hide" in directives or not (code := re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE)).strip():
            continue
        else:
            cell["source"] = code
            for data in (output["data"] for output in cell["outputs"] if "text/html" in output.get("data", {})):
                data["text/html"] = tidy("".join(data["text/html"]))
            if {"export", "exports", "exporti"} & set(directives):
                cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "export"]
                address = f"(cell-{cell['id']})="
                cells.append({"cell_type": "markdown", "id": f"at-{cell['id']}", "metadata": {}, "source": address})
        cells.append(cell)
    return json.dumps({**notebook, "cells": cells}, ensure_ascii=False)


def local_links(text, path):
    "Markdown of the file `path` with links into the site; what the site does not hold is named, not linked."
    def local(match):
        if re.match(r"https?:|mailto:|#|/", match[2]): return match[0]
        words, (target, mark, place) = match[1], match[2].partition("#")
        file, place = (path.parent / target).resolve(), mark + place
        if file.is_relative_to(REPOSITORY) and (page := PAGES.get(file.relative_to(REPOSITORY).as_posix())):
            return f"[{words}](/{page}.md{place})"
        inside = file.is_file() and file.is_relative_to(NOTEBOOKS)
        return f"[{words}](/{file.relative_to(NOTEBOOKS)}{place})" if inside else words

    parts = re.split(r"(^```.*?^```|`[^`\n]*`)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 2 else re.sub(r"(?<!!)\[([^\]\[]*)\]\(([^)\s]*)\)", local, part) for i,
                   part in enumerate(parts))


def stage_markdown(path, known):
    "A Markdown file of the repository as a page."
    return link_notebooks(local_links(path.read_text(encoding="utf-8"), path), known)


def toctree(caption, entries):
    "A hidden table of contents: `entries` are page names; the sidebar shows their titles."
    return "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```", ""])


def contents(notebooks, extra):
    "The tables of contents of the site: the chapters, the API reference and cards, the project's pages."
    trees = []
    for folder, caption in CHAPTERS.items():
        entries = [name for name in notebooks if folder_of(name) == folder]
        if folder == "docs": entries = [f"docs/{name}" for name in GUIDES if (NOTEBOOKS / f"docs/{name}.md").is_file()]
        if folder == "experiments": entries += extra
        if entries: trees.append(toctree(caption, entries))
    cards = [name for name in pages(".md") if name != "index" and folder_of(name) != "docs"]
    project = [page for name, page in PAGES.items() if (REPOSITORY / name).is_file()]
    return "".join([*trees, toctree("Reference", ["api/index", *cards]), toctree("The project", project)])


def api_page(module, notebook):
    "One module's reference as reStructuredText: a table of its names, then each with its docstring."
    return "\n".join([module, "=" * len(module), "", f"Defined in the notebook :doc:`/{notebook}`.", "",
                      f".. automodule:: {module}", ""])


def api_index(api):
    "The list of all modules by chapter, each with the first sentence of its docstring."
    parts = ["API reference", "=============", "",
             "What every module offers. The link at the right of every name leads to the notebook's cell that defines "
             "it.", ""]
    for folder, caption in CHAPTERS.items():
        if names := [f"   {module}" for module, notebook in api.items() if folder_of(notebook) == folder]:
            parts += [caption, "-" * len(caption), "", ".. autosummary::", "", *names, ""]
    return "\n".join([*parts, ".. toctree::", "   :hidden:", "", *(f"   {module}" for module in api), ""])


def published_page(path):
    "The means of published.csv: per dataset and setting, a row per method and a column per metric; in percent."
    rows = pd.read_csv(path, dtype=str, keep_default_na=False).query("category == 'mean'")
    parts = ["# Published numbers", "",
             "Means over categories, in percent, as their sources print them; an empty cell: not "
             "available. With the numbers of single categories: {download}`published.csv`.", ""]
    for (dataset, setting), part in rows.groupby(["dataset", "setting"]):
        metrics, sources = list(part.metric.unique()), []
        titles = (" ".join(WORDS.get(word, word) for word in metric.split("_")) for metric in metrics)
        header = ["method", "venue", *titles, "source"]
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
    for path in paths: parts += [f"## {path.stem}", "", f"```{{literalinclude}} matrices/{path.name}",
                                 ":language: yaml", "```", ""]
    return "\n".join(parts)


def stage(source):
    "Writes everything Sphinx reads to the new folder `source`."
    known, api, files = pages(".ipynb"), modules(), {}
    for path in NOTEBOOKS.rglob("*"):  # pictures, tables
        inside = path.relative_to(NOTEBOOKS)
        if path.is_file() and path.suffix not in (".ipynb", ".py") and not any(part[0] in "._"
                                                                               for part in inside.parts):
            files[inside.as_posix()] = path.read_bytes()
    files |= {f"{name}.ipynb": stage_notebook(name, known) for name in known}
    files |= {f"{name}.md": stage_markdown(NOTEBOOKS / f"{name}.md", known) for name in pages(".md")}
    files |= {f"{page}.md": stage_markdown(REPOSITORY / name, known) for name, page in PAGES.items()
              if (REPOSITORY / name).is_file()}
    files |= {f"api/{module}.rst": api_page(module, notebook) for module, notebook in api.items()}
    files["api/index.rst"] = api_index(api)
    files["experiments/matrices.md"] = matrices_page(sorted((NOTEBOOKS / "experiments/matrices").glob("*.yaml")))
    files["experiments/published.md"] = published_page(NOTEBOOKS / "experiments/published.csv")
    files["index.md"] += contents(known, ["experiments/matrices", "experiments/published"])
    for name, content in files.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def main():
    parser = argparse.ArgumentParser(description="Build the documentation site from the notebooks, without network.")
    parser.add_argument("out", nargs="?", type=Path, default=REPOSITORY / "_docs",
                        help="folder to write (default: _docs)")
    out = parser.parse_args().out.resolve()
    try: from sphinx.cmd.build import main as sphinx_build
    except ImportError: sys.exit("adiff: the site needs Sphinx: pip install -c constraints.txt -e '.[lab]'")
    # An earlier build would leave the pages of notebooks that are gone; only a folder that looks like one is cleared.
    if (out / "source/api/index.rst").is_file():
        for name in ("source", "doctrees", "html", "jupyter_execute"): shutil.rmtree(out / name, ignore_errors=True)
    stage(out / "source")
    settings = ["-W", "--keep-going", "-q", "-c", str(HERE), "-d", str(out / "doctrees")]
    failed = sphinx_build([*settings, str(out / "source"), str(out / "html")])
    sys.exit(failed or print(f"site: {os.path.relpath(out / 'html/index.html')}"))


if __name__ == "__main__":
    main()
