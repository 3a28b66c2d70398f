import pytest

from tests.factories import save_classifier, save_files


@pytest.fixture(scope="session", params=["vit", "resnet", "native"])
def classifier(request, tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("models") / "vit", "vit")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    return save_files(tmp_path_factory.mktemp("images"))
