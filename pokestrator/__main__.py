"""`python -m pokestrator`."""

from pokestrator.cli import main

main()
