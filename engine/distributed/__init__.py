"""Several ranks: the process group, their gradients and shards, and what happens when one is lost."""

__all__: list[str] = []
