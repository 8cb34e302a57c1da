"""The local field: what is left of a field without the part that sources outside the mask make."""
