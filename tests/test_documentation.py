"""The documentation names tests, files, sections, names and messages that exist."""

import ast
import pydoc
import re
import unicodedata
from functools import cache
from importlib.util import find_spec

import pytest

import mocov3_hf
from tests.launch import ROOT


PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("**/*.md")])
FENCED = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def text_of(path):
    return path.read_text(encoding="utf-8")


def test_every_row_of_the_fault_table_names_its_tests():
    text = text_of(ROOT / "docs" / "pretraining.md").partition("## Fault tolerance")[2]
    rows = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        links = re.findall(r"\[(\w+)\]\(\.\./tests/([\w/]+\.py)\)", row.rstrip(" |").rpartition("|")[2])
        assert links, row
        for name, path in links:
            assert f"def test_{name}(" in text_of(ROOT / "tests" / path), (name, path)


@cache
def anchors(page):
    """The anchors of the headings of a page, as GitHub and MkDocs make them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", FENCED.sub("", text_of(page)), re.MULTILINE):
        plain = unicodedata.normalize("NFKC", re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading)).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", FENCED.sub("", text_of(page)))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


@cache
def messages():
    """Patterns of all texts of the package, with anything in the place of what is filled in."""
    found = []
    for path in sorted((ROOT / "src").glob("**/*.py")):
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [node.value]
            else:
                continue
            if sum(len(part) for part in parts if part is not None) >= 20:
                found.append(re.compile("".join(".*" if part is None else re.escape(part) for part in parts)))
    return found


def is_message(line):
    """Whether the texts of the package that occur in a line make up most of it."""
    spans = [match.span() for pattern in messages() if (match := pattern.search(line))]
    return len({place for begin, end in spans for place in range(begin, end)}) > 0.7 * len(line)


def test_quoted_messages_are_those_of_the_program():
    blocks = [
        body for _, kind, body in FENCED.findall(text_of(ROOT / "docs" / "troubleshooting.md")) if kind == "text"
    ]
    lines = [line.strip() for body in blocks for line in body.splitlines()]
    assert len(lines) > 12
    for line in lines:
        assert is_message(line) or is_message(re.sub(r"^(warning|error): ", "", line)), line
    assert not is_message("the gradient norm was unusual, so the run was ended by the detector")


def test_the_api_reference_has_every_public_name():
    reference = text_of(ROOT / "docs" / "api.md")
    described = re.findall(r"^::: ([\w.]+)$", reference, re.MULTILINE)
    assert "mocov3_hf" in described  # with everything in `__all__`
    for name in described:
        assert pydoc.locate(name) is not None, name
    for name in mocov3_hf.__all__:
        assert name.startswith("__") or getattr(mocov3_hf, name).__doc__, f"{name} has no docstring"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocstrings") is None, reason='needs mkdocs: pip install "mocov3_hf[docs]"')
@pytest.mark.filterwarnings("ignore")
def test_the_site_is_built_without_a_warning(tmp_path):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    page = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in mocov3_hf.__all__:
        assert name.startswith("__") or f'id="mocov3_hf.{name}' in page, name
