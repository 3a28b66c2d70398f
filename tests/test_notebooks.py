"""The notebooks: stored without outputs, executed, and their tables of flags and keys against the options."""

import ast
import os
import re

import nbformat
import pytest
from nbclient import NotebookClient

from mocov3_hf.options import values_of_arguments
from mocov3_hf.pretraining.recipe import COMMAND
from mocov3_hf.reporting import UsageError
from tests.launch import ROOT


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What a run on a CPU in seconds needs: shorter training.
SHORTER = {
    "own_images": {"EPOCHS = 36": "EPOCHS = 1"},
    "few_labels": {"PRETRAINING_EPOCHS = 12": "PRETRAINING_EPOCHS = 1", "EPOCHS = 20": "EPOCHS = 3"},
    "from_other_codebases": {},
}


def read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def test_all_are_tested():
    assert {path.stem for path in NOTEBOOKS} == SHORTER.keys()


@pytest.mark.parametrize("name", SHORTER)
def test_stored_without_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    for link in re.findall(r"\]\((\w+\.ipynb)\)", "\n".join(cell.source for cell in notebook.cells)):
        assert (ROOT / "notebooks" / link).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORTER)
def test_executed(name, tmp_path, monkeypatch):
    notebook = read(name)
    for long, short in SHORTER[name].items():
        assert sum(f"\n{long}" in cell.source for cell in notebook.cells) == 1
        for cell in notebook.cells:
            cell.source = cell.source.replace(f"\n{long}", f"\n{short}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("MPLBACKEND", "agg")
    for name_of_folder in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name_of_folder, str(tmp_path / name_of_folder))
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": tmp_path}}).execute()
    if name == "own_images":
        assert (tmp_path / "runs/own-images/report.html").is_file()


def tables():
    """The lists of rows in the notebook, by name."""
    sources = [cell.source for cell in read("from_other_codebases").cells if cell.cell_type == "code"]
    rows = [re.search(r"^([A-Z]+) = (\[.*?^\])", source, re.DOTALL | re.MULTILINE) for source in sources]
    return {found[1]: ast.literal_eval(found[2]) for found in rows if found}


def test_every_row_of_the_tables_names_an_option():
    fields = COMMAND.fields()
    assert {name: len(rows) > 15 for name, rows in tables().items()} == {"OFFICIAL": True, "MMPRETRAIN": True}
    for theirs, here, _ in (row for rows in tables().values() for row in rows):
        assert here in fields, theirs


def test_flags_of_the_official_code_are_hinted_at_by_the_command():
    """Typed here, a flag is the option of the table, or the error names that option."""
    trap = "--momentum"  # an earlier name of another option, which the table mentions
    flags = {flag: here for theirs, here, _ in tables()["OFFICIAL"] for flag in theirs.split(", ") if flag[0] == "-"}
    for flag, here in flags.items():
        name = flag.lstrip("-").replace("-", "_")
        if name in COMMAND.fields():
            assert name == here
        elif flag != trap:
            with pytest.raises(UsageError, match=f"did you mean .*--{here}'"):
                values_of_arguments(COMMAND, [flag, "1"])
