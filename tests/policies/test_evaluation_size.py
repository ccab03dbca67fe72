from __future__ import annotations

import json

from adaptrain.policies.evaluation_size import EvaluationSizePolicy


def test_a_stage_is_limited_from_its_first_error_on_and_others_are_not() -> None:
    policy = EvaluationSizePolicy()
    assert not policy.limits("test")
    proposal = policy.out_of_memory("test", 16, 10)
    assert (proposal.old, proposal.new) == (16, 8)
    assert policy.limits("test")
    assert not policy.limits("predict")
    policy.restart()
    assert not policy.limits("test")


def test_longer_samples_run_fewer_at_once() -> None:
    policy = EvaluationSizePolicy()
    policy.out_of_memory("test", 16, 10)
    assert [policy.size("test", elements) for elements in (5, 10, 20, 40, 1000)] == [16, 8, 4, 2, 1]


def test_each_error_at_least_halves() -> None:
    policy = EvaluationSizePolicy()
    assert [policy.out_of_memory("test", failed, 3).new for failed in (13, 5, 3, 2)] == [6, 2, 1, 1]
    policy = EvaluationSizePolicy()
    policy.out_of_memory("test", 16, 10)
    assert policy.out_of_memory("test", 4, 10).new == 2  # where the batch had fewer samples than would be allowed
    assert policy.size("test", 10) == 2


def test_it_grows_back_to_whole_batches_and_waits_longer_after_each_error() -> None:
    policy = EvaluationSizePolicy(growth_interval=2)
    waits = []
    for _ in range(2):
        policy.out_of_memory("test", 16, 10)
        sizes, batches = [], 0
        while policy.limits("test"):
            batches += 1
            if proposal := policy.succeeded("test", 10):
                sizes.append(proposal.new)
        assert sizes == [10, 12, 14, 16]
        waits.append(batches)
    assert waits == [8, 16]
    policy.restart()
    assert policy.state_dict() == EvaluationSizePolicy().state_dict()


def test_its_state_is_plain_and_goes_on() -> None:
    policy = EvaluationSizePolicy()
    policy.out_of_memory("test (loader 1)", 16, 10)
    again = EvaluationSizePolicy()
    again.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert again.size("test (loader 1)", 10) == 8
    assert again.state_dict() == policy.state_dict()
