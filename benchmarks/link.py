"""A network link of a chosen rate and delay between this process and a server, on one machine.

The server runs in a network namespace of its own. Between the two lies a pair of TUN devices, and a process that
carries each packet from the one to the other as late as it is told; each device sends no faster than ``tc ... tbf``
lets it. The delay is made here, and not by ``netem``, because many kernels are built without that. So the carrying
costs processor time, which netem would not: `Link.cpu_s` tells how much. It has the highest priority, as a wire would.

It needs root, iproute2 and /dev/net/tun; whatever it makes is gone when the context ends, after SIGINT and SIGTERM too.

    python -m benchmarks.link inside NAMESPACE MODULE ARGUMENTS     run a module as `python -m` does, in a namespace
"""

import contextlib
import ctypes
import fcntl
import os
import runpy
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.servers import ROOT, cpu_clock

NEAR, FAR = "198.18.77.1", "198.18.77.2"
"""Addresses of this end and of the server's, of those set aside for benchmarks (RFC 2544)."""

MTU = 1500
BURST_PACKETS = 5
"""How many packets a device may send at once: few, so that a short answer is no faster than the rate either."""

QUEUE_MS = 100
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_PR_SET_TIMERSLACK = 29


class LinkUnavailable(Exception):
    """This machine cannot make such a link; the message says what is missing."""


@dataclass(frozen=True)
class Link:
    """A link that is up: the namespace at its far end, and the process that carries packets."""

    namespace: str
    devices: tuple[str, str]
    carrier: int

    def cpu_s(self) -> float:
        """Processor seconds that carrying packets has cost so far."""
        return cpu_clock(self.carrier)()

    def set_rate(self, bits_per_s: float) -> None:
        """How fast both ends send from now on."""
        near, far = self.devices
        _limit((), near, bits_per_s)
        _limit(("-n", self.namespace), far, bits_per_s)


@contextmanager
def link(bits_per_s: float, round_trip_s: float) -> Iterator[Link]:
    """A link with this rate in each direction, and half of the round trip as the delay of each.

    Raises:
        LinkUnavailable: not root, or no iproute2, TUN devices or ``tbf``.
    """
    _refuse_without_means()
    name = f"lcb{os.getpid()}"
    near, far = f"{name}a", f"{name}b"
    with ExitStack() as stack:
        stack.enter_context(_sigterm_as_exit())
        _run("ip", "netns", "add", name)
        stack.callback(_run, "ip", "netns", "delete", name)
        ends = [_tun(near), _tun(far)]
        carry = [sys.executable, "-m", "benchmarks.link", "carry", *map(str, ends), str(round_trip_s / 2)]
        try:
            carrier = subprocess.Popen(carry, cwd=ROOT, pass_fds=ends)
        finally:
            for end in ends:  # the devices live as long as the carrier has them open
                os.close(end)
        stack.callback(carrier.wait)
        stack.callback(carrier.terminate)
        _run("ip", "link", "set", far, "netns", name)
        made = Link(name, (near, far), carrier.pid)
        for namespace, device, address in (((), near, NEAR), (("-n", name), far, FAR)):
            _run("ip", *namespace, "address", "add", f"{address}/30", "dev", device)
            _run("ip", *namespace, "link", "set", device, "mtu", str(MTU), "up")
        made.set_rate(bits_per_s)
        yield made


def _refuse_without_means() -> None:
    missing = [f"the command {name} (iproute2)" for name in ("ip", "tc") if shutil.which(name) is None]
    if os.geteuid() != 0:
        missing.append("root")
    if not Path("/dev/net/tun").exists():
        missing.append("/dev/net/tun (a kernel with CONFIG_TUN)")
    if missing:
        raise LinkUnavailable(f"a link of a chosen rate and delay needs {', '.join(missing)}")


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LinkUnavailable(f"{' '.join(command)}: {done.stderr.strip()}")


def _limit(namespace: tuple[str, ...], device: str, bits_per_s: float) -> None:
    bucket = ("burst", str(BURST_PACKETS * (MTU + 14)), "latency", f"{QUEUE_MS}ms")
    _run("tc", *namespace, "qdisc", "replace", "dev", device, "root", "tbf", "rate", f"{bits_per_s:.0f}bit", *bucket)


def _tun(name: str) -> int:
    """A new TUN device, and the file through which its packets pass."""
    handle = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    except OSError as error:
        os.close(handle)
        raise LinkUnavailable(f"no TUN device can be made: {error.strerror}") from error
    return handle


def carry(one: int, other: int, delay_s: float) -> None:
    """Carry packets between two TUN devices until terminated, each so long after it was sent."""
    os.nice(-20)
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)
    waiting: dict[int, deque[tuple[float, bytes]]] = {one: deque(), other: deque()}
    across = {one: other, other: one}
    while True:
        due = min((packets[0][0] for packets in waiting.values() if packets), default=None)
        timeout = None if due is None else max(0.0, due - time.monotonic())
        for end in select.select([one, other], [], [], timeout)[0]:
            now = time.monotonic()
            with contextlib.suppress(BlockingIOError):
                while True:
                    waiting[across[end]].append((now + delay_s, os.read(end, 1 << 16)))
        now = time.monotonic()
        for end, packets in waiting.items():
            while packets and packets[0][0] <= now:
                with contextlib.suppress(OSError):  # a device that is going down loses packets, as a wire does
                    os.write(end, packets.popleft()[1])


def inside(namespace: str, module: str, *arguments: str) -> None:
    """Run a module in a network namespace, in this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if libc.setns(handle, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")
    os.close(handle)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    act, *rest = sys.argv[1:]
    if act == "inside":
        inside(*rest)
    else:
        carry(int(rest[0]), int(rest[1]), float(rest[2]))
