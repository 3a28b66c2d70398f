"""Optional packages: what is missing, and the command that installs it."""

import importlib.util
from collections.abc import Iterable, Mapping

from .hints import either
from .reporting import UsageError


class MissingPackageError(UsageError, ImportError):
    """An optional package that is not installed, with the command that installs it."""


def require_packages(what: str, extra: str, modules: Mapping[str, str]) -> None:
    """
    Check that optional packages are installed, without importing them.

    Args:
        what: What needs them, to begin the message with.
        extra: The extra of this package that installs them.
        modules: Name of the package by the name of its module.

    Raises:
        MissingPackageError: Some are not.
    """
    missing = [package for module, package in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingPackageError(f'{what} needs {", ".join(missing)}: pip install "mocov3_hf[{extra}]"')


def check_tracker(name: str, known: Iterable[str], available: Iterable[str]) -> None:
    """
    Check the value of `--report_to`.

    Args:
        name: Of a tracker.
        known, available: Trackers of the library that reports to them, and those of them that are installed.

    Raises:
        UsageError: An unknown tracker, or (MissingPackageError) one that is not installed.
    """
    if name not in known:
        raise UsageError(f"--report_to takes {either([*sorted(known), 'none'])}, got {name!r}")
    if name == "tensorboard":
        require_packages("--report_to tensorboard", "trackers", {"tensorboard": "tensorboard"})
    if name not in available:
        raise MissingPackageError(f"--report_to {name} needs a package that is not installed: pip install {name}")
