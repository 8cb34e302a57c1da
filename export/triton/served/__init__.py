"""The files of a repository, as they are written: the model, a probe, how to start them."""
