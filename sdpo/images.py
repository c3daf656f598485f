"""Images from bytes, paths, records of data sets or PIL, decoded to 8 bits of RGB, or an error that says why not."""

from __future__ import annotations

import errno
import io
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from sdpo.command import InputError
from sdpo.files import brief

OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)  # errors that say nothing of an image
MAX_ASPECT = 100  # longest side over shortest: resizing fixes the shortest, so memory grows with this


def image_source(value: Any) -> Any:
    """The bytes or the path in an image record of `datasets`; anything else as it is."""
    if not isinstance(value, dict):
        return value
    return value["bytes"] if value.get("bytes") is not None else value.get("path")


def read_content(value: Any) -> bytes:
    """The encoded bytes of an image, read if it is given by its path; none where that is not possible."""
    source = image_source(value)
    if isinstance(source, str):
        with suppress(OSError, ValueError):  # a path may hold NUL
            return Path(source).read_bytes()
    return source if isinstance(source, bytes) else b""


def decode(value: bytes | str | dict | Image.Image, min_side: int = 0) -> Image.Image:
    """An RGB image from encoded bytes, a path, a datasets image record or a PIL image.

    With `min_side`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if both sides are then at least so many pixels.
    Raises TypeError for anything else, ValueError as to_rgb, and what Pillow does for broken images.
    """
    value = image_source(value)
    if isinstance(value, Image.Image):
        return to_rgb(value)
    if not isinstance(value, bytes | str):
        raise TypeError(f"{value!r:.40} is not an image")
    with open_image(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
        if min_side:
            image.draft(None, (min_side, min_side))  # other formats ignore it
        return to_rgb(image)


def open_image(file: BinaryIO | str | Path) -> Image.Image:
    """Image.open for files of others: without PostScript, which another program would run."""
    Image.init()
    return Image.open(file, formats=[name for name in Image.OPEN if name != "EPS"])


def verify(file: BinaryIO | str | Path) -> tuple[str | None, str, tuple[int, int]]:
    """(format, mode, (width, height)) of an image, by its header; raises where its checksums, as PNGs have, do not fit.

    The pixels are not decoded. Errors are those of Pillow, of any kind.
    """
    with open_image(file) as image:
        about = image.format, image.mode, image.size
        image.verify()
    return about


def decode_column(row: dict[str, Any], name: str, min_side: int = 0) -> Image.Image:
    """The image in a column of a row, as decode; ValueError says which column and file cannot be read, and why.

    Raises MemoryError and InputError where that is not the image's fault.
    """
    try:
        return decode(row[name], min_side)
    except Exception as error:  # every decoder has errors of its own
        path = image_source(row[name])
        where = f"{name} ({path:.200})" if isinstance(path, str) else name
        refuse_errors_of_the_machine(error, where)
        reason = re.sub(r" <_io.BytesIO object at \w+>", "", brief(error))  # the same in every run
        raise ValueError(f"{where}: {reason}") from error


def refuse_errors_of_the_machine(error: Exception, where: str) -> None:
    """Raise what says nothing of the image that was being read: MemoryError, and InputError for lack of open files."""
    if isinstance(error, MemoryError):
        raise error
    if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        raise InputError(
            f"{where} cannot be read now ({error.strerror}): mend that, and the same command goes on"
        ) from error


def check_kind(mode: str, size: tuple[int, int]) -> None:
    """Raises ValueError for images that to_rgb refuses, by mode and (width, height) in pixels."""
    if max(size) > MAX_ASPECT * min(size):
        raise ValueError(f"{size[0]} x {size[1]} pixels: one side is over {MAX_ASPECT} times the other")
    if mode in ("I", "F"):
        raise ValueError(f"pixels of mode {mode} have no known range: save the image with 8 bits per channel")


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB; ValueError for values without a known range, and for sides too unequal to be resized."""
    check_kind(image.mode, image.size)
    if image.mode.startswith("I;16"):  # which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    rgb = image.convert("RGB")
    rgb.info.pop("transparency", None)  # of a colour that Pillow has made opaque; transformers would still see through
    return rgb
