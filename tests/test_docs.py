"""The documentation site: built without network, every link leads somewhere, every name to its cell."""
import ast
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from urllib.parse import unquote

import pytest

pytestmark = pytest.mark.slow

NEEDS = ("sphinx", "myst_nb", "furo", "sphinx-mathjax-offline")


class Page(HTMLParser):
    "What a test needs of one page: ids, links, what the browser loads, and the notebook link of every signature."

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads, self.notebook, self.signature = set(), [], [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids.update(filter(None, [values.get("id"), values.get("name") if tag == "a" else None]))
        if tag == "dt":
            self.signature = values.get("id")
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
            if "notebook-link" in (values.get("class") or ""):
                self.notebook[self.signature] = values["href"]
        self.loads += [values[key] for key in ("src", "data", "poster") if values.get(key)]
        if tag == "link" and values.get("rel") in ("stylesheet", "preload", "icon"):
            self.loads.append(values["href"])


@pytest.fixture(scope="session")
def site(repository, tmp_path_factory):
    missing = [name for name in NEEDS if not find_spec(name)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install -c constraints.txt -e '.[lab]'")
    out = tmp_path_factory.mktemp("docs")
    built = subprocess.run([sys.executable, repository / "nbs/_site/build.py", out], cwd=out, capture_output=True,
                           text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return out / "html"


@pytest.fixture(scope="session")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def public_names(repository):
    "Module -> names in its __all__, read without importing."
    for path in sorted((repository / "adiff").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.stem == "_modidx" or "__all__ = " not in text:
            continue
        tree = ast.parse(text)
        names = next(node.value for node in tree.body if isinstance(node, ast.Assign)
                     and node.targets[0].id == "__all__")
        taken = {alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom)
                 for alias in node.names}
        module = ".".join(["adiff",
                           *path.relative_to(repository / "adiff").with_suffix("").parts]).removesuffix(".__init__")
        yield module, [name for name in ast.literal_eval(names) if name not in taken]


def test_every_notebook_has_a_page_without_directives(repository, site):
    for path in (repository / "nbs").rglob("*.ipynb"):
        if any(part.startswith((".", "_")) for part in path.relative_to(repository).parts):
            continue
        page = (site / path.relative_to(repository / "nbs")).with_suffix(".html")
        assert page.is_file(), path.name
        assert not re.search(r'<span class="c1">#\|', page.read_text(encoding="utf-8")), path.name


def test_every_public_name_leads_to_the_cell_that_defines_it(repository, site, pages):
    for module, names in public_names(repository):
        page = pages[f"api/{module}.html"]
        for name in names:
            target, _, cell = page.notebook[f"{module}.{name}"].partition("#")
            assert cell in pages[target.removeprefix("../")].ids, (module, name, target, cell)
            path = (repository / "nbs" / target.removeprefix("../")).with_suffix(".ipynb")
            notebook = json.loads(path.read_text(encoding="utf-8"))
            source = next("".join(c["source"]) for c in notebook["cells"] if f"cell-{c['id']}" == cell)
            assert re.search(rf"^(def|class) {name}\b|^(\w+, )*{name}(, \w+)* *(:[^=\n]+)?=", source,
                             re.MULTILINE), (module, name)


def test_no_link_is_broken_and_nothing_comes_from_elsewhere(site, pages):
    broken, foreign = [], []
    for name, page in pages.items():
        for link in [*page.links, *page.loads]:
            if re.match(r"data:|mailto:", link):
                continue
            if re.match(r"(\w+:)?//", link):
                if link in page.loads:
                    foreign.append((name, link))
                continue
            path, _, fragment = unquote(link).partition("#")
            path = path.partition("?")[0]
            target = (site / name).parent / path if path else site / name
            if not target.is_file():
                broken.append((name, link))
            elif fragment and target.suffix == ".html":
                if fragment not in pages[target.resolve().relative_to(site.resolve()).as_posix()].ids:
                    broken.append((name, link))
    for path in site.rglob("*.css"):
        foreign += re.findall(r"""(?:url\(|@import)\s*['"]?(?:https?:)?//[^)'"]*""", path.read_text(encoding="utf-8"))
    assert (broken, foreign) == ([], [])


def test_the_site_names_no_path_of_the_machine(repository, site):
    private = [str(repository).encode(), sys.prefix.encode(), str(site.parent).encode()]
    assert [path for path in site.rglob("*") if path.is_file()
            and any(name in path.read_bytes() for name in private)] == []


def test_formulas_are_drawn_from_disk(site, tmp_path):
    page = site / "diffusion/05_partial_noising.html"
    text = page.read_text(encoding="utf-8")
    assert text.count(r"\[") >= 4 and "tex-svg-full.js" in text
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs chromium to see the formulas drawn")
    shown = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu",
                            "--host-resolver-rules=MAP * ~NOTFOUND",
                            f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000", "--dump-dom", page.as_uri()],
                           capture_output=True, text=True, timeout=120).stdout
    assert shown.count("<mjx-container") >= text.count(r"\[") + text.count(r"\(") > 10


def test_search_knows_pages_and_names(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert "diffusion/01_masked" in index and "random_patch_mask" in index
    assert "searchindex.js" in (site / "search.html").read_text(encoding="utf-8")


def test_tables_of_executed_results_are_tables(site):
    page = (site / "experiments/results/baselines.html").read_text()
    assert page.count("<table") >= 3 and "| variant |" not in page


def test_the_sidebar_shows_titles_by_chapter(site):
    text = (site / "index.html").read_text(encoding="utf-8")
    sidebar = text[text.index('<div class="sidebar-tree">'):text.index("</aside>")]
    captions = re.findall(r'<span class="caption-text">([^<]+)</span>', sidebar)
    assert captions[:5] == ["Guides", "Tutorials", "Core", "Data", "Codecs"] and "Diffusion" in captions
    titles = re.findall(r'<a class="[^"]*reference internal[^"]*" href="[^"]*">([^<]+)</a>', sidebar)
    assert len(titles) > 60 and not [title for title in titles if re.match(r"\d\d[_ ]", title)]
