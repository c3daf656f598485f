"""Captioned 32 x 32 pictures, faulty ones too, and a score read from their pixels.

A picture is one shape on a plain background: "a small red circle on a blue background". Because the caption fixes
everything but the position, a sample can be checked without any learned scorer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

SIDE = 32  # pixels
SIZES = {"small": 6.0, "large": 11.0}  # half the extent, in pixels
SHAPES = {"circle": 0.785, "square": 1.0, "triangle": 0.5}  # area as a share of the bounding box
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "white": (245, 245, 245),
}
CHECKS = ("size", "colour", "shape", "background", "clean")
FAULTS = ("colour", "shape", "background", "size", "blur", "noise")


@dataclass(frozen=True)
class Spec:
    """What a caption says of a picture."""

    size: str
    colour: str
    shape: str
    background: str

    @property
    def caption(self) -> str:
        """The caption in words."""
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background"


SPECS = [Spec(*s) for s in itertools.product(SIZES, COLOURS, SHAPES, COLOURS) if s[1] != s[3]]
HELD_OUT = SPECS[3::6]  # 20 of 120 captions that neither the base nor any preference run is trained on
TRAINED = [spec for spec in SPECS if spec not in HELD_OUT]


def parse(caption: str) -> Spec:
    """Spec of a caption of this module's form; ValueError for any other text."""
    for spec in SPECS:
        if spec.caption == caption:
            return spec
    raise ValueError(f"{caption!r:.200} is not a caption of the tiny pictures; one is {SPECS[0].caption!r}")


def draw_centre(spec: Spec, rng: np.random.Generator) -> tuple[float, float]:
    """A position (x, y) in pixels at which the whole shape is inside the frame."""
    reach = SIDE / 2 - SIZES[spec.size] - 2.5
    x, y = SIDE / 2 + rng.uniform(-reach, reach, 2)
    return x, y


def render(spec: Spec, centre: tuple[float, float]) -> np.ndarray:
    """The picture as (32, 32, 3) uint8, edges anti-aliased by the distance to the outline."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    dx, dy, r = x - centre[0], y - centre[1], SIZES[spec.size]
    distance = {
        "circle": np.hypot(dx, dy) - r,
        "square": np.maximum(abs(dx), abs(dy)) - r,
        "triangle": np.maximum((2 * abs(dx) - dy - r) / 5**0.5, dy - r),
    }[spec.shape]
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    picture = cover * np.array(COLOURS[spec.colour]) + (1 - cover) * np.array(COLOURS[spec.background])
    return picture.round().astype(np.uint8)


def render_fault(spec: Spec, centre: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """A picture that breaks its caption in one way drawn from FAULTS: another attribute, blur or noise.

    About a quarter of the blurred ones still pass every check.
    """
    fault = FAULTS[rng.integers(len(FAULTS))]
    if fault == "blur":
        return np.asarray(Image.fromarray(render(spec, centre)).filter(ImageFilter.GaussianBlur(2.0)))
    if fault == "noise":
        noisy = render(spec, centre) + rng.normal(0, 45, (SIDE, SIDE, 3))
        return noisy.clip(0, 255).astype(np.uint8)
    others = {"colour": COLOURS, "background": COLOURS, "shape": SHAPES, "size": SIZES}[fault]
    taken = {spec.colour, spec.background, getattr(spec, fault)}
    choices = [name for name in others if name not in taken]
    wrong = replace(spec, **{fault: choices[rng.integers(len(choices))]})
    return render(wrong, draw_centre(wrong, rng) if fault == "size" else centre)


def check(picture: np.ndarray, spec: Spec) -> dict[str, bool]:
    """Which of the five CHECKS a (32, 32, 3) uint8 picture passes for its caption.

    The background is the median colour of the frame, the colour the median of what differs from it, the shape all
    pixels nearer to the colour; size is its larger extent, shape its share of the bounding box. Clean: nearly all
    pixels have one of the two colours, and the frame is even.
    """
    pixels = picture.astype(float)
    frame = np.concatenate(
        [
            pixels[:2].reshape(-1, 3),
            pixels[-2:].reshape(-1, 3),
            pixels[:, :2].reshape(-1, 3),
            pixels[:, -2:].reshape(-1, 3),
        ]
    )
    background = np.median(frame, 0)
    to_background = np.linalg.norm(pixels - background, axis=-1)
    different = to_background > 60
    colour = np.median(pixels[different], 0) if different.any() else background
    to_colour = np.linalg.norm(pixels - colour, axis=-1)
    inside = to_colour < to_background
    if different.sum() < 12 or not inside.any():  # nothing is drawn, or in colours that have the background's median
        return {name: name == "background" and _named(background) == spec.background for name in CHECKS}
    height, width = (np.ptp(np.flatnonzero(inside.any(axis))) + 1 for axis in (1, 0))
    fill = inside.sum() / (height * width)
    return {
        "size": (max(height, width) < sum(SIZES.values())) == (spec.size == "small"),
        "colour": _named(colour) == spec.colour,
        "shape": min(SHAPES, key=lambda name: abs(SHAPES[name] - fill)) == spec.shape,
        "background": _named(background) == spec.background,
        "clean": bool((np.minimum(to_background, to_colour) < 45).mean() > 0.85 and frame.std(0).mean() < 18),
    }


def score(picture: np.ndarray, caption: str) -> float:
    """Share of the five checks that a (32, 32, 3) uint8 picture passes, in [0, 1]."""
    return float(np.mean(list(check(picture, parse(caption)).values())))


def _named(colour: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: np.linalg.norm(colour - np.array(COLOURS[name])))
