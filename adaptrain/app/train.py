"""The command: `python train.py +experiment=...`, `python -m adaptrain`, `adaptrain`."""

from __future__ import annotations

import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from adaptrain.app import config, errors, overview, sweep
from adaptrain.app.cores import share_cores
from adaptrain.errors import ConfigurationError

log = logging.getLogger(__name__)

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

_job_started = False  # else it is Hydra that refused the command


def main() -> None:
    """Trains what the command line describes; without arguments, says which experiments there are."""
    global _job_started
    _job_started = False
    if len(sys.argv) == 1:
        print(overview.experiments_text())  # noqa: T201
        return
    share_cores()
    try:
        with overview.folded(sys.argv):
            _hydra_main()
    except HydraException as error:  # from --help and its kin, which Hydra does not guard
        errors.show(str(error).strip())
        raise SystemExit(errors.EXIT_CODE) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except SystemExit as exit_:
        if errors.is_interrupt(exit_):
            raise SystemExit(INTERRUPTED) from None
        if exit_.code == 1 and not _job_started:
            for hint in overview.near_keys([item for item in sys.argv[1:] if "=" in item]):
                print(hint, file=sys.stderr)  # noqa: T201
        raise
    finally:
        sweep.clean_up()


@hydra.main(version_base="1.3", config_path=str(config.config_dir()), config_name="train")
def _hydra_main(cfg: DictConfig) -> float | None:
    global _job_started
    _job_started = True
    hydra_cfg = HydraConfig.get()
    in_sweep = hydra_cfg.mode == RunMode.MULTIRUN
    try:
        return run(
            cfg, overrides=list(hydra_cfg.overrides.task), sweep_job=hydra_cfg.runtime.output_dir if in_sweep else None
        )
    except Exception as error:
        mistake = errors.user_message(error)
        message = mistake or errors.full_disk_message(error)
        if errors.wants_traceback() or (message is None and not in_sweep):
            raise
        if message is None:
            traceback.print_exc()
        else:
            errors.show(message)
        if in_sweep:
            return math.nan  # the other jobs go on
        raise SystemExit(errors.EXIT_CODE if mistake else 1) from None


def run(cfg: DictConfig, *, overrides: Sequence[str] = (), sweep_job: str | None = None) -> float | None:
    """Trains one model and leaves its report.

    Args:
        cfg: The composed config.
        overrides: The overrides it was composed with.
        sweep_job: The folder Hydra gave a job of a sweep, or None.

    Returns:
        The value of the optimized metric; None in a process that is not the first of its run.

    Raises:
        ConfigurationError: A user's mistake, before the first step, and no new folder is left; or another process
            trains in the folder.
        TrainingInterrupted: A signal ended training; the run can be resumed.
    """
    from adaptrain.app import lock, resume, runs

    resumed = resume.find(cfg, overrides) if cfg.resume else None
    if resumed is not None:
        cfg = resumed.cfg
    elif sweep_job is None:
        config.check(cfg)  # before a folder is made by a name that is none
    with ExitStack() as stack:
        try:
            folder = resumed.folder if resumed else runs.choose(cfg, sweep_job=sweep_job)
            new = resumed is None and (cfg.run_dir is None or not folder.exists())
            if runs.is_rank_zero():
                stack.enter_context(lock.held(folder))
        except OSError as error:
            raise ConfigurationError(
                f"The run's folder cannot be written: {error.strerror}: {error.filename}. Name another place:"
                " run_dir=..., or runs_dir=... for all runs."
            ) from error
        try:
            return _train(cfg, folder, resumed, overrides)
        except BaseException as error:
            if resume.is_resumable(folder):
                errors.show_resume(folder)
            elif (
                new
                and not (folder / resume.SUMMARY_FILE).exists()
                and runs.is_rank_zero()
                and (errors.user_message(error) or errors.is_interrupt(error) or not runs.is_begun(folder))
            ):
                runs.discard(folder)
            raise


def _train(cfg: DictConfig, folder: Path, resumed: Any, overrides: Sequence[str]) -> float | None:
    from adaptrain.app import finish, runs, trained
    from adaptrain.app.build import build, build_callbacks, build_trainer

    saved_cfg = cfg.copy()
    cfg.run_dir = str(folder.resolve())
    budget = config.check(cfg)
    from adaptrain import _lightning
    from adaptrain._lightning.csv_logger import FILE_NAME, drop_rows_from

    _quiet_lightning()
    _lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    named, callbacks = build_callbacks(cfg)
    trainer = build_trainer(cfg, callbacks)
    if budget.target and "pruning" not in named:
        log.warning("The budget asks for a smaller model (%s), but nothing in callbacks prunes.", _given(budget.target))
    if budget.trainable_params_m is not None and "adapters" not in named:
        log.warning(
            "budget.trainable_params_m=%g, but nothing in callbacks sees to it: callbacks=[default,adapters].",
            budget.trainable_params_m,
        )
    data = build(cfg.data, "data")
    data.prepare_data()
    data.setup("fit")
    optimized = config.check_optimized_metric(cfg.optimized_metric, data.task, cfg.model.get("_target_", ""))
    baseline = finish.load_baseline(cfg, data)
    model = build(cfg.model, "model", data=data)
    latency_input = finish.check_latency_input(cfg, model)

    if runs.is_rank_zero():
        facts = runs.create(folder, saved_cfg, overrides) if resumed is None else runs.read_facts(folder)
        if resumed is None:
            trained.describe(folder, model, data)
    else:
        facts = {}
    with runs.log_file(folder):
        if resumed:
            log.info("resuming %s from step %d (%s)", folder, resumed.step, resumed.checkpoint.name)
            drop_rows_from(folder / FILE_NAME, resumed.step)
        else:
            log.info("run: %s", folder)
        with finish.Measured(named.get("wall_clock")) as measured:
            trainer.fit(model, datamodule=data, ckpt_path=str(resumed.checkpoint) if resumed else None)
        return finish.finish(
            cfg,
            folder,
            trainer=trainer,
            model=model,
            data=data,
            named=named,
            measured=measured,
            budget=budget,
            baseline=baseline,
            latency_input=latency_input,
            optimized=optimized,
            facts=facts,
        )


def _given(target: dict[str, float]) -> str:
    return ", ".join(f"budget.{name}={value:g}" for name, value in target.items())


def _quiet_lightning() -> None:
    # What it has found (GPU available: False, ...) and hints at products; the run's own facts say what it runs on.
    # Whichever of the packages was imported last lends its logger to all.
    for package in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        for module in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
            logging.getLogger(f"{package}.{module}").setLevel(logging.WARNING)
    # Advice that a user of this command can do nothing about.
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",  # as it is when a run is resumed
        ".*The dirpath has changed from.*",  # a run that was moved or copied; its newest checkpoints are what counts
        ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning's own use of a deprecated class
    ):
        warnings.filterwarnings("ignore", message=message)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked loader workers would warn at every batch


if __name__ == "__main__":
    main()
