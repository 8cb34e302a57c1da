"""Recordings shared out by Dask, on workers of a user's own or in jobs of SLURM."""
