"""One small model of each supported architecture."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
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


def _modernbert() -> Any:
    names = {"hidden_dropout_prob", "attention_probs_dropout_prob"}
    shape = {name: value for name, value in _ENCODER.items() if name not in names}
    tokens = dict.fromkeys(("bos_token_id", "cls_token_id", "eos_token_id", "pad_token_id", "sep_token_id"), 0)
    return ModernBertForSequenceClassification(ModernBertConfig(**shape, **tokens))


def _gpt2() -> Any:
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_inner=64, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config)
    with torch.no_grad():  # its biases start at zero, and what is zero cannot be got wrong
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def _t5(gated: bool) -> Any:
    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu" if gated else "relu",
        decoder_start_token_id=0,
        eos_token_id=2,
    )
    return T5ForConditionalGeneration(config)


MODELS = {
    "bert": tiny_bert,
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**_ENCODER)),
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(embedding_size=32, **_ENCODER)),
    "distilbert": _distilbert,
    "llama": tiny_llama,
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_DECODER)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_DECODER)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_DECODER, head_dim=8)),
    "gpt2": _gpt2,
    "modernbert": _modernbert,
    "t5": lambda: _t5(False),
    "t5-gated": lambda: _t5(True),
}
WITHOUT_HEADS = ("t5", "t5-gated")


def batch(seed: int = 0, *, size: int = 4, length: int = 12) -> dict[str, torch.Tensor]:
    """Tokens, a mask with padding, and one label for each sample."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(size, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return {"input_ids": torch.randint(4, 60, (size, length), generator=generator), "attention_mask": mask}


def forward(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits; an encoder-decoder reads the tokens in both of its halves."""
    decoder = {"decoder_input_ids": inputs["input_ids"]} if model.config.is_encoder_decoder else {}
    return model(**inputs, **decoder).logits


def loss_of(model: Any, seed: int = 0) -> torch.Tensor:
    """A loss with the labels that the model's task needs."""
    inputs = batch(seed)
    language = type(model).__name__.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration"))
    labels = inputs["input_ids"] if language else torch.arange(4) % 3
    return model(**inputs, labels=labels).loss
