"""One small model of each supported architecture."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from tests.toys import tiny_bert, tiny_llama

_ENCODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def _distilbert() -> Any:
    config = DistilBertConfig(
        vocab_size=64,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
        max_position_embeddings=64,
        num_labels=3,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
    )
    return DistilBertForSequenceClassification(config)


MODELS = {
    "bert": tiny_bert,
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**_ENCODER)),
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(embedding_size=32, **_ENCODER)),
    "distilbert": _distilbert,
    "llama": tiny_llama,
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_DECODER)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_DECODER)),
}


def batch(seed: int = 0, *, size: int = 4, length: int = 12) -> dict[str, torch.Tensor]:
    """Tokens, a mask with padding, and one label for each sample."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(size, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return {"input_ids": torch.randint(4, 60, (size, length), generator=generator), "attention_mask": mask}


def loss_of(model: Any, seed: int = 0) -> torch.Tensor:
    """A loss with the labels that the model's task needs."""
    inputs = batch(seed)
    language = type(model).__name__.endswith("CausalLM")
    labels = inputs["input_ids"] if language else torch.arange(4) % 3
    return model(**inputs, labels=labels).loss
