"""What the export asks of every network."""

from abc import abstractmethod

from torch import nn


class Network(nn.Module):
    """(n, 1, x, y, z) inputs to one output of the same shape."""

    @property
    @abstractmethod
    def divisor(self) -> int:
        """Every spatial size must be a multiple of this."""
