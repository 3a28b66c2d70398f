"""What setup.cfg declares agrees with the files beside it."""

import configparser
from importlib import resources
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import mocov3_hf


ROOT = Path(__file__).parent.parent


def declared(*extras):
    """Requirements of the package and of some extras, by name."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = [config["options"]["install_requires"], *(config["options.extras_require"][extra] for extra in extras)]
    found = [Requirement(line) for text in lines for line in text.split("\n") if line]
    return {requirement.name: requirement.specifier for requirement in found}


def test_the_oldest_set_is_the_lower_bounds():
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    lower_bounds = {
        name: Version(bound.version)
        for name, specifiers in declared("test").items()
        for bound in specifiers
        if bound.operator == ">="
    }
    assert pinned.keys() - lower_bounds.keys() == {"pyparsing"}, "the file says why"
    assert lower_bounds.keys() <= pinned.keys()
    for name, bound in lower_bounds.items():
        # 2.11 is pinned as 2.11.0, or as the first release of that series.
        assert Version(pinned[name]).release[: len(bound.release)] == bound.release, name


def test_type_checkers_read_the_annotations():
    assert resources.files("mocov3_hf").joinpath("py.typed").is_file()


def test_the_citation_names_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == mocov3_hf.__version__


def test_workflows_run_targets_that_exist():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    jobs = workflow["jobs"].values()
    commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]["include"]
    targets = {entry["target"] for entry in matrix} | {c.removeprefix("make ") for c in commands if c == "make lint"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"lint", "test", "test-oldest"} <= targets
    assert all(f"\n{target}: " in makefile for target in targets)
    assert {"3.10", "3.13"} <= {entry["python"] for entry in matrix}
