"""What all benchmarks train with: a trainer that leaves nothing behind, and silence."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from transformers.utils import logging as transformers_logging


def quiet_trainer(folder: str, **settings: Any) -> Any:
    """Returns a trainer on one device, the CPU unless told otherwise, that prints, logs and saves nothing."""
    usual: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "default_root_dir": folder,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(**(usual | settings))


def be_quiet(threads: int | None = None) -> None:
    """Keeps libraries' notices out of a benchmark's output, and torch to some threads."""
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Of Lightning's two names the one imported last prints for both.
    for name in ("pytorch_lightning", "lightning.pytorch", "pytorch_lightning.utilities.rank_zero", "adaptrain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if threads is not None:
        torch.set_num_threads(threads)
