"""What a command says while it runs: sentences of rank 0, and errors of the libraries."""

from __future__ import annotations

import logging
import sys
import threading
from contextlib import suppress
from typing import Any, TextIO

import datasets
import diffusers
import transformers

from sdpo.command import NO_ROOM

log = logging.getLogger(__name__)


class Unbreakable:
    """A text stream that goes on where what it writes to is full or closed: a log must not end a run."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text if that is possible."""
        with suppress(OSError, ValueError):  # the file is full or closed, or cannot encode a character
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if that is possible."""
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def report_thread(failed: threading.ExceptHookArgs) -> None:
    """Say in a sentence that a thread, as TensorBoard's, could not write; anything else is shown as it would be."""
    if isinstance(failed.exc_value, OSError) and failed.exc_value.errno in NO_ROOM:
        log.error(f"{failed.thread.name if failed.thread else 'a thread'} cannot write: {failed.exc_value.strerror}")
    else:
        threading.__excepthook__(failed)


def start_console(main_process: bool) -> None:
    """Log sentences on the main process, errors only on the others, and no progress bars of the libraries."""
    threading.excepthook = report_thread
    if not isinstance(sys.stderr, Unbreakable):
        sys.stderr = Unbreakable(sys.stderr)
    logging.basicConfig(format="%(message)s", level=logging.INFO if main_process else logging.ERROR, force=True)
    for name in ("httpx", "httpx2", "accelerate", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)  # what fails in the end is said once, by InputError
    quiet_libraries()


def quiet_libraries() -> None:
    """No progress bars of the libraries, and of their messages errors only."""
    for library in (datasets, diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
