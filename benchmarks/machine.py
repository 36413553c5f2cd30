"""What a benchmark ran on; nothing that names the machine or its folders."""

import os
import platform
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LIBRARIES = (
    "logitcache",
    "numpy",
    "lmdb",
    "datasets",
    "pyarrow",
    "zarr",
    "redis",
    "hiredis",
    "orjson",
    "safetensors",
    "fastapi",
    "starlette",
    "httpx",
    "uvicorn",
)


def machine() -> dict[str, Any]:
    """Processor, memory, kernel, Python and libraries, as JSON values."""
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": cpus[0].partition(":")[2].strip() if cpus else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "uvloop": find_spec("uvloop") is not None,
        "httptools": find_spec("httptools") is not None,
        "load_average_before": round(os.getloadavg()[0], 2),
    }
