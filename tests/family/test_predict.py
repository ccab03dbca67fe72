from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adaptrain import ConfigurationError, FamilyCheckpoint, ModelFamily
from adaptrain.family.member import batches_by_length
from adaptrain.nlp.tokenization import train_tokenizer
from tests.family.conftest import pruning
from tests.toys import TextModule, language_model_samples, quiet_trainer, text_loader, tiny_bert, tiny_llama

TEXTS = ["one two", "", "three", "one two three four five six seven eight nine ten", "four\nfive"]


class ReadingModule(TextModule):
    """It knows the tokenizer of its data."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.tokenizer = train_tokenizer(["one two three four five six seven"] * 5, vocab_size=300)


def family_of(folder: Path, model: Any, loader: Any) -> ModelFamily:
    trainer = quiet_trainer(folder, callbacks=[FamilyCheckpoint(), pruning()], max_epochs=4)
    trainer.fit(ReadingModule(model), loader)
    return ModelFamily.load(folder)


def widened(model: Any) -> Any:
    model.resize_token_embeddings(300)
    return model


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory) -> ModelFamily:
    return family_of(tmp_path_factory.mktemp("bert"), widened(tiny_bert()), text_loader())


@pytest.fixture(scope="module")
def language_models(tmp_path_factory) -> ModelFamily:
    folder = tmp_path_factory.mktemp("llama")
    return family_of(folder, widened(tiny_llama()), text_loader(language_model_samples()))


@pytest.mark.parametrize("name", ["dense", "pruned-1", "final"])
def test_labels_in_the_order_of_the_texts(classifiers, name):
    member = classifiers[name]
    done: list[int] = []
    found = member.predict(TEXTS, batch_size=2, progress=done.append)
    assert sum(done) == len(TEXTS)
    for text, prediction in zip(TEXTS, found, strict=True):
        inputs = classifiers.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            expected = member.model()(**inputs).logits.softmax(-1)[0]
        assert list(prediction.scores.values()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert prediction.output == classifiers.labels[int(expected.argmax())]
        assert prediction.confidence == pytest.approx(float(expected.max()), abs=1e-5)
        assert prediction.member == name
    assert member.predict(TEXTS[0]) == member.predict([TEXTS[0]])
    assert member.predict([]) == []


def test_long_texts_are_cut_as_in_training(classifiers):
    long = "one two three four five six seven " * 50
    (cut,) = classifiers.encode([long])
    assert len(cut) == classifiers.max_length == 64
    assert classifiers["final"].predict(long)[0].output in classifiers.labels


@pytest.mark.parametrize("name", ["dense", "final"])
def test_a_language_model_goes_on_as_it_would_alone(language_models, name):
    member, tokenizer = language_models[name], language_models.tokenizer
    for text, prediction in zip(TEXTS, member.predict(TEXTS, batch_size=3, max_new_tokens=6), strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] or [tokenizer.bos_token_id]
        start = len(ids)
        for _ in range(6):
            with torch.no_grad():
                logits = member.model()(input_ids=torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == member.model().generation_config.eos_token_id:
                break
        assert prediction.output == tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert prediction.confidence is None


def test_a_prompt_keeps_its_end_and_leaves_room(language_models):
    assert language_models["final"].predict("one two " * 100, max_new_tokens=4)
    with pytest.raises(ConfigurationError, match=r"max_new_tokens must be below 64, .* got 64"):
        language_models["final"].predict("one", max_new_tokens=64)


def test_batches_are_of_like_length():
    ids = [torch.zeros(length) for length in (3, 9, 1, 7, 5)]
    assert list(batches_by_length(ids, 2)) == [[1, 3], [4, 0], [2]]
