"""ZeRO stage 3, where FSDP2 shards the parameters; blocks, models on the meta device, and memory estimates.

Stages 0 to 2 are in `engine.parallel` and `engine.sharding`. `shards`, `torchs` and `outputs` are imported where a
config asks for stage 3: FSDP2 takes longer to import than all the rest of the engine.
"""

__all__: list[str] = []
