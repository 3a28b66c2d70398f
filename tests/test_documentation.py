"""The table of faults in the documentation names tests that exist."""

import re

from tests.launch import ROOT


def test_every_row_of_the_fault_table_names_its_tests():
    text = (ROOT / "docs" / "pretraining.md").read_text(encoding="utf-8").partition("## Fault tolerance")[2]
    rows = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        links = re.findall(r"\[(\w+)\]\(\.\./tests/([\w/]+\.py)\)", row.rstrip(" |").rpartition("|")[2])
        assert links, row
        for name, path in links:
            assert f"def test_{name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), (name, path)
