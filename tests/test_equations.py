"nbs/equations.md: every notebook, cell, function and line that it names exists."
import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parent.parent/"nbs"
PAGE = (NOTEBOOKS/"equations.md").read_text(encoding="utf-8")
ROW = re.compile(r"\| (?P<what>[^|]+) \| (?P<equation>.+) \| \[(?P<name>[^\]]+)\]\((?P<notebook>[^)]+)\) "
                 r"\| `(?P<cell>\w+)` \| (?:`(?P<function>[\w.]+)` )?\| `(?P<line>[^`]+)` \|")
rows = [match.groupdict() for line in PAGE.splitlines() if (match := ROW.fullmatch(line))]


def test_every_row_is_read():
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    assert len(rows) == len(lines) - 2  # but for the heads of the two tables
    assert len(rows) > 30


@pytest.mark.parametrize("row", rows, ids=[f"{row['name']}-{row['what']}" for row in rows])
def test_the_line_is_where_the_table_says(row):
    assert row["notebook"] == f"{row['name']}.ipynb"
    cells = json.loads((NOTEBOOKS/row["notebook"]).read_text(encoding="utf-8"))["cells"]
    source = "".join(next(cell["source"] for cell in cells if cell["id"] == row["cell"]))
    assert row["line"] in source
    for name in (row["function"] or "").split("."):
        assert not name or re.search(rf"^\s*(def|class) {name}\b", source, re.MULTILINE)
