"""Several processes of one job: the same result but for the order of sums, and no lost work where one of them dies."""

import json
from pathlib import Path

import pytest
import torch

from pyllmq.compression.ranks import Ranks

from .new_process import run_python


@pytest.fixture(scope="module")
def found():
    script = Path(__file__).with_name("several_processes.py")
    done = run_python(script)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["columns", "pruned", "experts"])
def test_the_number_of_processes_changes_only_the_order_of_sums(found, method):
    told = found[method]
    alone = told["processes"]["1"][0]
    for size in ("1", "2", "3"):
        for said in told["processes"][size]:
            assert said["error"] == "" and said["exit"] == 0
            assert said["bits"] == pytest.approx(alone["bits"], rel=1e-2)
            assert said["mean"] == pytest.approx(alone["mean"], rel=0.1)
        assert told["same Hessian in all"][size], "every process must plan by the same numbers"
        # float32 sums of 240 products in another order.
        assert told["change of the Hessian"][size] < 1e-6
        assert told["files"][size] == told["files"]["1"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_experts_of_a_layer_are_swept_by_all_processes(found, size):
    alone = found["experts"]["processes"]["1"][0]
    shares = [sum(said["swept"]) for said in found["experts"]["processes"][str(size)]]
    assert sum(shares) == sum(alone["swept"]), "each weight is swept once"
    # 16 experts in turns of three processes are 6, 5 and 5.
    assert max(shares) < 1.3 * min(shares)
    assert alone["bits"] <= 3


@pytest.mark.slow
def test_a_dead_process_ends_the_job_and_loses_no_block(found):
    first, second = found["lost"]["processes"]
    assert second["exit"] == -9 and first["exit"] == 1
    assert "LostRankError: another process of this job ended" in first["error"]
    assert not found["lost"]["there"]
    assert all("processes was 2, is 3" in said["error"] for said in found["resumed by three"])
    assert all(said["exit"] == 0 for said in found["resumed"])
    assert found["same bytes"], "with the same number of processes a resumed folder is the same"


@pytest.mark.slow
def test_more_processes_than_batches(found):
    assert all("5 calibration batches are too few for 6 processes" in said["error"] for said in found["too many"])


def test_shares():
    ranks = [Ranks(rank, 3) for rank in range(3)]
    items = list(range(11))
    shares = [r.share(items) for r in ranks]
    assert sorted(sum(shares, [])) == items and ranks[0].interleaved(shares) == items
    parts = [r.slice_of(10) for r in ranks]
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])] and parts[-1].stop == 10
    costs = {"down": 3.0, "gate": 3.0, "up": 3.0, "q": 1.0, "k": 1.0, "v": 1.0}
    owners = ranks[0].owners(costs)
    loads = [sum(costs[name] for name in costs if owners[name] == rank) for rank in range(3)]
    assert loads == [4.0, 4.0, 4.0] and all(r.owners(costs) == owners for r in ranks)
    weights = {name: torch.empty(int(cost)) for name, cost in costs.items()}
    assert sorted(sum((list(r.mine(weights)) for r in ranks), [])) == sorted(costs)


def test_alone_sends_nothing():
    alone, value = Ranks(), torch.ones(3)
    assert alone.first and alone.sum_(value) is value and alone.gather(7) == [7] and alone.share([1, 2]) == [1, 2]
    assert alone.merge({"b": 1, "a": 2}, ["a", "b"]) == {"a": 2, "b": 1} and alone.from_first(lambda: 5) == 5
    with pytest.raises(ValueError, match="as it is"):
        alone.from_first(lambda: (_ for _ in ()).throw(ValueError("as it is")))
