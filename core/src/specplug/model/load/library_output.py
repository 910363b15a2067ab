"""Keeps progress bars, notices and reports of Transformers, and of the libraries that it calls, out of our output."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from threading import Lock

_redirecting = Lock()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences Transformers; errors are still raised."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def quiet_quantizer() -> Iterator[None]:
    """Silences Transformers and the packages of quantised formats, which print banners and bars; one thread at a time."""
    with _redirecting, quiet_transformers(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield
