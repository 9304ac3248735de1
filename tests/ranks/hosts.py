"""Two hosts on one machine: network namespaces with an address each, joined by one cable that can be cut."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

NETWORK = "10.213.77"
CARD = "cable"


def missing() -> str | None:
    """Why hosts cannot be made here; None where they can."""
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"pangu-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces cannot be made: {made.stderr.strip():.100}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


@dataclass(frozen=True)
class Host:
    name: str
    address: str

    def command(self, *arguments: str) -> list[str]:
        """The command that runs `arguments` on this host."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def set_cable(self, state: str) -> None:
        """Plug the cable in ("up") or pull it out ("down")."""
        _ip("-n", self.name, "link", "set", CARD, state)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Return two hosts that reach each other, and nothing else; they are gone afterwards."""
    hosts = [Host(f"pangu-{os.getpid()}-{i}", f"{NETWORK}.{i + 1}") for i in range(2)]
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        first, second = (host.name for host in hosts)
        _ip("-n", first, "link", "add", CARD, "type", "veth", "peer", "name", CARD, "netns", second)
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", CARD)
            _ip("-n", host.name, "link", "set", "lo", "up")
            host.set_cable("up")
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
