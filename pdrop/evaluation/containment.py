"""Run lmms-eval's code without letting it change the process around it.

It prints, draws progress bars that no setting turns off, retries its own bugs five times and then hides them, silences
all warnings, takes over loguru's output, reseeds every random generator, and makes PIL read truncated images as if they
were whole.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import re
import warnings
from collections.abc import Iterator
from importlib.util import find_spec

from pdrop.evaluation.answers import QuestionError, described

log = logging.getLogger(__name__)

BAR = re.compile(r"\d+%\||[\d?]\s?(it|ba|examples?|files?|s)/(s|it)\b")


@contextlib.contextmanager
def task_code(name: str, trouble: str) -> Iterator[None]:
    """Run lmms-eval's code: its output goes to the log, its exceptions get the task's name.

    Raises:
        RuntimeError: With the cause chained. A QuestionError already has the name and is passed on unchanged.
    """
    from tenacity import RetryError

    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield
    except RetryError as error:  # tasks retry their own bugs five times and then hide them
        cause = error.last_attempt.exception()
        raise RuntimeError(f"task {name}: {trouble}: {described(cause)}") from cause
    except (QuestionError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # also sys.exit, which would end the run as if it had succeeded
        raise RuntimeError(f"task {name}: {trouble}: {described(error)}") from error
    finally:
        lines = [line for line in re.split(r"[\r\n]+", printed.getvalue()) if line.strip() and not BAR.search(line)]
        if lines:
            log.info("task %s printed:\n%s", name, "\n".join(lines))


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random generators of Python, numpy and torch after the block."""
    import numpy
    import torch

    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextlib.contextmanager
def contained_import() -> Iterator[None]:
    """Undo what importing lmms-eval does to warnings, loguru and PIL; its messages go to the logger "lmms_eval".

    Raises:
        ValueError: If torchvision was built for another torch, which would otherwise fail later with a cryptic error.
    """
    import loguru
    from huggingface_hub import constants
    from PIL import ImageFile

    if find_spec("torchvision"):
        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError) as error:
            raise ValueError(f"torchvision does not fit the installed torch ({error}): reinstall both") from error
    os.environ.setdefault("HF_HOME", constants.HF_HOME)  # some tasks read it without checking that it is set
    truncated = ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings():
        yield
    ImageFile.LOAD_TRUNCATED_IMAGES = truncated
    loguru.logger.remove()
    target = logging.getLogger("lmms_eval")
    loguru.logger.add(lambda m: target.log(m.record["level"].no, m.record["message"]), level="WARNING")
