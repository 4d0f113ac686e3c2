"""Pokestrator gives Poke abilities that grow while people use it. docs/architecture.md says how."""

__version__ = "0.1.0"
