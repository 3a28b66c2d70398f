"""compatibility.py: small differences where nothing is lost, larger ones where something is, and what is missing."""

import json
from importlib import metadata
from types import SimpleNamespace

import pytest

from benchmarks import compatibility


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_rows_of_a_tiny_model(tmp_path, monkeypatch):
    def version(name):
        if name == "torchao":
            raise metadata.PackageNotFoundError
        return "1.0"

    known = SimpleNamespace(version=version, PackageNotFoundError=metadata.PackageNotFoundError)
    monkeypatch.setattr(compatibility, "metadata", known)
    pytest.importorskip("peft")
    ways = ["PEFT LoRA", 'device_map="auto"', "torch.bfloat16", "Int8WeightOnlyConfig"]
    compatibility.main(["--quick", "--ways", *ways, "--output", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["quick"]
    rows = result["rows"]
    assert list(rows) == ways
    assert rows["PEFT LoRA"]["largest_difference"] < 1e-5
    assert rows['device_map="auto"']["largest_difference"] == 0
    assert 1e-4 < rows["torch.bfloat16"]["largest_difference"] < 0.1
    assert 0.99 < rows["torch.bfloat16"]["cosine"] < 0.999999
    assert rows["Int8WeightOnlyConfig"] == {"skipped": "torchao is not installed"}
