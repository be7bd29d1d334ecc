"""The code of the docs' pages for users runs as printed, each page from top to bottom."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAGES = ["codecs.md", *sorted(f"tutorials/{page.name}" for page in DOCS.glob("tutorials/*.md"))]
NEEDS = {"tutorials/own_models.md": "equinox"}  # packages beyond jaxkv[models]


def test_there_are_five():
    assert len(PAGES) == 5


@pytest.mark.parametrize("name", PAGES)
def test_page_runs(name, capsys):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    text = (DOCS / name).read_text(encoding="utf-8")
    assert len(BLOCK.findall(text)) >= 3
    # Empty lines in place of the prose: an error names the page's own line.
    code = BLOCK.sub(lambda block: f"\0{block.group(0)}\0", text).split("\0")
    keep = lambda part: part if part.startswith("```python\n") else re.sub(r".+", "", part)
    code = "".join(map(keep, code)).replace("```python\n", "\n").replace("```", "")
    exec(compile(code, str(DOCS / name), "exec"), {"__name__": "tutorial"})
    assert capsys.readouterr().out
