"""What an adapter is called in a label."""

BASE, OTHER = "base", "other"


def label(adapter: str | None) -> str:
    """The base model has a label of its own, which an adapter of that name must not share."""
    if adapter is None:
        return BASE
    return f"adapter:{adapter}" if adapter in (BASE, OTHER) else adapter
