"""How far a map is from the truth, from another map, and from its field."""
