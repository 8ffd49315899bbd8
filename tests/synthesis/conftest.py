"""Small simulated scans of different looks; every one has float32 [S, S, 3] pixels and a content mask."""

import cv2
import numpy as np
import pytest

S = 96


def _disc(row: float, column: float, down: float, across: float, size: int = S) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    return ((y - row * size) / (down * size)) ** 2 + ((x - column * size) / (across * size)) ** 2 <= 1


def _grey(plane: np.ndarray) -> np.ndarray:
    return np.repeat(np.clip(plane, 0, 1).astype(np.float32)[..., None], 3, axis=2)


def _noise(seed: int, sigma: float) -> np.ndarray:
    noise = cv2.GaussianBlur(np.random.default_rng(seed).standard_normal((S, S)), (0, 0), sigma)
    return noise / noise.std()


def head(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A bright skull, grey tissue, black ventricles inside, slightly noisy air outside."""
    plane = 0.02 + 0.005 * _noise(seed, 0.7)
    plane[_disc(0.5, 0.5, 0.44, 0.36)] = 0.9
    tissue = _disc(0.5, 0.5, 0.4, 0.32)
    plane[tissue] = (0.45 + 0.06 * _noise(seed + 1, 1.5))[tissue]
    plane[_disc(0.45, 0.42, 0.1, 0.04) | _disc(0.45, 0.58, 0.1, 0.04)] = 0.03
    return _grey(plane), np.ones((S, S), bool)


def sonogram(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Speckle that darkens with depth, letterboxed."""
    content = np.zeros((S, S), bool)
    content[12:-12] = True
    depth = np.linspace(0.6, 0.15, S)[:, None]
    plane = depth * (1 + 0.35 * _noise(seed, 1.0)) * content
    return _grey(plane), content


def fundus(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An orange disc on black, in colour."""
    disc = _disc(0.5, 0.5, 0.48, 0.48)
    shade = 1 + 0.08 * _noise(seed, 3.0)
    image = np.stack([0.8 * shade, 0.35 * shade, 0.12 * shade], axis=2) * disc[..., None]
    return np.clip(image, 0, 1).astype(np.float32), np.ones((S, S), bool)


def slide(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Purple tissue on white glass."""
    disc = _disc(0.5, 0.5, 0.35, 0.4)
    shade = 1 + 0.15 * _noise(seed, 1.5)
    tissue = np.stack([0.6 * shade, 0.35 * shade, 0.6 * shade], axis=2)
    return np.clip(np.where(disc[..., None], tissue, 0.97), 0, 1).astype(np.float32), np.ones((S, S), bool)


def flat(value: float, size: int = S) -> tuple[np.ndarray, np.ndarray]:
    """A constant scan."""
    return np.full((size, size, 3), value, np.float32), np.ones((size, size), bool)


SCANS = {"head": head, "sonogram": sonogram, "fundus": fundus, "slide": slide}


@pytest.fixture(params=list(SCANS))
def scan(request) -> tuple[np.ndarray, np.ndarray]:
    return SCANS[request.param]()


@pytest.fixture
def phantoms():
    """The makers of simulated scans by name, `flat` among them."""
    return {**SCANS, "flat": flat, "disc": _disc}
