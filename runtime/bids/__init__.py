"""A whole BIDS dataset: recordings found, reconstructed one by one, and written as derivatives."""
