"""What a command says while it runs: sentences of rank 0, and errors of the libraries."""

from __future__ import annotations

import logging

import datasets
import diffusers
import transformers


def start_console(main_process: bool) -> None:
    """Log sentences on the main process, errors only on the others, and no progress bars of the libraries."""
    logging.basicConfig(format="%(message)s", level=logging.INFO if main_process else logging.ERROR, force=True)
    for name in ("httpx", "httpx2", "accelerate", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)  # what fails in the end is said once, by InputError
    quiet_libraries()


def quiet_libraries() -> None:
    """No progress bars of the libraries, and of their messages errors only."""
    for library in (datasets, diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
