"""Exports the model of a run, so that it loads without adaptrain.

python scripts/export.py runs/quickstart/2026-01-31_12-00-00 exported
python scripts/export.py runs/quickstart/2026-01-31_12-00-00/checkpoints/last.ckpt exported --format onnx

layouts: uniform     plain Hugging Face of the same shape; needs layers that are equally wide (train with
                     callbacks.pruning.uniform=true) and, in BERT and its kin, all heads
         padded      plain Hugging Face as wide as the widest layer, filled up with zeros: same outputs, but bigger and
                     slower than the pruned model
         structured  as small as it is; with --format hf it loads with adaptrain.compression.load
         auto        the smallest that loads without adaptrain
formats: hf            a folder for transformers
         onnx          model.onnx, for onnxruntime and others (needs: pip install "adaptrain[export]")
         torch_export  model.pt2, for torch.export.load
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from adaptrain.app import trained
from adaptrain.compression import Exported, export
from adaptrain.compression.exporter import FORMATS, LAYOUTS
from adaptrain.errors import ConfigurationError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN_DIR_OR_CKPT", type=Path, help="the folder of a run, or a checkpoint in it")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument("--layout", choices=LAYOUTS, default="auto", help="the shapes that are written (default: auto)")
    parser.add_argument("--format", choices=FORMATS, default="hf", help="the form they are written in (default: hf)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in OUT")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a folder's name may hold what the terminal cannot say
    given = parser.parse_args(arguments)
    try:
        found = trained.load(given.run)
        written = export(
            found.model,
            given.out,
            layout=given.layout,
            format=given.format,
            tokenizer=found.tokenizer,
            overwrite=given.overwrite,
        )
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    whose = "the final model" if found.finished else "of a run that is not finished"
    print(f"{found.checkpoint}: step {found.step}, {whose}")
    tell(written)
    return 0


def tell(written: Exported) -> None:
    """Prints what was written and how to load it."""
    print(f"{written.path}: {written.model_class}, format {written.format}, layout {written.layout} ({written.reason})")
    share = written.params / written.dense_params
    print(f"  parameters  {written.params:,}, {share:.2f}x of the dense model's {written.dense_params:,}")
    if written.padding_params:
        print(
            f"              {written.padding_params:,} of them are zeros of padding; --layout structured or a graph"
            " (--format onnx, torch_export) goes without"
        )
    print(f"  on disk     {written.size_bytes / 2**20:.2f} MiB ({written.weights_file})")
    if written.labels:
        print(f"  labels      {', '.join(written.labels)}")
    if written.inputs:
        print(f"  inputs      {', '.join(written.inputs)}: int64, (batch, sequence)")
    print(f"load it with: {written.load}")


if __name__ == "__main__":
    sys.exit(main())
