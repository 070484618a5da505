"""What systemd wants to know of a service of `Type=notify`."""

import os
import socket
from contextlib import suppress

WATCHDOG = "WATCHDOG=1"
SECONDS = 1.0
"""For systemd to take what is said only once."""


def notify(message: str) -> None:
    """Send `READY=1`, `WATCHDOG=1`, `STOPPING=1` or the like; does nothing outside systemd, or when it has gone.

    Where what was sent before is not taken, this waits for no more than a moment; with `WATCHDOG=1`, which is said
    again, not at all.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.settimeout(0 if message == WATCHDOG else SECONDS)
        channel.sendto(message.encode(), address)
