"""Sizes, durations and retained mass in words, for what commands print."""

LOW_RETAINED_MASS = 0.5
"""Below this mean, the stored k say little of the teacher at that temperature, and a warning says so."""


def retained_lines(retained: dict[str, dict[str, float]]) -> list[str]:
    """Retained mass by temperature for people, with a warning where the stored k hold too little."""
    lines = [
        f"retained    T={name}: mean {entry['mean']:.4f}, least {entry['min']:.4f} of the teacher's probability"
        for name, entry in retained.items()
    ]
    low = [name for name, entry in retained.items() if entry["mean"] < LOW_RETAINED_MASS]
    if low:
        lines.append(
            f"warning     at T={', '.join(low)} less than half is stored: use a larger --top-k for that temperature"
        )
    return lines


def counted(count: int, noun: str) -> str:
    """A number and its noun: ``1 shard``, ``2,000 shards``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def extent(examples: int, rows: int, unit: str = "row") -> str:
    """How large a dataset or label set is: ``9,000 rows``, or ``120 examples with 4,500 tokens``."""
    return counted(rows, "row") if rows == examples else f"{counted(examples, 'example')} with {counted(rows, unit)}"


def size(count: float) -> str:
    """Bytes for people: ``1.5 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds for people: ``2 h 5 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
