"""``qsm-run``: one acquisition from its files to its map, judged, drawn and reported."""
