"""What a user's mistake looks like: one message and an exit code, no traceback."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import OmegaConfBaseException

from adaptrain.app.overview import program
from adaptrain.errors import ConfigurationError

EXIT_CODE = 2  # as argparse has it for a wrong command line

# What offers a module that may be missing, for the hint. The rest comes with adaptrain itself.
EXTRAS = {
    "wandb": "wandb",
    "mlflow": "mlflow",
    "tensorboard": "tensorboard",
    "tensorboardX": "tensorboard",
    "transformers": "nlp",
    "tokenizers": "nlp",
    "datasets": "nlp",
    "safetensors": "nlp",
}


def user_message(error: BaseException) -> str | None:
    """Returns what to tell the user, or None where the error is no mistake of the user's."""
    for cause in _chain(error):
        if isinstance(cause, ConfigurationError) or _is_lightning_refusal(cause):
            return str(cause)
    if isinstance(error, ImportError):
        return _missing_extra(error)
    if isinstance(error, OmegaConfBaseException | HydraException):
        return str(error).strip()
    return None


def full_disk_message(error: BaseException) -> str | None:
    """Returns what to tell the user where a file could not be written for want of space, or None."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            where = cause.filename2 or cause.filename
            return f"{cause.strerror}{f': {where}' if where else ''}. Make room for it."
    return None


def is_interrupt(error: BaseException) -> bool:
    """Whether Ctrl-C ended it: Lightning turns that into `SystemExit(1)`."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
    )


def wants_traceback() -> bool:
    """Whether the user asked for everything, as with any Hydra application."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def show(message: str) -> None:
    """Prints a user's mistake to stderr."""
    print(f"error: {message}", file=sys.stderr)  # noqa: T201


def show_resume(folder: Path) -> None:
    """Says how to go on with a run that ended early."""
    print(f"resume with: {program()} resume={folder}", file=sys.stderr)  # noqa: T201


@contextmanager
def built_from(key: str) -> Iterator[None]:
    """Names the config key in what a constructor raises about the values it was given.

    Raises:
        ConfigurationError: In place of a refused value, an unknown argument or a missing package.
    """
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        if key == "trainer" and _is_lightning_refusal(cause):
            no_device = re.search("accelerator|backend found", str(cause), re.IGNORECASE)
            hint = " trainer.accelerator=auto takes the best device there is." if no_device else ""
            raise ConfigurationError(f"{key}: {str(cause).strip()}{hint}") from error
        if message := user_message(cause):
            raise ConfigurationError(message) from error
        if isinstance(cause, ImportError) and str(cause).startswith("Requirement"):  # Lightning's, with how to get it
            raise ConfigurationError(f"{key}: {cause}") from error
        # Lightning's Trainer refuses some values (devices=-3) with a TypeError.
        wrong_type = isinstance(cause, TypeError) and ("argument" in str(cause) or key == "trainer")
        if isinstance(cause, ValueError) or wrong_type:
            raise ConfigurationError(f"{key}: {cause}") from error
        if isinstance(error, InstantiationException):
            raise ConfigurationError(f"{key}: {str(error).strip()}") from error
        raise


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def _is_lightning_refusal(error: BaseException) -> bool:
    # By name: both Lightning namespaces have one, and importing them to ask would cost seconds.
    return type(error).__name__ == "MisconfigurationException"


def _missing_extra(error: ImportError) -> str | None:
    # Lightning raises with a requirement as its message and no `name`.
    text = error.name or str(error)
    for package, extra in EXTRAS.items():
        if re.search(rf"(?<![\w.]){package}(?!\w)", text):
            return f'This needs the package {package}, which is not installed: pip install "adaptrain[{extra}]".'
    return None
