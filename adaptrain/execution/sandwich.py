"""Training a network and smaller ones inside of it at once: the sandwich rule."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaptrain.errors import ConfigurationError
from adaptrain.execution.distillation import Pass, counted_logits, divergence, watch


class SandwichLoss:
    """Adds to a training step's loss what the smaller networks make of the same inputs.

        loss = task(full) + KL(full ‖ smallest) + KL(full ‖ one of the others, by chance)

    The full network learns the task, the smaller ones to say what it says (in-place distillation, without gradients
    into the full one's answer).

    Source: Yu and Huang 2019, "Universally Slimmable Networks and Improved Training Techniques".

    Args:
        model: The full network; its outputs have logits.
        networks: The smaller ones, from the largest to the smallest, called as the model is.
        seed: Of the choice of the one between.
    """

    def __init__(self, model: nn.Module, networks: Sequence[Callable[..., Any]], *, seed: int = 0) -> None:
        self.model = model
        self.networks = list(networks)
        self.seed = seed
        self.samples = 0  # of the step just run

    def __call__(self, step: Callable[[], Any], number: int) -> tuple[Any, Tensor | None]:
        """Runs a training step.

        Args:
            step: Returns a loss, a mapping with a `loss`, or None.
            number: Of the optimizer step, which alone decides by chance: the same on every rank and when resumed.

        Returns:
            The same with the smaller networks' part in the loss; and that part alone, detached.

        Raises:
            ConfigurationError: The step did not run the model, or its output has no logits.
        """
        passes: list[Pass] = []
        with watch(self.model, passes):
            result = step()
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if loss is None:
            return result, None
        if not passes:
            raise ConfigurationError(
                f"ElasticTraining needs the logits of {type(self.model).__name__}, but training_step did not call it"
                " with gradients. Call the model itself there (self.model(**batch)), or leave ElasticTraining out."
            )
        self.samples = len(passes[0].logits)
        part = torch.stack([self._learn(network, each) for network in self.chosen(number) for each in passes])
        learned = part.sum() / len(passes)
        total = loss + learned
        return ({**result, "loss": total} if isinstance(result, Mapping) else total), learned.detach()

    def chosen(self, number: int) -> list[Callable[..., Any]]:
        """Returns the networks that a step trains: the smallest, and one of the others."""
        *others, smallest = self.networks
        between = random.Random(f"{self.seed} {number}").choice(others) if others else None
        return [smallest] if between is None else [between, smallest]

    def _learn(self, network: Callable[..., Any], each: Pass) -> Tensor:
        # An encoder-decoder makes its decoder's inputs of the labels; to others they only cost a loss.
        seq2seq = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        kwargs = {name: value for name, value in each.kwargs.items() if seq2seq or name != "labels"}
        logits = network(*each.args, **kwargs).logits
        return divergence(logits, each.logits.detach(), counted_logits(self.model, each))
