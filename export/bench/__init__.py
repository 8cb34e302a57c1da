"""``qsm-bench``: engines beside each other, in turns."""
