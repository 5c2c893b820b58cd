"""Whether a call fails for the compiler's sake or for the model's own: a model that cannot be called is said so."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moec.errors import ModelError

_LOGGER = "torch._subclasses.fake_tensor"  # logs the traceback of an operator that refuses its arguments


@contextmanager
def own_errors(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Generator[None]:
    """Raise ModelError in place of a compiled call's error where `model` itself fails on these arguments.

    What torch logs about such a call is not shown then: the model's own error says it.
    """
    logger, held = logging.getLogger(_LOGGER), _Held()
    logger.addFilter(held)
    try:
        yield
    except Exception as error:
        own = _own_error(model, args, kwargs)
        if own is not None:
            held.records.clear()
            raise ModelError(f"the model fails on these arguments, with and without moec: {brief(own)}") from own
        raise error
    finally:
        logger.removeFilter(held)
        for record in held.records:
            logger.handle(record)


class _Held(logging.Filter):
    """Keeps errors back until it is known whose they are."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR:
            return True
        self.records.append(record)
        return False


def _own_error(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Exception | None:
    try:
        torch.compiler.disable(model)(*args, **kwargs)
    except Exception as error:
        return error
    return None


def brief(error: BaseException) -> str:
    """The error in one line, with the last place in the user's own code: none of torch's, Python's import's or moec's.

    What does not parse names its own place.
    """
    not_own = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<frozen ")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(not_own)]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames and not isinstance(error, SyntaxError) else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
