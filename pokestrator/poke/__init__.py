"""Poke as the service sees it: messages go out, and each comes back as a receipt.

api.py    what Poke's HTTP API looks like, and whom messages may be sent to
post.py   one POST
"""
