"""Maps without a network: regularised inversions of the dipole, on arrays."""
