from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptrain import ConfigurationError, ModelFamily
from adaptrain.family import choose_cascade
from adaptrain.family import samples as kept
from adaptrain.family.cascade import CascadeReport
from adaptrain.family.member import class_logits
from adaptrain.family.store import FamilyStore
from adaptrain.policies.cascade import accuracy_at
from adaptrain.pruning.families import find_family
from adaptrain.pruning.surgery import shrink
from tests.toys import TextModule, quiet_trainer, text_loader, text_samples, tiny_bert

LENGTH = 16


def samples(count: int) -> kept.Samples:
    found = kept.gather(text_loader(noisy(count)), count)
    assert found is not None
    return found


def noisy(count: int) -> list[dict[str, Any]]:
    """Samples in which some tokens are of another class, so that some are hard."""
    generator = torch.Generator().manual_seed(5)
    found = text_samples(count, seed=9)
    for sample in found:
        size = int(sample["attention_mask"].sum())
        wrong = torch.rand(size, generator=generator) < 0.4
        sample["input_ids"][:size][wrong] = torch.randint(4, 64, (int(wrong.sum()),), generator=generator)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family of three: a large model that was trained, one of one layer's worth of it, and a broken one."""
    where = tmp_path_factory.mktemp("cascade")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = TextModule(tiny_bert(layers=6, hidden=64, ffn=256), lr=1e-3)
    quiet_trainer(where, max_epochs=10).fit(module, text_loader(noisy(240)))
    store = FamilyStore(where / "family")
    store.begin()
    match = find_family(module)
    store.add(match, name="dense", step=1)
    shrink(match, [{"heads": [0], "ffn": list(range(8))}] + [{"heads": [], "ffn": [], "layers": []}] * 5)
    quiet_trainer(where, max_epochs=2).fit(module, text_loader(noisy(240)))
    store.add(match, name="final", step=2)
    about = {
        "task": "classification",
        "labels": ["a", "b", "c"],
        "metric": "val/accuracy",
        "mode": "max",
        "max_length": LENGTH,
        "shapes": {"batch": [8, LENGTH]},
        "device_type": "cpu",
    }
    store.write_about(about)
    data = samples(600)
    kept.save(data, store.folder)
    family = ModelFamily.load(where)
    for member in family:
        logits = class_logits(member.model(), data.ids, 0, batch_size=32)
        right = float((logits.argmax(-1) == data.labels).float().mean())
        store.update(member.name, metrics={"val/accuracy": right})
    return where


@pytest.fixture
def family(folder: Path) -> ModelFamily:
    return ModelFamily.load(folder)


def test_the_samples_come_back(folder):
    loaded, expected = kept.load(folder / "family"), samples(600)
    assert loaded is not None
    assert torch.equal(loaded.labels, expected.labels)
    assert all(torch.equal(one, other) for one, other in zip(loaded.ids, expected.ids, strict=True))
    first, second = loaded.halves()
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(600))


def test_samples_of_other_kinds_are_not_kept():
    assert kept.gather([torch.zeros(3, 4)], 5) is None
    assert kept.gather([{"input_ids": torch.zeros(3, 4), "labels": torch.zeros(3, 4)}], 5) is None
    assert kept.gather([], 5) is None
    few = kept.gather(text_loader(text_samples(20)), 5)
    assert few is not None
    assert len(few) == 5


def test_a_cascade_at_a_cost(family):
    cascade = family.cascade(cost=0.6, again=True)
    report = cascade.report
    assert report is not None
    assert (report.small, report.large) == ("final", "dense")
    assert report.chosen_on == report.judged_on == 300
    assert 0 < report.escalated < 1
    assert set(report.throughputs) == {"dense", "final"}
    assert min(report.throughput, *report.throughputs.values()) > 0
    assert report.cost == pytest.approx(report.throughputs["dense"] / report.throughput)

    # All that the report says of answers, told again without it.
    loaded = kept.load(family.folder)
    assert loaded is not None
    judged = loaded.pick(loaded.halves()[1])
    small, large = (class_logits(family[name].model(), judged.ids, 0, batch_size=300) for name in ("final", "dense"))
    first, second = (
        (logits / report.temperatures[name]).softmax(-1) for name, logits in (("final", small), ("dense", large))
    )
    unsure = first.max(-1).values < report.threshold
    assert 0 < report.weight <= 1
    together = (1 - report.weight) * first + report.weight * second
    answers = torch.where(unsure, together.argmax(-1), small.argmax(-1))
    assert report.escalated == pytest.approx(float(unsure.float().mean()))
    assert report.metric == pytest.approx(float((answers == judged.labels).float().mean()))
    assert report.metrics["dense"] == pytest.approx(float((large.argmax(-1) == judged.labels).float().mean()))
    probabilities, asked = cascade.classify(judged.ids, batch_size=300)
    assert torch.equal(asked, unsure)
    assert torch.equal(probabilities.argmax(-1), answers)


def test_a_cascade_at_an_accuracy_escalates_no_more_than_it_must(family):
    small, large = family["final"].metric, family["dense"].metric
    demands = (small + (large - small) * part for part in (0.1, 0.8))
    lower, higher = (family.cascade(accuracy=demand, again=True).report for demand in demands)
    assert lower.escalated < higher.escalated
    assert lower.metric <= higher.metric


def test_it_is_kept_with_the_family_until_a_weight_changes(family, folder, caplog):
    with caplog.at_level("INFO"):
        first = family.cascade(cost=0.7)
        assert "Choosing a cascade on 600 validation samples" in caplog.text
        caplog.clear()
        second = ModelFamily.load(folder).cascade(cost=0.7)
        assert "Choosing" not in caplog.text
    assert second.report == first.report
    assert second.threshold == first.threshold


def test_nothing_or_all_may_be_escalated(family):
    ids = samples(30).ids
    for threshold, share in ((0.0, 0.0), (math.inf, 1.0)):
        cascade = family.cascade(cost=0.6)
        cascade.threshold = threshold
        _, asked = cascade.classify(ids)
        assert float(asked.float().mean()) == share
    report = family.cascade(cost=0.6).report
    assert report is not None
    endless = CascadeReport.from_dict(report.asdict() | {"threshold": None})
    assert math.isinf(endless.threshold)
    assert CascadeReport.from_dict(report.asdict()) == report
    assert "standard error), chosen on 300 others" in str(report)


class Known:
    """A member by name and size."""

    def __init__(self, name: str, params: int) -> None:
        self.name, self.params = name, params


LABELS = torch.zeros(10, dtype=torch.long)


def seen(name: str, seconds: float, right: set[int], sure: float = 0.9) -> Any:
    """A member that gives the right class of ten samples, where it is right, a bit less in each than in the last."""
    member: Any = Known(name, int(1000 * seconds))
    chances = [sure - number / 100 if number in right else 0.49 - number / 100 for number in range(10)]
    probabilities = torch.tensor([[chance, 1 - chance] for chance in chances])
    answers = [number in right for number in range(10)]
    return choose_cascade._Seen(member, 1.0, probabilities, answers, probabilities[:, 0], seconds)


def reached(plan: Any) -> float:
    """The accuracy of a plan on the samples it was made from."""
    small = plan.pair.small
    return accuracy_at(small.confidences, small.right, plan.pair.right, plan.threshold)


class Members:
    def __init__(self, *members: Any) -> None:
        self._members = {each.member.name: each.member for each in members}

    def __getitem__(self, name: str) -> Any:
        return self._members[name]


def names(pairs: list[Any]) -> list[tuple[str, str]]:
    return [(pair.small.member.name, pair.large.member.name) for pair in pairs]


def test_all_pairs_of_a_member_and_a_slower_one_that_makes_it_better_are_looked_at():
    *_, middle, dense = members = [
        seen("small", 1.0, {0, 1, 2, 3, 4, 5}),
        seen("poor", 2.0, {0, 1, 2}),
        seen("middle", 3.0, {0, 1, 2, 3, 4, 5, 6, 7, 8}),
        seen("dense", 10.0, {0, 1, 2, 3, 4, 5, 6, 9}, sure=0.99),
    ]
    family: Any = Members(*members)
    pairs = choose_cascade._pairs(family, members, None, None, LABELS)
    # Nobody asks one that adds nothing: not the poor one. The dense one is worse than the middle one, and adds to it.
    assert names(pairs) == [
        *(("small", "middle"), ("small", "dense")),
        *(("poor", "middle"), ("poor", "dense")),
        ("middle", "dense"),
    ]
    assert sum(pairs[-1].right) == 10
    assert names(choose_cascade._pairs(family, members, None, "poor", LABELS)) == [("small", "poor")]
    weak: Any = [middle, seen("weak", 4.0, {1, 2}, sure=0.6)]
    with pytest.raises(ConfigurationError, match=r"'middle' has the best accuracy.*'middle' has no one to ask"):
        choose_cascade._pairs(Members(*weak), weak, "middle", None, LABELS)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigurationError, match="a cascade can gain nothing: use it alone"):
        choose_cascade._pairs(Members(*weak), weak, None, None, LABELS)  # pyright: ignore[reportArgumentType]

    # Costs are fractions of the slowest one's time, whoever is asked: 0.1 + half of 0.3 is 0.25.
    plan = choose_cascade._plan(pairs[0], dense, 0.26, None)
    assert plan is not None
    assert plan.cost == pytest.approx(0.25)
    assert reached(plan) == pytest.approx(0.9)
    # The five that the small one is least sure of are asked for, and of the others it is sure by 0.9 to 0.86.
    both = pairs[0].of_right[[5, 6, 7, 8, 9]]
    assert plan.likely == pytest.approx(float(both.sum() + 0.9 + 0.89 + 0.88 + 0.87 + 0.86) / 10)
    assert choose_cascade._plan(pairs[-1], dense, 0.26, None) is None
    cheapest = choose_cascade._plan(pairs[0], dense, None, 0.8)
    assert cheapest is not None
    assert reached(cheapest) == pytest.approx(0.8)
    assert cheapest.cost == pytest.approx(0.1 + 0.3 * 0.2)  # the two least sure, which both together get right


def test_the_pair_that_finds_the_right_class_likeliest_is_better_than_one_with_a_lucky_answer_more():
    """One is right by a hair in all ten samples, the other in nine and sure of them."""
    small = seen("small", 1.0, {0, 1, 2, 3, 4, 5})
    hair = seen("hair", 3.0, set(range(10)), sure=0.75)
    sure = seen("sure", 3.0, {0, 1, 2, 3, 4, 5, 6, 7, 8}, sure=0.99)
    dense = seen("dense", 10.0, set(), sure=0.6)
    plans = [
        choose_cascade._plan(choose_cascade._pair(small, other, LABELS), dense, 0.41, None) for other in (hair, sure)
    ]
    assert None not in plans
    assert reached(plans[0]) > reached(plans[1])
    assert plans[0].likely < plans[1].likely  # pyright: ignore[reportOptionalMemberAccess]


def test_the_second_may_weigh_nothing_or_all():
    sure, guess = seen("sure", 2.0, set(range(10))), seen("guess", 1.0, {0, 1, 2, 3, 4})
    assert choose_cascade._pair(guess, sure, LABELS).weight == pytest.approx(1.0, abs=1e-6)
    assert choose_cascade._pair(sure, guess, LABELS).weight == pytest.approx(0.0, abs=1e-6)


def test_a_report_says_where_a_member_alone_is_as_good(family):
    report = family.cascade(cost=0.7).report
    assert "alone is as good" not in str(report)  # the dense one takes longer, the small one is worse
    assert report.best_alone == "final"
    metrics = report.metrics | {"middle": report.metric}
    other = replace(report, metrics=metrics, throughputs=report.throughputs | {"middle": 1.1 * report.throughput})
    assert other.best_alone == "middle"
    assert "middle alone is as good in no more time: rather use it, family['middle']" in str(other)
    slower = replace(other, throughputs=report.throughputs | {"middle": 0.9 * report.throughput})
    assert slower.best_alone == "final"


def test_what_cannot_be_met_is_refused(family, folder, tmp_path):
    for arguments, why in (
        ({"cost": 0.001}, r"cost=0.001 cannot be met: 'final' alone, .* of the time of 'dense', .* too much"),
        ({"accuracy": 1.0}, "accuracy=1 cannot be met: the best that a cascade reaches on validation is"),
        ({"cost": 0.0}, "cost must be a number greater than 0, got 0.0"),
        ({"accuracy": 1.2}, r"accuracy must be a number in \(0, 1\], got 1.2"),
        ({"cost": 0.5, "accuracy": 0.9}, "Give cost or accuracy, not both"),
        ({"small": "dense", "large": "final"}, "a cascade begins with the faster one"),
        ({"large": "final"}, "no slower one makes a faster one better"),
        ({"large": "tiny"}, "no member 'tiny'"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"data": (["x"], ["a", "b"])}, "1 texts and 2 labels"),
        ({"data": (["x"], ["z"])}, "the labels z, the family knows a, b, c"),
    ):
        with pytest.raises(ConfigurationError, match=why):
            family.cascade(**arguments, again=True)
    (family.folder / kept.VALIDATION_FILE).rename(tmp_path / "aside")
    try:
        with pytest.raises(ConfigurationError, match="no validation samples to choose a cascade on"):
            family.cascade(again=True)
        kept.save(samples(20), family.folder)
        with pytest.raises(ConfigurationError, match="20 are too few, it takes 40"):
            family.cascade(again=True)
    finally:
        (tmp_path / "aside").replace(family.folder / kept.VALIDATION_FILE)
