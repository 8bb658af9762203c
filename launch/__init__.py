"""Launchers: shell scripts, and `python -m launch.gke`."""
