"""The documents: every link leads to a file and a heading that exist."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def anchors(page: Path) -> set[str]:
    """Return what a link to each heading of a page has after its #, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    link = r"""(?:\]\(|src=")(?!https?:)([^)"#]*)#?([^)"]*)[)"]"""  # Markdown's, and of <img>
    links = re.findall(link, page.read_text(encoding="utf-8"))
    assert links
    for file, anchor in links:
        target = (page.parent / file) if file else page
        assert target.is_file(), file
        assert not anchor or anchor in anchors(target), anchor
