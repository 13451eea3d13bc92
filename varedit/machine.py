"""What this machine has, and what was used of it; without PyTorch."""

import os
import sys

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def num_cores() -> int:
    """Cores that this process may use, where the system tells; else all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory_mib(place: str = "process") -> int | None:
    """The most memory held so far, in MiB.

    Args:
        place: "process": this one, of its GPU where one is used; "children": the largest program
            it has run, on Linux no less than this process held when it began that.

    Returns:
        None where that cannot be known: elsewhere (endpoints), and on Windows.
    """
    torch = sys.modules.get("torch")
    if place == "process" and torch is not None and torch.cuda.is_available():
        used = max(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
        if used:
            return int(used / 2**20)
    if resource is None or place == "elsewhere":
        return None
    who = resource.RUSAGE_CHILDREN if place == "children" else resource.RUSAGE_SELF
    largest = resource.getrusage(who).ru_maxrss
    return largest // (2**20 if sys.platform == "darwin" else 1024)  # bytes there, kilobytes elsewhere
