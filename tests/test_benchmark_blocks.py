"""The benchmark of noise on blocks at a tiny size: what it counts and compares."""

import math

import jax.numpy as jnp
import pytest

from benchmarks.blocks import measure
from kd_jax.whitebox import blocks


@pytest.fixture
def waves(monkeypatch):
    """Noise that compiles in no time."""

    def draw(key, shapes, layer=None):
        phase = 0.0 if layer is None else 1.0 * layer
        wave = lambda name, shape: jnp.cos(phase + len(name) + 1.7 * jnp.arange(math.prod(shape))).reshape(shape)
        return {name: wave(name, shape) for name, shape in shapes.items()}

    monkeypatch.setattr(blocks, "draw_noise", draw)
    yield
    blocks._noise_step.cache_clear()


def test_a_tiny_model_is_measured(waves, capsys):
    assert measure(layers=3, width=16, examples=2, tokens=8, draws=1, repeats=1) > 0
    said = capsys.readouterr().out
    # of a draw: MoPe 2 x 3; in two forms 3 + 2 + 1 for the layers and 3 for the embedding; of the loop 3 each time
    assert "counted: 24 (a loop over copies: 36)" in said
    assert "one form: 6 instead of 9, 1.50x fewer" in said
    assert "largest deviation" in said and "checkpoints" in said
