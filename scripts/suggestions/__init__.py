"""How good are suggested learning rates? Real tasks, grids of trainings, and other tools' rules to compare with."""
