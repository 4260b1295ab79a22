"""The modules of `scripts/tutorials`: source_text and runs train, tables and pictures report."""
