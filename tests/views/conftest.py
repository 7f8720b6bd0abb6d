import numpy as np
import numpy.typing as npt
import pytest
from sklearn.datasets import load_digits


@pytest.fixture(scope="session")
def digits() -> npt.NDArray[np.uint8]:
    """[6, 24, 24, 3]: scikit-learn's handwritten digits, three times as large, in three colours each."""
    strokes = np.kron(load_digits().images[:6] / 16, np.ones((1, 3, 3)))
    ink, paper = np.array([30, 60, 200]), np.array([250, 220, 170])
    return np.rint(paper + strokes[..., None] * (ink - paper)).astype(np.uint8)


@pytest.fixture(scope="session")
def noise() -> npt.NDArray[np.uint8]:
    """[5, 13, 22, 3]: uniform noise, neither square nor even: the whole range of values, clipping included."""
    return np.random.default_rng(0).integers(0, 256, (5, 13, 22, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def scenes() -> npt.NDArray[np.uint8]:
    """[4, 20, 31, 3]: smooth colour gradients with a hard-edged disc and a little noise, much like photos."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[0:1:20j, 0:1:31j]
    scenes = []
    for _ in range(4):
        slope_y, slope_x, base = rng.uniform(-80, 80, (3, 3))
        scene = 128 + base + y[..., None] * slope_y + x[..., None] * slope_x
        disc = (y - rng.uniform(0.3, 0.7)) ** 2 + (x - rng.uniform(0.3, 0.7)) ** 2 < 0.06
        scene[disc] = rng.uniform(0, 255, 3)
        scenes.append(scene + rng.normal(0, 3, scene.shape))
    return np.clip(np.rint(scenes), 0, 255).astype(np.uint8)
