from __future__ import annotations

import itertools
import logging
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning_pl
import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from transformers import BertForSequenceClassification

import adaptrain
from adaptrain import (
    AdaptiveCallback,
    BatchSizeController,
    ConfigurationError,
    CubicSchedule,
    OneShotSchedule,
    ProgressivePruning,
)
from adaptrain.callbacks.base import decision_log
from adaptrain.pruning import cost
from adaptrain.pruning import structure as structures
from adaptrain.pruning.families import find_family
from adaptrain.pruning.scorers import METHODS
from adaptrain.resources.host import process_memory_bytes
from tests.pruning.models import MODELS, WITHOUT_HEADS
from tests.toys import (
    TextModule,
    ValidatedTextModule,
    language_model_samples,
    quiet_trainer,
    text_loader,
    text_samples,
    tiny_bert,
    tiny_llama,
    weights,
)

CONF = Path(adaptrain.__file__).parent.parent / "conf" / "callbacks" / "pruning.yaml"
TWO = CubicSchedule(begin=0.2, end=0.6, events=2)


def pruning(**arguments: Any) -> ProgressivePruning:
    return ProgressivePruning(**({"target": {"flops": 0.6}, "schedule": TWO} | arguments))


def run(
    tmp_path: Path, callback: Any, module: Any = None, *, others: Any = (), namespace: Any = pl, **kwargs: Any
) -> Any:
    module = module if module is not None else TextModule()
    trainer = quiet_trainer(tmp_path, namespace=namespace, callbacks=[callback, *others], max_epochs=2, **kwargs)
    trainer.fit(module, text_loader())
    return trainer, module


def events(trainer: Any) -> list[Any]:
    return [decision for decision in decision_log(trainer) if decision.knob == "structure"]


def test_it_ends_within_the_budget_and_says_why(tmp_path) -> None:
    callback = pruning(target={"flops": 0.6, "params": 0.8})
    trainer, module = run(tmp_path, callback)
    first, last = events(trainer)
    assert first.old == cost.count_params(tiny_bert())
    assert first.new == last.old
    assert last.new == cost.count_params(module.model)
    assert first.step == 3  # 0.2 of 12 steps
    assert first.readings["event"] == 1
    assert first.readings["removed"] == pytest.approx((first.old - first.new) / first.old)
    assert first.reason.startswith("event 1 of 2 at 25% of training: ")
    assert "FFN neurons removed, params 0." in first.reason
    assert ", flops 0." in first.reason
    report = callback.report()
    assert report["events"] == 2
    assert report["latency_input"] == [8, 16]
    inputs = cost.example_inputs(module.model, 8, 16)
    assert report["final"]["flops"] == cost.count_flops(module.model, inputs) <= 0.6 * report["dense"]["flops"]
    assert report["dense"]["params"] == first.old
    assert [entry["met"] for entry in report["constraints"]] == [True, True]
    assert report["constraints"][1]["value"] == report["final"]["flops"] / report["dense"]["flops"]
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}


def test_without_a_latency_limit_a_slow_model_is_still_timed_a_few_times_only(tmp_path, monkeypatch) -> None:
    known: list[float] = []
    monkeypatch.setattr(cost, "repeats_for", lambda latency: known.append(latency) or 1)
    callback = pruning()
    run(tmp_path, callback)
    (latency,) = known
    assert 0.1 < latency / callback.report()["dense"]["latency_ms"] < 10  # measured, roughly


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc to give memory back")
def test_what_an_event_frees_goes_back_to_the_system(tmp_path) -> None:
    seen: list[int] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(process_memory_bytes())

    module = TextModule(tiny_bert(layers=4, hidden=128, ffn=2500))
    callback = pruning(target={"params": 0.3}, schedule=CubicSchedule(begin=0.5, end=0.5, events=1))
    run(tmp_path, callback, module, others=[Watch()])
    widths = structures.widths(structures.current(find_family(module)))
    cut = sum(2500 - layer["ffn"] for layer in widths)
    freed = cut * 2 * 128 * 4 * 4  # of two matrices in float32: weights, gradients and two moments
    assert freed > 20 * 2**20
    assert max(seen[:6]) - min(seen[6:]) > 0.5 * freed


@pytest.mark.skipif(sys.platform != "linux", reason="maps files as Linux does")
def test_the_file_of_the_dense_weights_is_let_go(tmp_path) -> None:
    """A mapped file stays whole for as long as one tensor lies in it: what is cut would free nothing."""
    tiny_bert().save_pretrained(tmp_path / "model")
    file = str(tmp_path / "model" / "model.safetensors")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    if file not in Path("/proc/self/maps").read_text():
        pytest.skip("this version of transformers reads its files instead of mapping them")
    run(tmp_path, pruning(), TextModule(model.train()))
    assert file not in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc to give memory back")
def test_validation_finds_the_memory_that_is_free_given_back(tmp_path) -> None:
    class Scatter(pl.Callback):
        before = after = 0

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.is_last_batch:
                blocks = [torch.ones(16384) for _ in range(1600)]  # 64 KiB each: in the heap
                self.kept = blocks[::50]
                del blocks
                self.before = process_memory_bytes()

        def on_validation_batch_start(self, *_: Any) -> None:
            self.after = self.after or process_memory_bytes()

    seen = Scatter()
    trainer = quiet_trainer(tmp_path, callbacks=[pruning(), seen], max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(ValidatedTextModule(), text_loader(), text_loader())
    assert len(decision_log(trainer)) == 2
    assert seen.before - seen.after > 60 * 2**20  # of 100 MiB


@pytest.mark.parametrize(
    ("arguments", "settings", "limited"),
    [({}, {}, True), ({"dry_run": True}, {}, False), ({}, {"precision": "bf16-mixed"}, False)],
)
def test_few_kernels_are_kept_where_they_are_quick_to_build(
    tmp_path, monkeypatch, arguments: dict[str, Any], settings: dict[str, Any], limited: bool
) -> None:
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    trainer = quiet_trainer(tmp_path, callbacks=[pruning(**arguments)], max_epochs=1, **settings)
    trainer.fit(TextModule(), text_loader())
    assert ("ONEDNN_PRIMITIVE_CACHE_CAPACITY" in os.environ) == limited


def test_uniform_layers_stay_what_a_config_can_describe(tmp_path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        callback = pruning(target={"flops": 0.8}, uniform=True)
        _, module = run(tmp_path, callback)
    assert "only ffn can go" in caplog.text
    first, second = structures.widths(structures.current(find_family(module)))
    assert first == second
    assert first["heads"] == 4
    assert first["ffn"] < 64
    assert all(entry["met"] for entry in callback.report()["constraints"])
    with pytest.raises(ConfigurationError, match="uniform=True cannot prune heads"):
        run(tmp_path, pruning(uniform=True, groups=["heads"]))
    with pytest.raises(ConfigurationError, match="with as many FFN neurons removed as uniform layers allow"):
        run(tmp_path, pruning(uniform=True, target={"flops": 0.1}))


def test_uniform_heads_of_a_llama_go_by_whole_groups(tmp_path) -> None:
    module = TextModule(tiny_llama())
    trainer = quiet_trainer(tmp_path, callbacks=[pruning(target={"flops": 0.5}, uniform=True)], max_epochs=2)
    trainer.fit(module, text_loader(samples=language_model_samples()))
    first, second = structures.widths(structures.current(find_family(module)))
    assert first == second == {"heads": 1, "ffn": first["ffn"]}
    assert first["ffn"] > 0


@pytest.mark.parametrize("namespace", [pl, lightning_pl])
def test_both_namespaces(tmp_path, namespace) -> None:
    module: Any = TextModule()
    if namespace is lightning_pl:

        class Module(lightning_pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = tiny_bert()

            def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
                return self.model(**batch).loss

            def configure_optimizers(self) -> Any:
                return torch.optim.AdamW(self.parameters(), lr=1e-2)

        module = Module()
    trainer, module = run(tmp_path, pruning(), module, namespace=namespace)
    assert len(events(trainer)) == 2
    assert "on_load_checkpoint" not in module.__dict__


@pytest.mark.usefixtures("usual_repeats")
def test_the_last_event_measures_the_real_structure(tmp_path) -> None:
    # One event: after earlier ones a noisy measurement may find nothing left to cut.
    schedule = OneShotSchedule(at=0.5)
    callback = pruning(target={"latency": 0.8}, latency_input=(4, 32), schedule=schedule)
    trainer, _ = run(tmp_path, callback, TextModule(tiny_bert(hidden=64, ffn=256)))
    (last,) = events(trainer)
    assert last.readings["latency_measured"]
    report = callback.report()
    assert report["final"]["params"] < report["dense"]["params"]
    latency = report["final"]["latency_ms"] / report["dense"]["latency_ms"]
    assert report["constraints"] == [{"name": "latency", "limit": 0.8, "value": latency, "met": latency <= 0.8}]


def test_dry_run_records_and_leaves_the_weights(tmp_path) -> None:
    plain = TextModule()
    quiet_trainer(tmp_path, max_epochs=2).fit(plain, text_loader())
    trainer, module = run(tmp_path, pruning(dry_run=True))
    assert torch.equal(weights(module), weights(plain))
    assert [decision.applied for decision in events(trainer)] == [False, False]
    assert events(trainer)[1].new < events(trainer)[1].old == events(trainer)[0].new


def test_without_a_target_nothing_happens(tmp_path, caplog) -> None:
    callback = ProgressivePruning(target={"latency": None, "params_m": None})
    with caplog.at_level(logging.INFO):
        trainer, _ = run(tmp_path, callback)
    assert "has no target" in caplog.text
    assert callback.report() == {}
    assert len(decision_log(trainer)) == 0


@pytest.mark.parametrize("optimizer", ["SGD", "RMSprop", "Adam"])
def test_other_optimizers_and_accumulation(tmp_path, optimizer) -> None:
    module = TextModule(optimizer=optimizer, lr=1e-3)
    trainer, _ = run(tmp_path, pruning(importance="magnitude"), module, accumulate_grad_batches=4)
    assert [decision.step for decision in events(trainer)] == [1, 3]  # 4 steps: after 25% and 75%


def test_adafactor_trains_layers_that_have_nothing_left(tmp_path) -> None:
    module = TextModule(optimizer="Adafactor", lr=1e-2)
    _, module = run(tmp_path, pruning(target={"params": 0.67}, groups=["heads"], importance="magnitude"), module)
    assert 0 in [layer["heads"] for layer in structures.widths(structures.current(find_family(module)))]
    assert weights(module).isfinite().all()


class Hears(AdaptiveCallback):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Any] = []

    def on_decision(self, trainer: Any, pl_module: Any, decision: Any) -> None:
        self.heard.append(decision)


def test_others_hear_of_it_and_several_events_at_once_are_one(tmp_path) -> None:
    hears = Hears()
    schedule = CubicSchedule(begin=0.3, end=0.32, events=3)
    trainer, _ = run(tmp_path, pruning(schedule=schedule), others=[hears])
    assert hears.heard == events(trainer)
    assert hears.heard[0].reason.startswith("events 1 to 3 of 3 ")


def test_training_that_ends_early_is_pruned_at_its_end(tmp_path, caplog) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.should_stop = True

    callback = pruning()
    with caplog.at_level(logging.WARNING):
        trainer, _ = run(tmp_path, callback, others=[Stop()])
    assert "ended before pruning event 2 of 2" in caplog.text
    assert len(events(trainer)) == 2
    assert callback.report()["constraints"][0]["met"]


def test_the_dense_metrics_are_those_before_the_first_event(tmp_path) -> None:
    callback = pruning(schedule=OneShotSchedule(at=0.5))
    module = ValidatedTextModule()
    seen: list[tuple[int, float]] = []

    class Watch(pl.Callback):
        def on_validation_end(self, trainer: Any, *_: Any) -> None:
            seen.append((trainer.global_step, float(trainer.callback_metrics["val/loss"])))

    trainer = quiet_trainer(tmp_path, callbacks=[callback, Watch()], max_epochs=2)
    trainer.fit(module, text_loader(), text_loader())
    dense = callback.report()["dense"]
    # The event is due at step 6, where validation comes as well: validation goes first.
    assert [decision.step for decision in events(trainer)] == [7]
    assert dense["step"] == 6
    assert dense["metrics"]["val/loss"] == dict(seen)[6]


def test_an_event_before_any_validation_leaves_no_dense_metrics(tmp_path) -> None:
    callback = pruning()
    run(tmp_path, callback)
    assert callback.report()["dense"]["metrics"] == {}
    assert callback.report()["dense"]["step"] is None


def test_a_language_model_with_tied_embeddings(tmp_path) -> None:
    module = TextModule(tiny_llama())
    callback = pruning(target={"params": 0.45})
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=2)
    trainer.fit(module, text_loader(language_model_samples()))
    assert module.model.lm_head.weight is module.model.model.embed_tokens.weight
    assert module.model.lm_head.weight.shape == (64, 32)
    assert callback.report()["final"]["params"] <= 0.45 * callback.report()["dense"]["params"]
    assert "KV groups" in events(trainer)[0].reason


@pytest.mark.slow
def test_every_importance_chooses_differently(tmp_path) -> None:
    kept = []
    for importance in METHODS:
        callback = pruning(importance=importance)
        _, module = run(tmp_path / importance, callback)
        assert all(limit["met"] for limit in callback.report()["constraints"])
        kept.append(structures.current(find_family(module)))
    assert all(one != other for one, other in itertools.combinations(kept, 2))


def test_importance_of_your_own(tmp_path) -> None:
    def last_first(match: Any, kinds: tuple[str, ...]) -> Any:
        return [
            {kind: [float(n) for n in range(size[kind])] for kind in kinds} for size in structures.dimensions(match)
        ]

    _, module = run(tmp_path, pruning(importance=last_first, groups="ffn"))
    for layer in structures.current(find_family(module)):
        assert layer["ffn"] == list(range(64 - len(layer["ffn"]), 64))


def test_importance_of_your_own_by_its_name_in_a_config() -> None:
    config = OmegaConf.create(
        {
            "_target_": "adaptrain.ProgressivePruning",
            "target": {"flops": 0.6},
            "importance": {"_target_": "hydra.utils.get_method", "path": "tests.callbacks.test_pruning.weights"},
        }
    )
    assert instantiate(config).importance.__name__ == "weights"


def test_activation_counts_micro_batches_and_leaves_no_hook(tmp_path) -> None:
    kept = []
    for others in ([], [BatchSizeController(micro_batch_size=3)]):
        _, module = run(tmp_path / str(len(others)), pruning(importance="activation"), others=others)
        kept.append(structures.current(find_family(module)))
        assert not any(inner._forward_pre_hooks for inner in module.modules())
    assert kept[0] == kept[1]


def test_activation_is_not_watched_after_the_last_event(tmp_path) -> None:
    counts = []

    class Hooks(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            counts.append(sum(len(inner._forward_pre_hooks) for inner in pl_module.modules()))

    run(tmp_path, pruning(importance="activation"), others=[Hooks()])
    # One on the model and four on projections. The last event comes after 8 of 12 steps.
    assert counts == [5] * 8 + [0] * 4


class Outputs(pl.Callback):
    """The model's logits on one batch, before and after each optimizer step's callbacks."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pruning_ = next(c for c in trainer.callbacks if isinstance(c, ProgressivePruning))
        own = pruning_._prune

        def prune(*args: Any, **kwargs: Any) -> None:
            before = self.logits(pl_module)
            own(*args, **kwargs)
            self.seen[trainer.global_step] = before, self.logits(pl_module)

        pruning_._prune = prune

    @staticmethod
    def logits(pl_module: Any) -> torch.Tensor:
        inputs = {key: value for key, value in next(iter(text_loader())).items() if key != "labels"}
        with torch.no_grad():
            return pl_module.model(**inputs).logits


def test_units_that_stay_take_over_for_those_that_go(tmp_path) -> None:
    errors = []
    for reconstruct in (False, True):
        torch.manual_seed(0)
        outputs = Outputs()
        # Scores that do not depend on training, so that both lose the same units at the first event.
        scored = pruning(importance="magnitude", reconstruct=reconstruct)
        trainer, module = run(tmp_path, scored, others=[outputs])
        before, after = outputs.seen[3]
        errors.append(float((after - before).square().mean()))
        readings = events(trainer)[0].readings
        assert ("reconstruction_error" in readings) == reconstruct
        if reconstruct:
            assert 0 < readings["reconstruction_error"] < 0.7 * readings["cut_error"]
        assert not any(inner._forward_pre_hooks for inner in module.modules())
    assert errors[1] < 0.7 * errors[0]


def test_a_dry_run_watches_nothing_for_a_reconstruction(tmp_path) -> None:
    callback = pruning(dry_run=True, reconstruct=True)
    run(tmp_path, callback)
    assert callback.state_dict()["reconstruction"] is None


def test_an_event_that_comes_before_anything_was_seen_cuts_without(tmp_path) -> None:
    schedule = CubicSchedule(begin=0.0, end=0.5, events=2)
    trainer, _ = run(tmp_path, pruning(schedule=schedule, reconstruct=True))
    first, last = events(trainer)
    assert first.step == 1
    assert "reconstruction_error" not in first.readings
    assert "reconstruction_error" in last.readings


def test_only_the_groups_named_go(tmp_path) -> None:
    _, module = run(tmp_path, pruning(groups=["heads"], target={"flops": 0.8}))
    kept = structures.widths(structures.current(find_family(module)))
    assert all(layer["ffn"] == 64 for layer in kept)
    assert sum(layer["heads"] for layer in kept) < 8


def test_round_to(tmp_path) -> None:
    _, module = run(tmp_path, pruning(round_to={"ffn": 20, "heads": 2}, target={"flops": 0.5}))
    for layer in structures.widths(structures.current(find_family(module))):
        assert layer["ffn"] in (0, 20, 40, 60, 64)
        assert layer["heads"] in (0, 2, 4)


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ({"target": {"params": 0.01}}, "budget.params=0.01 cannot be met: with all heads and FFN neurons removed"),
        ({"target": {"flops": 0.2}, "groups": ["ffn"]}, "with all FFN neurons removed"),
        ({"target": {"latency_ms": 1e-6}}, "budget.latency_ms=1e-06 cannot be met"),
        ({"latency_input": (1, 65)}, "at most 64 tokens"),
        ({"importance": lambda match, kinds: []}, "it returned 0 layers for 2"),
    ],
)
def test_what_cannot_be_met_is_refused_before_the_first_step(tmp_path, arguments, seen) -> None:
    module = TextModule()
    with pytest.raises(ConfigurationError, match=seen):
        run(tmp_path, pruning(**arguments), module)
    assert module.losses == []


def test_models_and_trainers_that_cannot_be_served(tmp_path) -> None:
    class Linear(TextModule):
        def __init__(self) -> None:
            super().__init__(nn.Linear(2, 2))

    with pytest.raises(ConfigurationError, match=r"found none\. Supported: BERT"):
        run(tmp_path, pruning(), Linear())
    manual = TextModule()
    manual.automatic_optimization = False
    with pytest.raises(ConfigurationError, match="automatic_optimization=False"):
        run(tmp_path, pruning(), manual)
    frozen = TextModule()
    frozen.model.bert.encoder.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="importance='magnitude'"):
        run(tmp_path, pruning(), frozen)


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ({"target": {"latency": 1.7}}, "1.7"),
        ({"groups": ()}, "groups"),
        ({"groups": ["wheels"]}, "wheels"),
        ({"importance": "luck"}, "luck"),
        ({"round_to": 0}, "0"),
        ({"round_to": {"layers": 2}}, "layers"),
        ({"latency_input": (8,)}, "8"),
        ({"latency_input": "big"}, "big"),
        ({"schedule": {"begin": 2}}, "2"),
        ({"schedule": 6}, "6"),
    ],
)
def test_wrong_arguments_are_refused_with_what_was_seen(arguments, seen) -> None:
    with pytest.raises(ConfigurationError, match=seen):
        pruning(**arguments)


def test_the_yaml_builds_and_pickles() -> None:
    budget = dict.fromkeys(("latency", "params", "flops", "memory", "latency_ms", "params_m")) | {"latency": 0.5}
    config = OmegaConf.merge(OmegaConf.load(CONF), {"budget": budget})
    built = instantiate(config.pruning)
    copied = pickle.loads(pickle.dumps(built))
    assert copied.target == {"latency": 0.5}
    assert copied.schedule == CubicSchedule(begin=0.1, end=0.6, events=6)
    assert copied.groups == ("heads", "ffn")


def test_t5_says_why_it_keeps_its_heads(tmp_path) -> None:
    why = r"'heads', but T5\w+ has none to prune: all layers .* position bias"
    with pytest.raises(ConfigurationError, match=why) as raised:
        run(tmp_path, pruning(), TextModule(MODELS["t5"]()))
    assert str(raised.value).endswith("Leave it out: groups=('ffn',).")


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "t5-gated"])
def test_more_language_models(tmp_path, name) -> None:
    module = TextModule(MODELS[name]())
    groups = ["ffn"] if name in WITHOUT_HEADS else ["heads", "ffn"]
    callback = pruning(target={"flops": 0.8, "params": 0.85}, groups=groups)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=2)
    trainer.fit(module, text_loader(language_model_samples()))
    assert [entry["met"] for entry in callback.report()["constraints"]] == [True, True]
    match = find_family(module)
    flops = cost.count_flops(module.model, match.example_inputs(8, 16))
    assert callback.report()["final"]["flops"] == flops <= 0.8 * callback.report()["dense"]["flops"]


def test_weights_without_gradients_at_the_first_event_wait(tmp_path) -> None:
    class Skip(pl.Callback):
        """A guard that skips the first steps by dropping their gradients."""

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step < 5:
                for parameter in pl_module.parameters():
                    parameter.grad = None

    callback = pruning()
    trainer = quiet_trainer(tmp_path, callbacks=[Skip(), callback], max_epochs=2)
    trainer.fit(TextModule(), text_loader(text_samples()))
    assert [decision.step for decision in events(trainer)] == [6, 8]
