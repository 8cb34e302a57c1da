"""One acquisition: its files, units, geometry and mask, read and checked once."""
