"""What benchmarks print of parts that ran beside something else: how long each took, and how long it held that up."""

import statistics


def summary(found: dict[str, list[tuple[float, float]]], held_up: str) -> str:
    """A line a part: median and largest of its (seconds, milliseconds). held_up: what the milliseconds are."""
    lines = []
    for part, repeats in found.items():
        seconds, times = zip(*repeats, strict=True)
        lines.append(
            f"  {part:14} {statistics.median(seconds):7.3f} s ({max(seconds):.3f}), {held_up} "
            f"{statistics.median(times):8.2f} ms ({max(times):.2f})"
        )
    return "\n".join(lines)
