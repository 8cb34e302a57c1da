"""What the fuzz tests take from the tests of the runtime."""

from tests.runtime.conftest import card

__all__ = ["card"]
