"""DeepSpeed's sections, one model each.

Each model knows DeepSpeed 0.19.8's keys, types, ranges and defaults, so that a mistake is found in a section that is
refused or without effect, too. What becomes of a section is said in `engine.config.support`. Most configs have those
of `zero` and `precision`; the other files are read the first time that a config has a section of theirs.
"""

from __future__ import annotations

__all__: list[str] = []
