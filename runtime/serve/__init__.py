"""``qsm-serve``: the ISMRMRD streaming protocol, for scanner hosts."""
