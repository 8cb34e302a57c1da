"""The published networks, a file each, and the list of them."""
