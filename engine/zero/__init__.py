"""ZeRO on torch's FSDP2: the model, its gradients and its optimizer's state shared out among processes.

Imported where a config asks for it: FSDP2 takes longer to import than all the rest of the engine.
"""

__all__: list[str] = []
