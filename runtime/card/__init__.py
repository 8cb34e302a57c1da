"""The model card: what a network is and may be used for, and how it is read out of a file."""
