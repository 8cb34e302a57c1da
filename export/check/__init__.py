"""``qsm-check``: an engine beside its reference, and whether that is within budget."""
