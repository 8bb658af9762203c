"""Measurements that print their own numbers: `python -m benchmarks.<name>`."""
