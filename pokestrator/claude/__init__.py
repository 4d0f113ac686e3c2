"""Runs of Claude, each in a process of its own that nothing survives.

pool.py         the service's side: N agent slots, or one inline in the caller's thread
questions.py    its answers to what needs no agent
answers.py      what is sent and read for one of these
calls.py        its calls that have not returned, and which of them were told to end
slot_process.py a slot as its parent sees it: a process that is replaced when it dies
slot.py         a slot's side: what its process does before, around and after its runs
worker.py       one run through the Claude Agent SDK; the only file with asyncio
outcomes.py     how a run ended, in the words of runs.py
folders.py      the folder that a run works in
processes.py    process trees: finding and ending what a run has started
capacity.py     how many runs this machine can hold

jail.py             starts in the CLI's place: confines itself, and becomes it
landlock.py         which files, which port
seccomp.py          which system calls
system_calls.py     their numbers
supervisor.py       makes a confined run's connections, to the relay alone
confinement.py      what is started for a run, and what it may have
probing.py          what of this holds on a machine

relay.py            the only address that agents reach: who is let in, and what for
relay_http.py       HTTP as it speaks it with them
relay_messages.py   their questions to Claude
egress.py           their connections to other hosts
admission.py        one run's part in all this, for as long as it lasts
upstream.py         Claude's API, with the owner's key, proxy and CA files
counting.py         what answers cost while they stream past
prices.py           what models cost
models.py           what their short names mean
"""
