"""Sphinx's settings, and how the package's docstrings become pages: Markdown-like text, links to notebooks' cells."""
import ast
import re
import sys
from configparser import ConfigParser
from functools import cache
from inspect import unwrap
from pathlib import Path
from types import FunctionType

import click
from docutils import nodes
from sphinx import addnodes

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import build  # noqa: E402  found through the line above

from adiff.lab.site import sphinx_settings  # noqa: E402  the checkout's, which build puts first

_parser = ConfigParser(delimiters=["="])
_parser.read(build.REPOSITORY / "settings.ini", encoding="utf-8")
_settings = _parser["DEFAULT"]

project, author, release, language = _settings["lib_name"], _settings["author"], _settings["version"], "en"
project_copyright = _settings["copyright"]
globals().update(sphinx_settings())
extensions += ["sphinx.ext.autodoc", "sphinx.ext.autosummary"]  # noqa: F821  one of the shared settings
html_title = project

autosummary_generate = False
autodoc_default_options = {"members": True, "undoc-members": True, "member-order": "bysource", "no-value": True,
                           "exclude-members": "model_config"}
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
add_module_names = False
toc_object_entries_show_parents = "hide"


@cache
def definitions(module):
    """Name -> (notebook, cell, source, the comment above or beside it) of what `module` defines, from nbdev's markers.

    Names of classes' members are CLASS.MEMBER.
    """
    text = build.module_path(module).read_text(encoding="utf-8")
    lines, found = text.split("\n"), {}
    markers = [re.match(r"# %% (?:\.\./)+nbs/(.+)\.ipynb #(\w+)", line) for line in lines]

    def add(name, node):
        marker = next(filter(None, reversed(markers[:node.lineno])), None)
        start = node.lineno - 1
        while start and lines[start - 1].startswith("# ") and not markers[start - 1]: start -= 1
        beside = re.match(r"\s*# (.+)", lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode())
        comment = " ".join(line[2:] for line in lines[start:node.lineno - 1]) or (beside[1] if beside else "")
        if marker: found[name] = (marker[1], marker[2], ast.get_source_segment(text, node), comment)

    def walk(body, prefix=""):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)): add(prefix + node.name, node)
            if isinstance(node, ast.ClassDef): walk(node.body, f"{prefix}{node.name}.")
            targets = getattr(node, "targets", None) or ([node.target] if isinstance(node, ast.AnnAssign) else [])
            for name in (leaf for target in targets for leaf in ast.walk(target)
                         if isinstance(leaf, ast.Name)): add(prefix + name.id, node)

    walk(ast.parse(text).body)
    return found


def home_of(module, name):
    "What `definitions` knows of a name of `module`, also of one that is another module's; None if it is not ours."
    if name in definitions(module): return definitions(module)[name]
    home = getattr(getattr(sys.modules[module], name.split(".")[0], None), "__module__", None)
    return definitions(home).get(name) if home in build.modules() else None


@cache
def homes():
    "Name -> modules that define it, over the whole package."
    found = {}
    for module in build.modules():
        for name in definitions(module): found.setdefault(name, []).append(module)
    return found


def inline(text, module):
    "One paragraph's text as reStructuredText: `code` stays code, names of the package become links."
    def code(match):
        places = homes().get(match[1].removesuffix("()"), [])
        home = module if module in places else places[0] if len(places) == 1 else None
        return f":py:obj:`{match[1]} <{home}.{match[1].removesuffix('()')}>`" if home else f"``{match[1]}``"

    parts = re.split(r"(`[^`]+`)", text)
    escaped = (re.sub(r"([\\*_|`])", r"\\\1", part.replace(" ... ", " … ")) for part in parts)
    return "".join(re.sub("`(.+)`", code, part) + r"\ " if i % 2 else text for i,
                   (part, text) in enumerate(zip(parts, escaped)))


def to_rst(lines, module):
    """A docstring of plain paragraphs as the lines of reStructuredText.

    Indented paragraphs are code; paragraphs of `- item` or `name: meaning` lines are lists, continued by indented
    lines.
    """
    result = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        rows = paragraph.split("\n")
        fields = [re.match(r"(- )|`?([\w.]+)`?: ", row) for row in rows]
        if all(row.startswith("    ") for row in rows):
            result += ["::", "", *rows, ""]
        elif fields[0] and (fields[0][1] or sum(map(bool, fields)) > 1) and all(field or row[0] == " " for row,
                                                                                field in zip(rows, fields)):
            for row, field in zip(rows, fields):
                if field: result.append("")
                if field and field[2]: result.append(f"* ``{field[2]}``: " + inline(row[field.end():], module))
                else: result.append(("* " if field else "  ") + inline(row.removeprefix("- ").strip(), module))
            result.append("")
        else:
            # The escaped blank keeps a first word such as "(a)" from being taken for the mark of a list.
            result += [r"\ " + inline(" ".join(row.strip() for row in rows), module), ""]
    return result


def constant(thing, name, module):
    "What is shown of a value: the help of a command, or the statement that defines it with the comment above it."
    if isinstance(thing, click.Command):
        main = sys.modules[module].main
        context = click.Context(main, info_name="adiff", **main.context_settings | {"terminal_width": 100})
        if thing is not main: context = click.Context(thing, info_name=thing.name, parent=context)
        return [thing.get_short_help_str(1000), "", ".. code-block:: text", "",
                *(f"   {line}" for line in thing.get_help(context).split("\n")), ""]
    _, _, source, comment = home_of(module, name)
    comment = comment or "".join(re.findall(r"  # (.+)", source.split("\n")[0]))
    code = [".. code-block:: python", "", *(f"   {line}" for line in source.split("\n")), ""]
    return [*(to_rst([comment], module) if comment else []), *code]


def attribute(name, module):
    "What is said about an attribute: description, default and bounds of a configuration's key, else its comment."
    owner, _, key = name.rpartition(".")
    fields = getattr(getattr(sys.modules[module], owner, None), "model_fields", {})
    if key not in fields: return definitions(module).get(name, ("",) * 4)[3]
    field, words = fields[key], {"ge": "at least", "gt": "above", "le": "at most", "lt": "below",
                                 "min_length": "length at least"}
    bounds = [f"{words[bound]} {getattr(limit, bound)}" for limit in field.metadata for bound in words
              if hasattr(limit, bound)]
    default = "" if field.is_required() else f"default `{field.get_default(call_default_factory=True)!r}`"
    return "; ".join(filter(None, [field.description, default, *bounds]))


def process_docstring(app, what, name, thing, options, lines):
    "autodoc's hook: replaces `lines` by reStructuredText."
    module = name if what == "module" else max((m for m in build.modules() if name.startswith(f"{m}.")), key=len)
    name = name.removeprefix(f"{module}.")
    if what == "data": lines[:] = constant(thing, name, module)
    elif what == "attribute": lines.clear()  # see finish_signatures
    else: lines[:] = to_rst(lines, module)
    if what == "module": lines += overview(module)


def skip_foreign(app, what, name, thing, skip, options):
    "autodoc's hook: what a module takes from other packages is not ours to describe."
    return skip or (what == "module" and hasattr(thing, "__module__") and not str(thing.__module__).startswith("adiff"))


def process_signature(app, what, name, thing, options, signature, return_annotation):
    "autodoc's hook: the keys of a configuration are listed below it, so its signature need not repeat them."
    if what == "class" and hasattr(thing, "model_fields"): return "(**keys)", return_annotation


def overview(module):
    "A table of the public names of `module`, then its values, which automodule passes over."
    package = sys.modules[module]
    own = [name for name in package.__all__ if home_of(module, name)]
    names = own or [f"~{home}" for home in getattr(package, "_homes", {}).values()]
    values = [name for name in own if not isinstance(unwrap(getattr(package, name)), (type, FunctionType))]
    table = ["", ".. autosummary::", "   :nosignatures:", "", *(f"   {name}" for name in names), ""] if names else []
    return [*table, *(line for name in values for line in (f".. autodata:: {module}.{name}", ""))]


def finish_signatures(app, tree):
    "Every signature gets a link to its notebook's cell; attributes, which autodoc has no hook for, their words."
    if not app.env.docname.startswith("api/"): return
    for signature in tree.findall(addnodes.desc_signature):
        module, name = signature.get("module"), signature.get("fullname", "")
        if module not in build.modules(): continue
        known = home_of(module, name) or home_of(module, name.split(".")[0])
        notebook, cell, *_ = known or (build.modules()[module], None)
        link = nodes.reference("", "", internal=True, refuri=f"../{notebook}.html" + (f"#cell-{cell}" if cell else ""),
                               classes=["notebook-link"])
        link += nodes.Text(f"[{notebook}]")
        signature += link
        if signature.parent["objtype"] == "attribute" and (text := attribute(name, module)):
            parts = [nodes.literal("", part) if i % 2 else nodes.Text(part) for i, part in enumerate(text.split("`"))]
            signature.parent[-1] += nodes.paragraph("", "", *parts)


def setup(app):
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-skip-member", skip_foreign)
    app.connect("autodoc-process-signature", process_signature)
    app.connect("doctree-read", finish_signatures)
