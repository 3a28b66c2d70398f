"""Training on two hosts, which are network namespaces: the losses of one, and what follows a cut of the cable."""

import pytest

from benchmarks.hosts import why_not
from benchmarks.two_hosts import measure


@pytest.mark.slow
def test_two_hosts_train_as_one_and_resume_after_a_cut(tmp_path):
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    cut = "cable of host 1 pulled"
    report = measure(tmp_path, steps=30, timeout=4, losses=[cut])
    assert report["difference_of_losses"]["first_3_steps"] <= 1e-6
    result = report["lost"][cut]
    assert result["exit_codes"] == {"host 0": 1, "host 1": 1}
    assert result["ended_in_time"], result["seconds_to_end"]
    assert len(result["lines"]) == 2  # one for each host
    for line in result["lines"]:
        assert "another process has not responded for 4 s" in line
        assert "is complete" in line
    assert result["identical_after_resuming"]
