"""Pretrained Hugging Face models, by name or folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from adaptrain.errors import ConfigurationError
from adaptrain.nlp.quiet import quiet_transformers

log = logging.getLogger(__name__)

_CLASSES: dict[str, Any] = {
    "sequence classification": (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    "causal language modelling": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
}


def load_model(purpose: str, name_or_path: str, *, data: Any, **config: Any) -> Any:
    """Loads a pretrained model; what its checkpoint lacks, such as a new classifier head, is random and logged.

    Args:
        purpose: `"sequence classification"` or `"causal language modelling"`.
        name_or_path: A Hugging Face name or a local folder.
        data: The data module: its tokenizer must be the model's, and its `max_length` within the model's positions.
        **config: Overrides of the model's configuration.

    Raises:
        ConfigurationError: There is no such model, it is not for this purpose, or it does not suit the data.
    """
    if (folder := Path(name_or_path).expanduser()).is_dir():
        name_or_path = str(folder)
        if not (folder / "config.json").is_file():
            raise ConfigurationError(
                f"model.name_or_path={name_or_path} has no config.json, so it is no Hugging Face model folder."
                " Give the folder that holds config.json and the weights."
            )
    with quiet_transformers():
        try:
            found = AutoConfig.from_pretrained(name_or_path)
        except Exception as error:  # transformers, the hub's client and the network each raise their own
            raise ConfigurationError(
                f"The model {name_or_path!r} cannot be loaded: {_first_line(error)} Check the name and the network, or"
                " give a local folder that holds config.json and the weights: model.name_or_path=/path/to/model"
            ) from error
        auto, offered = _CLASSES[purpose]
        if found.model_type not in offered:
            raise ConfigurationError(
                f"model.name_or_path={name_or_path} is a {found.model_type!r} model, which Hugging Face does not offer"
                f" for {purpose}. Choose a text model that is."
            )
        _check_fit(found, name_or_path, data)
        try:
            model, info = auto.from_pretrained(
                name_or_path,
                pad_token_id=data.tokenizer.pad_token_id,
                ignore_mismatched_sizes=True,  # a head for other classes is replaced by a new one
                output_loading_info=True,
                **config,
            )
        except Exception as error:
            raise ConfigurationError(
                f"The weights of {name_or_path!r} cannot be loaded: {_first_line(error)} Check that the model is"
                " complete: config.json and model.safetensors."
            ) from error
    new = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    if new:
        log.info("Not in the checkpoint of %s, so trained from random weights: %s.", name_or_path, ", ".join(new))
    model = model.float()
    if purpose == "causal language modelling":
        _refuse_bidirectional(model, name_or_path)
    return model.train()


@torch.no_grad()
def _refuse_bidirectional(model: Any, name: str) -> None:
    """An encoder, loaded for the next token, would see the token it should predict: found by changing a later one."""
    model.eval()
    first, second = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 5]])
    before, after = model(first).logits[:, :3], model(second).logits[:, :3]
    if (before - after).abs().max() > 1e-5 * before.abs().max():
        raise ConfigurationError(
            f"model.name_or_path={name} ({type(model).__name__}) reads to the right of a token as well, so it cannot be"
            " trained to predict the next one. Choose a decoder, such as a GPT or Llama model."
        )


def _check_fit(config: Any, name: str, data: Any) -> None:
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    limits = [limit for limit in (positions, data.tokenizer.model_max_length) if limit]
    if limits and data.max_length > min(limits):
        raise ConfigurationError(
            f"data.max_length={data.max_length} is more than the {min(limits)} tokens that {name} can read."
            f" Set data.max_length to at most {min(limits)}."
        )
    if len(data.tokenizer) > text.vocab_size:
        raise ConfigurationError(
            f"The data's tokenizer has {len(data.tokenizer)} tokens, but {name} has embeddings for {text.vocab_size}:"
            f" they do not belong together. Set data.tokenizer={name}."
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".") + "."
