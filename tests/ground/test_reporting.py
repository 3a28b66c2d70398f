"""How commands speak: warnings in one line, optional packages."""

import os
import sys
import warnings

import pytest
from huggingface_hub.utils import logging as hub_logging

from mocov3_hf import reporting, requirements
from mocov3_hf.evaluation.knn import usable_k


def warned(message, file, capsys):
    """What Python prints about a warning from a line of a file, inside a command."""

    def as_python_does(message, category, filename, lineno, file=None, line=None):
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))

    code = compile(f"import warnings; warnings.warn({message!r})", file, "exec")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(warnings, "showwarning", as_python_does)  # pytest keeps warnings to itself
        warnings.simplefilter("always")
        with reporting.reporting():
            exec(code, {})
        inside = capsys.readouterr().err
        exec(code, {})
        return inside, capsys.readouterr().err


def test_warnings_of_this_package_are_one_line(capsys, monkeypatch):
    ours = f"{os.path.dirname(reporting.__file__)}/evaluation/knn.py"
    inside, outside = warned("two\nlines", ours, capsys)
    assert inside == "warning: two lines\n"
    assert outside.startswith(f"{ours}:1: UserWarning: two\nlines\n"), "an ordinary warning from Python"
    inside, outside = warned("of another package", "/other/package.py", capsys)
    assert inside == outside
    monkeypatch.setenv("RANK", "1")
    assert warned("said by the first process", ours, capsys)[0] == ""


def test_warnings_can_still_be_caught_inside_a_command():
    with pytest.warns(UserWarning, match="skipped k = 5"), reporting.reporting():
        usable_k([1, 5], rows=2)


def test_a_missing_package_is_a_mistake_with_the_extra_that_installs_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(SystemExit) as ended, reporting.reporting():
        requirements.require_packages("--format onnx", "export", {"onnx": "onnx", "sys": "sys"})
    assert ended.value.code == 2
    assert capsys.readouterr().err == 'error: --format onnx needs onnx: pip install "mocov3_hf[export]"\n'
    with pytest.raises(ImportError):
        requirements.require_packages("--format onnx", "export", {"onnx": "onnx"})


def test_trackers(monkeypatch):
    known, available = ("wandb", "tensorboard"), ("tensorboard",)
    requirements.check_tracker("tensorboard", known, available)
    with pytest.raises(requirements.MissingPackageError, match=r"--report_to wandb needs .*: pip install wandb$"):
        requirements.check_tracker("wandb", known, available)
    with pytest.raises(ValueError, match=r"^--report_to takes tensorboard, wandb or none, got 'wanb'$"):
        requirements.check_tracker("wanb", known, available)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(
        requirements.MissingPackageError, match=r'needs tensorboard: pip install "mocov3_hf\[trackers\]"'
    ):
        requirements.check_tracker("tensorboard", known, ())


def test_retries_of_the_hub_client_are_not_printed():
    before = hub_logging.get_verbosity()
    with reporting.quiet_hub():
        assert not hub_logging.get_logger("huggingface_hub.utils._http").isEnabledFor(hub_logging.WARNING)
    assert hub_logging.get_verbosity() == before


def test_what_no_screen_shows_is_left_out(capsys):
    with pytest.raises(SystemExit), reporting.reporting():
        raise ValueError(f"image '{'x' * 200_000}' does not exist: remove its row")
    line = capsys.readouterr().err
    assert len(line) < 2100
    assert line.startswith("error: image 'xxx")
    assert line.endswith("xxx' does not exist: remove its row\n")
