"""Folders to report on, and images to show."""

import pytest
import torch

from tests.factories import save_labelled, save_run, save_trained_classifier, save_unlabelled


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    return save_labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="session")
def unlabelled(tmp_path_factory):
    return save_unlabelled(tmp_path_factory.mktemp("unlabelled"))


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path / "a <i>run & more")


@pytest.fixture
def classifier(tmp_path):
    return save_trained_classifier(tmp_path / "classifier")
