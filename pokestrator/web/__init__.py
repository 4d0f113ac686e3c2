"""Doors for machines and browsers. Flask lives in this package and nowhere else."""
