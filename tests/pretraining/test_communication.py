"""Bytes that the processes exchange: predicted from the model, and counted in a running step."""

import json
from pathlib import Path

import pytest
import torch

from mocov3_hf import MoCoV3Config, MoCoV3ForPreTraining
from mocov3_hf.pretraining.estimate import describe_exchanges, exchanges
from tests.fork_server import ranks


WORKER = Path(__file__).parent / "communication_worker.py"


@pytest.mark.slow
def test_a_step_communicates_what_is_predicted(tmp_path):
    _, output = ranks(2, WORKER, str(tmp_path / "counts.json"))
    assert "Warning" not in output, output
    results = json.loads((tmp_path / "counts.json").read_text())
    assert len(results) == 5
    for case, result in results.items():
        predicted = {}
        for exchange in result["predicted"]:
            count, num_bytes = predicted.get(exchange["kind"], [0, 0])
            predicted[exchange["kind"]] = [count + exchange["count"], num_bytes + exchange["num_bytes"]]
        assert result["counted"] == predicted, case


def vit_base():
    with torch.device("meta"):
        return MoCoV3ForPreTraining(
            MoCoV3Config(backbone_config={"model_type": "mocov3_vit", "hidden_size": 768, "num_attention_heads": 12})
        )


def test_vit_base_on_64_gpus():
    """Against the sizes of the paper's ViT-B (heads 768-4096-4096-256 and 256-4096-256), written out by hand."""
    by_name = {exchange.name: exchange for exchange in exchanges(vit_base(), 64, 64)}
    assert by_name["gradients"].num_bytes == 4 * 108_150_016
    assert by_name["keys"].num_bytes == 2 * 4096 * 256 * 4
    projector, predictor = [4096, 4096, 256], [4096, 256]
    forward, backward = [*projector, *predictor, *projector], [*projector, *predictor]
    assert by_name["batch statistics, forward"].kind == "all-gather"
    assert by_name["batch statistics, forward"].num_bytes == 64 * 2 * 4 * sum(2 * width + 1 for width in forward)
    assert by_name["batch statistics, backward"].num_bytes == 2 * 4 * 2 * sum(backward)
    assert by_name["batch statistics, backward"].count == 2 * len(backward)


def test_in_a_ring_all_but_ones_own_share_is_sent():
    gradients, keys, *_ = exchanges(vit_base(), 64, 64)
    assert gradients.sent_bytes(64) == pytest.approx(2 * 63 / 64 * gradients.num_bytes)
    assert keys.sent_bytes(64) == pytest.approx(63 / 64 * keys.num_bytes)
    assert gradients.sent_bytes(1) == 0


def test_the_line_of_a_dry_run_adds_up():
    predicted = exchanges(vit_base(), 64, 64)
    line = describe_exchanges(predicted, 64)
    assert line.startswith(
        f"{sum(exchange.num_bytes for exchange in predicted) / 1e6:.1f} MB (432.6 gradients, 8.4 keys"
    )
    assert " batch statistics as on GPUs);" in line
    assert " batch statistics as on CPUs);" in describe_exchanges(exchanges(vit_base(), 64, 64, on_gpu=False), 64)
