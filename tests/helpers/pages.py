"""Commands of the documentation."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def commands(name: str) -> list[str]:
    """Returns the commands in the code blocks of a page, such as "charades.md", in their order, each in one line."""
    page = (DOCS / name).read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return [line.strip() for block in blocks for line in block.replace("\\\n", "").splitlines()]
