"""Picture of a soak over time: memory, open files, adapter loads and requests."""

from pathlib import Path


def draw(rows: list[dict], target: Path) -> None:
    """rows: the samples of one run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    minutes = [row["seconds"] / 60 for row in rows]
    figure, (memory, files, work) = plt.subplots(3, 1, figsize=(8, 7), sharex=True, layout="constrained")
    memory.plot(minutes, [row["private_mib"] for row in rows], label="private", color="tab:blue")
    memory.plot(minutes, [row["rss_mib"] for row in rows], label="RSS", color="tab:gray")
    memory.set_ylabel("all processes, MiB")
    memory.set_ylim(bottom=0)
    files.plot(minutes, [row["handles"] for row in rows], label="open files", color="tab:purple")
    files.plot(minutes, [row["clients_killed"] for row in rows], label="client processes killed", color="tab:red")
    files.set_ylabel("all processes; so far")
    files.set_ylim(bottom=0)
    work.plot(minutes, [row["pool_loads"] for row in rows], label="loads into the pool", color="tab:orange")
    work.plot(minutes, [row["pool_evictions"] for row in rows], label="evictions", color="tab:red", linestyle="--")
    work.plot(minutes, [row["requests"] for row in rows], label="requests", color="tab:green")
    work.set(xlabel="minutes", ylabel="so far")
    for axes in (memory, files, work):
        axes.legend(loc="lower right")
        axes.grid(alpha=0.3)
    figure.savefig(target, dpi=110)
    plt.close(figure)
