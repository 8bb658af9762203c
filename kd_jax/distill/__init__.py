"""Techniques: where response tokens come from, times a divergence."""
