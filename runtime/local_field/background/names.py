"""The names of the methods that remove a background field, the default first."""

REMOVAL_NAMES = ("two-prior", "pdf", "resharp", "vsharp", "lbv")
