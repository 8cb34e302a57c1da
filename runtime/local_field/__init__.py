"""From the echoes of a gradient echo to a local field."""
