"""Training on two hosts, which are network namespaces: what follows a cut of the cable, and the weights in the end."""

import pytest

from benchmarks.hosts import SCRIPT, why_not
from benchmarks.two_hosts import arguments, lose
from tests.fork_server import ranks


@pytest.mark.slow
def test_two_hosts_resume_after_a_cut_and_train_as_two_processes_of_one(tmp_path):
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    common = arguments(tmp_path / "images", steps=30, timeout=4)
    one_host = tmp_path / "one_host"
    ranks(2, SCRIPT, *common, "--output_dir", str(one_host))
    result = lose(tmp_path, "cable of host 1 pulled", common, one_host, timeout=4)
    assert result["exit_codes"] == {"host 0": 1, "host 1": 1}
    assert result["ended_in_time"], result["seconds_to_end"]
    assert len(result["lines"]) == 2  # one for each host
    for line in result["lines"]:
        assert "another process has not responded for 4 s" in line
        assert "is complete" in line
    assert result["identical_after_resuming"]
