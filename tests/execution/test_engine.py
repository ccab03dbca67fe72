"""The engine with real memory: it stays below a limit by prediction, and measures when the limit moves."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptrain import BatchSizeController
from adaptrain.callbacks.base import decision_log
from adaptrain.execution.forecast import MemoryForecast
from adaptrain.execution.memory import GIB, StepMemory
from adaptrain.policies.peak_memory import PeakMemoryFit
from adaptrain.resources.host import PeakMemory, process_memory_bytes
from tests.memory import BATCH, LongSequences, keep_no_free_heap, long_batches
from tests.processes import run_python
from tests.toys import quiet_trainer, weights


def train(root: Path, *callbacks):
    module = LongSequences()
    trainer = quiet_trainer(root, callbacks=list(callbacks))
    loader = torch.utils.data.DataLoader(long_batches([24, 48, 32, 48, 320, 48]), batch_size=None)
    with PeakMemory() as peak:
        trainer.fit(module, loader)
    return weights(module), peak.read(), trainer


def stays_below_the_limit_by_prediction(tmp_path: Path) -> None:
    expected, plain_peak, _ = train(tmp_path)
    limit = process_memory_bytes() + 240 * 2**20
    assert plain_peak > limit  # else this shows nothing
    got, peak, trainer = train(tmp_path, BatchSizeController(micro_batch_size=BATCH, memory_limit_gib=limit / GIB))
    assert peak < limit
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    [decision] = decision_log(trainer)
    assert "A batch as long as this one" in decision.reason
    assert decision.new < BATCH
    assert decision.readings["predicted_gib"] > decision.readings["limit_gib"]


def says_what_was_expected_and_not_what_the_step_taught(tmp_path: Path) -> None:
    class Keeps(LongSequences):
        """Its first step takes 100 MiB that stay, which is learned in the second."""

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if not kept:
                kept.append(torch.ones(25 * 2**20))
            return super().training_step(batch, batch_idx)

    keep_no_free_heap()
    limit = process_memory_bytes() + 240 * 2**20
    controller = BatchSizeController(micro_batch_size=BATCH, memory_limit_gib=limit / GIB)
    trainer = quiet_trainer(tmp_path, callbacks=[controller])
    trainer.fit(Keeps(), torch.utils.data.DataLoader(long_batches([48] * 4), batch_size=None))  # type: ignore[arg-type]
    decision = next(iter(decision_log(trainer)))
    assert f"at {BATCH} it would take" in decision.reason
    assert decision.readings["predicted_gib"] > decision.readings["limit_gib"]


def measures_the_peak_of_a_step(_: Path) -> None:
    memory = StepMemory(torch.device("cpu"), limit_gib=None, fraction=0.9)
    memory.start()
    block = torch.ones(2**26)
    del block
    assert memory.stop() - memory.floor_bytes > 200 * 2**20


def leave_free_blocks() -> None:
    """Leaves 200 MiB in the heap that are free, resident, and not at its end, where they would be given back."""
    blocks = [torch.ones(2**14) for _ in range(2 * 3200)]  # 64 KiB each
    kept.extend(blocks[::2])


kept: list[torch.Tensor] = []


def counts_what_a_step_takes_from_the_free_blocks_of_the_heap(_: Path) -> None:
    memory = StepMemory(torch.device("cpu"), limit_gib=None, fraction=0.9)
    leave_free_blocks()
    used = process_memory_bytes()
    memory.release()
    memory.start()
    blocks = [torch.ones(2**14) for _ in range(1600)]
    peak = memory.stop()
    assert len(blocks) == 1600
    assert peak <= used  # the process did not grow
    assert memory.added_bytes(peak) > 90 * 2**20  # and yet this much was taken


def forecast_within(room_mib: int, fit: PeakMemoryFit) -> MemoryForecast:
    """A forecast that is allowed this much more than what is in use now."""
    limit = process_memory_bytes() + room_mib * 2**20
    return MemoryForecast(StepMemory(torch.device("cpu"), limit_gib=limit / GIB, fraction=1.0), fit)


def gives_free_blocks_back_before_it_refuses_a_size(_: Path) -> None:
    leave_free_blocks()
    fit = PeakMemoryFit()
    fit.observe(1, 1, added_bytes=10 * 2**20)
    forecast = forecast_within(50, fit)
    forecast.look(1, 1)
    assert forecast.limit_bytes - forecast.used_bytes < 190 * 2**20
    assert forecast.most(19, 1) == 19
    assert 19 <= forecast.most(100, 1) < 30


def expects_more_of_a_size_that_was_not_seen(_: Path) -> None:
    fit = PeakMemoryFit()
    fit.observe(4, 1, added_bytes=40 * 2**20)
    forecast = forecast_within(100, fit)
    forecast.look(4, 1)
    assert forecast.peak(4, 1) == forecast.used_bytes + 40 * 2**20
    assert forecast.peak(8, 1) == forecast.used_bytes + 100 * 2**20


def looks_again_at_once_where_a_step_comes_close(_: Path) -> None:
    fit = PeakMemoryFit()
    fit.observe(4, 1, added_bytes=60 * 2**20)
    forecast = forecast_within(150, fit)
    forecast.look(4, 1)
    assert forecast.most(4, 1) == 4
    kept.append(torch.ones(2**25))  # 128 MiB, within the time that a look holds for a step with plenty of room
    forecast.look(4, 1)
    assert forecast.most(4, 1) < 4


def learns_of_a_step_that_takes_more_than_it_did_when_it_was_measured(_: Path) -> None:
    fit = PeakMemoryFit()
    forecast = forecast_within(150, fit)
    for mib in (64, 64, 96, 32):
        forecast.look(4, 1)
        forecast.start(4, 1, size=4)
        block = torch.ones(mib * 2**18)
        del block
        assert forecast.stop()
        forecast.learn(4, 1)
    added = fit.predict(4, 1)
    assert added is not None
    assert 95 * 2**20 < added < 100 * 2**20


def counts_gradients_kept_between_batches(tmp_path: Path) -> None:
    """A batch that begins an accumulation window has them in use; those after it take them beside their own."""

    class Heavy(LongSequences):
        def __init__(self) -> None:
            super().__init__()
            self.heavy = torch.nn.Parameter(torch.rand(2**23))  # 32 MiB

        def loss(self, batch: Any) -> torch.Tensor:
            return super().loss(batch) + self.heavy.sum()

    def added_mib(accumulate: int) -> float:
        controller = BatchSizeController(micro_batch_size=BATCH)
        loader: Any = torch.utils.data.DataLoader(long_batches([4, 4, 16, 16]), batch_size=None)  # type: ignore[arg-type]
        trainer = quiet_trainer(tmp_path, callbacks=[controller], accumulate_grad_batches=accumulate)
        trainer.fit(Heavy(), loader)
        [added] = [added for _, length, added in controller.state_dict()["fit"]["added"] if length == 16]
        return added / 2**20

    keep_no_free_heap()
    added_mib(1)  # the first training in a process also takes what libraries keep
    # The kernel may reclaim some MiB meanwhile, so that one pair of readings is not enough.
    kept = [added_mib(2) - added_mib(1) for _ in range(3)]
    assert 28 < statistics.median(kept) < 36, kept


@pytest.mark.parametrize(
    "check",
    [
        stays_below_the_limit_by_prediction,
        says_what_was_expected_and_not_what_the_step_taught,
        measures_the_peak_of_a_step,
        counts_what_a_step_takes_from_the_free_blocks_of_the_heap,
        expects_more_of_a_size_that_was_not_seen,
        looks_again_at_once_where_a_step_comes_close,
        learns_of_a_step_that_takes_more_than_it_did_when_it_was_measured,
        counts_gradients_kept_between_batches,
    ],
)
def test_in_a_process_of_its_own(check, tmp_path: Path) -> None:
    """Not in this one: what earlier tests left in its heap would be used again, or freed while it is measured."""
    result = run_python("-m", "tests.execution.test_engine", check.__name__, tmp_path)
    assert result.returncode == 0, result.stderr


def test_free_blocks_are_given_back_before_a_size_is_refused(tmp_path: Path) -> None:
    """In a fresh interpreter: a forked one gives back a MiB less, which is all the room there is to spare."""
    check = gives_free_blocks_back_before_it_refuses_a_size.__name__
    command = [sys.executable, "-m", "tests.execution.test_engine", check, str(tmp_path)]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_first_step_is_careful_where_nothing_is_known(tmp_path: Path) -> None:
    def first_steps(controller: BatchSizeController) -> list[list[int]]:
        module = LongSequences()
        loader: Any = torch.utils.data.DataLoader(long_batches([2, 2], samples=128), batch_size=None)  # type: ignore[arg-type]
        quiet_trainer(tmp_path, callbacks=[controller]).fit(module, loader)
        return module.ran

    controller, resumed = BatchSizeController(), BatchSizeController()
    assert first_steps(controller) == [[2] * 64, [16] * 8]
    resumed.load_state_dict(controller.state_dict())
    assert first_steps(resumed) == [[16] * 8] * 2
    assert first_steps(BatchSizeController(micro_batch_size=64)) == [[64] * 2] * 2


def test_the_limit_is_the_tightest_there_is() -> None:
    cpu = torch.device("cpu")
    all_there_is = StepMemory(cpu, limit_gib=None, fraction=1.0).limit_bytes()
    assert StepMemory(cpu, limit_gib=1.5, fraction=1.0).limit_bytes() == 1.5 * GIB
    assert StepMemory(cpu, limit_gib=10**6, fraction=0.5).limit_bytes() < all_there_is
    assert "GiB allowed" in StepMemory(cpu, limit_gib=None, fraction=0.9).report()


@pytest.mark.gpu
def test_on_a_cuda_device_tensors_are_counted() -> None:
    device = torch.device("cuda:0")
    memory = StepMemory(device, limit_gib=1.0, fraction=0.9)
    memory.start()
    block = torch.ones(2**26, device=device)
    del block
    assert memory.stop() - memory.floor_bytes >= 2**28
    assert memory.limit_bytes() == GIB
    assert memory.fingerprint()["device"]


@pytest.mark.gpu
@pytest.mark.skipif(not hasattr(torch.cuda, "get_per_process_memory_fraction"), reason="this torch does not tell it")
def test_the_share_of_a_cuda_device_that_a_process_may_hold_is_its_limit() -> None:
    memory = StepMemory(torch.device("cuda:0"), limit_gib=None, fraction=0.9)
    total = torch.cuda.mem_get_info(0)[1]
    torch.cuda.set_per_process_memory_fraction(0.25, 0)
    try:
        assert memory.limit_bytes() <= 0.9 * 0.25 * total
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](Path(sys.argv[2]))
