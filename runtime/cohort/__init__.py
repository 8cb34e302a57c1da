"""Many recordings: shared out over processes and machines, accounted for, looked at together."""
