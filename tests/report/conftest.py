"""Folders to report on, and images to show."""

import pytest
import torch
from markupsafe import Markup

from mocov3_hf.report import training
from mocov3_hf.report.parts import Chart
from tests.factories import save_labeled, save_run, save_trained_classifier, save_unlabeled


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def labeled(tmp_path_factory):
    return save_labeled(tmp_path_factory.mktemp("labeled"))


@pytest.fixture(scope="session")
def unlabeled(tmp_path_factory):
    return save_unlabeled(tmp_path_factory.mktemp("unlabeled"))


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path / "a <i>run & more")


@pytest.fixture
def classifier(tmp_path):
    return save_trained_classifier(tmp_path / "classifier")


@pytest.fixture
def quick_charts(monkeypatch):
    """Charts are composed but not rendered, which takes most of the time of a report."""

    def finish(figure, name, plots, *, title, caption, alt, hovers=()):
        return Chart(name, title, caption, Markup('<svg viewBox="0 0 1 1"></svg>'), figure.get_figwidth())

    monkeypatch.setattr(training, "finish_chart", finish)
