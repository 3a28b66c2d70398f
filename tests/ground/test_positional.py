"""A positional that stands after the values of a list option."""

import pytest

from mocov3_hf.curation import COMMAND as NEIGHBORS
from mocov3_hf.evaluation.knn import COMMAND as KNN
from mocov3_hf.evaluation.linear_probe import COMMAND as LINEAR_PROBE
from mocov3_hf.inference.files import CLASSIFY
from mocov3_hf.interop.convert import COMMAND as CONVERT
from mocov3_hf.options import given_values
from mocov3_hf.pretraining.recipe import COMMAND as PRETRAIN
from mocov3_hf.report.write import COMMAND as REPORT
from mocov3_hf.reporting import UsageError


@pytest.fixture(autouse=True)
def paths(tmp_path, monkeypatch):
    """Existing names: `run`, `other`, `photos`, `a.jpg`, `10`."""
    monkeypatch.chdir(tmp_path)
    for name in ("run", "other", "photos", "a.jpg", "10"):
        (tmp_path / name).mkdir()
    (tmp_path / "r.yaml").write_text("command: pretrain\ndataset_name: d\n")


@pytest.mark.parametrize(
    ("command", "typed", "expected"),
    [
        # Text: the last value, which need not exist, or all that exist.
        (REPORT, "--label_column x run", {"label_column": ["x"], "model": ["run"]}),
        (REPORT, "--label_column x run other", {"label_column": ["x"], "model": ["run", "other"]}),
        (REPORT, "--label_column x run --output o", {"label_column": ["x"], "model": ["run"], "output": "o"}),
        (REPORT, "--label_column x y missing", {"label_column": ["x", "y"], "model": ["missing"]}),
        (REPORT, "--label_column run other", {"label_column": ["run"], "model": ["other"]}),
        (KNN, "--label_column photos run name/of-hub", {"label_column": ["photos", "run"], "model": "name/of-hub"}),
        (KNN, "--label_column x run", {"label_column": ["x"], "model": "run"}),
        # Numbers and choices: what is neither.
        (KNN, "--k 10 20 name/of-hub", {"k": [10, 20], "model": "name/of-hub"}),
        (KNN, "--label_column x y --k 5 run", {"label_column": ["x", "y"], "k": [5], "model": "run"}),
        (KNN, "--k 5 run --label_column x y", {"k": [5], "label_column": ["x", "y"], "model": "run"}),
        (LINEAR_PROBE, "--features pooled last4 run", {"features": ["pooled", "last4"], "model": "run"}),
        (REPORT, "--display_channels 3 2 1 a b", {"display_channels": [3, 2, 1], "model": ["a", "b"]}),
        (CLASSIFY, "--pixel_range 0 4095 a.jpg b.jpg", {"pixel_range": [0, 4095], "images": ["a.jpg", "b.jpg"]}),
        (CONVERT, "--pixel_range 0 1 file.pt", {"pixel_range": [0, 1], "source": "file.pt"}),
        (PRETRAIN, "--pixel_range auto photos", {"pixel_range": "auto", "dataset_name": "photos"}),
        (PRETRAIN, "--crop_scale 0.2 1 user/data", {"crop_scale": [0.2, 1], "dataset_name": "user/data"}),
        # A positional that can be left out: text must exist.
        (PRETRAIN, "--report_to wandb photos", {"report_to": ["wandb"], "dataset_name": "photos"}),
        (PRETRAIN, "--report_to wandb trackio", {"report_to": ["wandb", "trackio"]}),
        (NEIGHBORS, "--query a.jpg photos run", {"query": ["a.jpg", "photos"], "images": ["run"]}),
        # Nothing is taken: the positional is given, or one value is left.
        (REPORT, "--model run --label_column x other", {"label_column": ["x", "other"], "model": ["run"]}),
        (REPORT, "run --label_column x other", {"label_column": ["x", "other"], "model": ["run"]}),
        (REPORT, "--label_column=x run", {"label_column": ["x"], "model": ["run"]}),
        (REPORT, "--label_column run", {"label_column": ["run"]}),
        (KNN, "--k 5 7", {"k": [5, 7]}),
        (NEIGHBORS, "--dataset_name d --query a.jpg photos", {"dataset_name": "d", "query": ["a.jpg", "photos"]}),
        (
            PRETRAIN,
            "--recipe r.yaml --report_to wandb run",
            {"dataset_name": "d", "report_to": ["wandb", "run"]},
        ),
    ],
)
def test_a_positional_after_a_list(command, typed, expected):
    assert given_values(command, typed.split()) == expected


@pytest.mark.parametrize(
    ("command", "typed", "said"),
    [
        (PRETRAIN, "--crop_scale 0.2 1 photos run", "unexpected argument 'run': pretrain takes one dataset_name"),
        (PRETRAIN, "--crop_scale 0.2 1,0", "--crop_scale takes a list of finite numbers|one finite number"),
        (KNN, "--k ten", "--k takes"),
        (KNN, "run --k 5 photos", "--k takes"),
    ],
)
def test_what_stays_a_mistake(command, typed, said):
    with pytest.raises(UsageError, match=said):
        given_values(command, typed.split())
