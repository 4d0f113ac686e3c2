"""The story in one command, and its scripted neighbours on loopback: a Messages API and a Poke inbox."""
