"""What the memory of this machine allows: how many bytes are cold, and how fast a plain loop reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from pyllmq import backends

from .timing import COLD_BYTES

READ_LIMIT = "read limit"
CACHES = Path("/sys/devices/system/cpu")
RAM_SHARE = 1 / 3
"""Of the RAM, for the copies of all providers together."""


def last_level_cache_bytes(root: Path = CACHES) -> int:
    """All last-level caches that the OS reports, together; 0 where it reports none."""
    found: dict[str, tuple[int, int]] = {}  # the CPUs that share a cache -> level, bytes
    for index in root.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, text, shared = ((index / name).read_text().strip() for name in ("level", "size", "shared_cpu_list"))
        except OSError:
            continue
        size = re.fullmatch(r"(\d+)([KMG]?)", text)
        if size:
            nbytes = int(size[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[size[2]]
            found[shared] = max(found.get(shared, (0, 0)), (int(level), nbytes))
    top = max((level for level, _ in found.values()), default=0)
    return sum(nbytes for level, nbytes in found.values() if level == top)


def ram_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes() -> int:
    """What the system can give without swapping; the RAM where it does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) << 10 if found else ram_bytes()


def cold_bytes_for(providers: int, cache_bytes: int, ram: int) -> tuple[int, str]:
    """Bytes of copies for each of so many providers, and a note where RAM allows fewer than the caches ask for."""
    wanted = max(COLD_BYTES, 2 * cache_bytes)
    allowed = int(ram * RAM_SHARE / providers)
    if wanted <= allowed:
        return wanted, ""
    return allowed, (
        f"each provider rotates over {allowed >> 20} MiB in place of {wanted >> 20} (2x the {cache_bytes >> 20} MiB of cache that "
        f"the OS reports): {providers} providers share a third of {ram >> 20} MiB of RAM, so weights may be partly cached; "
        "name fewer bits and precisions at a time"
    )


def read_limit_calls(nbytes: int, cold_bytes: int) -> list[Callable[[], object]]:
    """Calls that read consecutive blocks of `nbytes` out of more than `cold_bytes`, on the threads of the packed kernels."""
    _cpu = backends.cpu.runtime.kernels()
    nbytes += -nbytes % 8
    blocks = cold_bytes // nbytes + 1
    memory = backends.cpu.runtime.empty_layout(blocks * nbytes).fill_(1)  # the pages that packed layers lie on

    def reader(block: int) -> Callable[[], object]:
        # The closure keeps the memory alive.
        return lambda: _cpu.read_bandwidth_probe(memory.data_ptr() + block * nbytes, nbytes)

    return [reader(block) for block in range(blocks)]
