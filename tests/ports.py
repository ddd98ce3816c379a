"""Ports for what a test starts."""

import random
import socket

_FIRST, _LAST = 10_000, 32_000
"""Below those that the system gives to connections (from 32,768 on, Linux), of which one could take
the port between its choice and its use."""


def free_port() -> int:
    """One on which nothing listens."""
    while True:
        port = random.SystemRandom().randrange(_FIRST, _LAST)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
