"""Fuses models of one architecture into one of the same size, which loads with transformers.

python scripts/fuse.py runs/sst2/2026-01-31_12-00-00 runs/sst2/2026-01-31_13-00-00 --out soup
python scripts/fuse.py model_a model_b --method ties --base pretrained --out fused
python scripts/fuse.py model_a model_b model_c --method greedy_soup --evaluate dev.csv --out soup

Models are runs of the app, checkpoints in them, or Hugging Face folders. They should be fine-tuned from one and the
same model (--base, where the method needs it).

methods: uniform_soup     the mean of the weights
         greedy_soup      from the best on, each model joins the mean if accuracy on --evaluate is then no worse
         wise_ft          one model and --base: between the two, by --alpha
         slerp            two models: on the arc between them, by --t
         task_arithmetic  --base and what each model changed, times --scaling
         ties             the same after dropping small changes (--density) and those against the common sign
         dare             the same with a random --density of the changes, rescaled
         model_stock      between --base and the mean, by the angle between the changes
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from adaptrain.app import runs, trained
from adaptrain.compression import export
from adaptrain.errors import ConfigurationError
from adaptrain.family.member import class_logits
from adaptrain.fusion import merge
from adaptrain.fusion.merging import METHODS
from adaptrain.fusion.sources import read
from adaptrain.nlp.files import LABEL_COLUMNS, TEXT_COLUMNS, read_table
from adaptrain.nlp.quiet import quiet_transformers


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL", nargs="+", type=Path, help="a run, a checkpoint in one, or a folder")
    parser.add_argument("--out", metavar="OUT", type=Path, required=True, help="the folder to write")
    parser.add_argument("--method", choices=METHODS, default="uniform_soup", help="(default: uniform_soup)")
    parser.add_argument("--base", metavar="MODEL", type=Path, help="what the models were fine-tuned from")
    parser.add_argument("--weights", metavar="W", type=float, nargs="+", help="one for each model (uniform_soup)")
    parser.add_argument("--alpha", type=float, help="share of the fine-tuned model in [0, 1] (wise_ft; default: 0.5)")
    parser.add_argument("--t", type=float, help="share of the way in [0, 1] (slerp; default: 0.5)")
    parser.add_argument("--scaling", type=float, help="of what the models changed (default: 0.4; ties: 1)")
    parser.add_argument("--density", type=float, help="share of the changes kept, in (0, 1] (ties, dare; default: 0.2)")
    parser.add_argument("--seed", type=int, help="of what is dropped at random (dare; default: 0)")
    parser.add_argument(
        "--evaluate", metavar="FILE", help="held-out texts with labels: the accuracy of all models and of the result"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in OUT")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a folder's name may hold what the terminal cannot say
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("adaptrain").setLevel(logging.INFO)
    try:
        with quiet_transformers():
            _fuse(given)
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _fuse(given: argparse.Namespace) -> None:
    models = [_load(path) for path in given.models]
    base = None if given.base is None else _load(given.base)[0]
    tokenizer = next((tokenizer for _, tokenizer in models if tokenizer is not None), None)
    options = {name: getattr(given, name) for name in ("weights", "alpha", "t", "scaling", "density", "seed")}
    accuracy = None if given.evaluate is None else _accuracy_on(given.evaluate, models[0][0], tokenizer)
    if accuracy is not None:
        for path, (model, _) in zip(given.models, models, strict=True):
            print(f"{path}: accuracy {accuracy(model):.2%}")
    fused = merge(
        [model for model, _ in models],
        given.method,
        base=base,
        evaluate=accuracy if given.method == "greedy_soup" else None,
        **options,
    )
    if accuracy is not None:
        print(f"{given.method} of {len(models)}: accuracy {accuracy(fused):.2%}")
    written = export(fused, given.out, tokenizer=tokenizer, overwrite=given.overwrite)
    print(f"{written.path}: {written.model_class}, {written.params:,} parameters, layout {written.layout}")
    print(f"load it with: {written.load}")


def _load(path: Path) -> tuple[Any, Any]:
    """Returns a model and its tokenizer, None where it has none."""
    if path.is_file() or (path / runs.CONFIG_FILE).is_file():
        found = trained.load(path)
        return found.model, found.tokenizer
    source = read(path, str(path))
    return source.module, _tokenizer(path)


def _tokenizer(path: Path) -> Any:
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path))


def _accuracy_on(file: str, model: Any, tokenizer: Any) -> Callable[[Any], float]:
    """Returns what measures a classifier's accuracy on a file of texts and labels."""
    if tokenizer is None:
        raise ConfigurationError("--evaluate needs a tokenizer, and none of the models' folders has one.")
    known = getattr(model.config, "label2id", {})
    if not hasattr(model, "classifier") and not hasattr(model, "score"):
        raise ConfigurationError(f"--evaluate measures classifiers, and the models are {type(model).__name__}.")
    table = read_table(file, argument="--evaluate")
    _, texts = table.pick(None, TEXT_COLUMNS, argument="text column")
    _, labels = table.pick(None, LABEL_COLUMNS, argument="label column")
    numbers = {**{str(value): value for value in known.values()}, **known}
    if odd := next((label for label in labels if str(label) not in numbers), None):
        raise ConfigurationError(f"--evaluate: {file} has the label {odd!r}; the models know {', '.join(known)}.")
    wanted = torch.tensor([numbers[str(label)] for label in labels])
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))
    ids = [
        torch.tensor(each) for each in tokenizer([str(t) for t in texts], truncation=True, max_length=limit).input_ids
    ]

    def accuracy(model: Any) -> float:
        logits = class_logits(model.eval(), ids, tokenizer.pad_token_id or 0, batch_size=32)
        return float((logits.argmax(-1) == wanted).float().mean())

    return accuracy


if __name__ == "__main__":
    sys.exit(main())
