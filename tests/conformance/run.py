"""Run the common model tests of transformers on the classes of this package.

    make conformance
    python tests/conformance/run.py [--sdist transformers-X.Y.Z.tar.gz] [pytest arguments]

The tests are not part of the wheel: pip downloads the source distribution of the installed version once and this
script unpacks it into `build/conformance`. The tests themselves need no network. `cases.py` lists the classes and
`suite.py` binds the tests to them.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from collections import Counter
from importlib import metadata
from pathlib import Path


HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / "build" / "conformance"


def unpack(sdist: Path | None, version: str) -> Path:
    """Root of the unpacked source distribution of transformers; `None` downloads it unless it is in the cache."""
    root = CACHE / f"transformers-{version}"
    if root.is_dir() and sdist is None:
        return root
    CACHE.mkdir(parents=True, exist_ok=True)
    if sdist is None:
        # Not `--no-binary :all:`, with which pip would also build setuptools from source.
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*download, "--dest", str(CACHE), f"transformers=={version}"], check=True)
        sdist = CACHE / f"{root.name}.tar.gz"
    with tempfile.TemporaryDirectory(dir=CACHE) as folder, tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
        if not (Path(folder) / root.name).is_dir():
            sys.exit(f"{sdist} is not the source distribution of the installed transformers {version}")
        shutil.rmtree(root, ignore_errors=True)
        (Path(folder) / root.name).rename(root)
    return root


def provide(name: str, **contents) -> None:
    """Provide a module that the tests import, unless the source distribution contains it."""
    if not (Path(sys.path[0]) / f"{name.replace('.', '/')}.py").exists():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(contents)


def prepare_imports(root: Path) -> None:
    """Make the tests of transformers importable as `tests`, in front of the tests of this repository."""
    (root / "tests" / "__init__.py").touch()
    sys.path.insert(0, str(root))
    provide("tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    provide("tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    # Values of the fields of every configuration that differ from their defaults.
    common = {"return_dict": False, "output_hidden_states": True, "dtype": "float16", "chunk_size_feed_forward": 3}
    common |= {"architectures": ["Any"], "problem_type": "regression", "id2label": {0: "x"}, "label2id": {"x": 0}}
    provide("tests.utils.test_configuration_utils", config_common_kwargs=common)
    provide("fetch_hub_objects_for_ci", url_to_local_path=lambda url: url)


class Outcomes:
    """A pytest plugin that counts tests. A test with a failed subtest has failed."""

    def __init__(self):
        self.seen: dict[str, set[str]] = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.seen.setdefault(report.nodeid, set()).add(report.outcome)

    def pytest_collectreport(self, report):
        if report.failed:
            self.seen[report.nodeid] = {"failed"}

    def counts(self) -> Counter:
        return Counter(next(o for o in ("failed", "passed", "skipped") if o in seen) for seen in self.seen.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sdist", type=Path, help="source distribution of the installed transformers; default: pip's")
    options, pytest_arguments = parser.parse_known_args()

    root = unpack(options.sdist, metadata.version("transformers"))
    os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=str(CACHE / "hf_home"))  # before transformers is imported
    prepare_imports(root)

    import pytest

    outcomes = Outcomes()
    settings = ["-c", os.devnull, f"--rootdir={HERE}", "--import-mode=importlib", "-p", "no:cacheprovider"]
    settings += ["-q", "--tb=short", "-W", "ignore"]
    status = pytest.main([*settings, *pytest_arguments, str(HERE / "suite.py")], plugins=[outcomes])
    counts = outcomes.counts()
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return int(status) or int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
