"""The parser of every command that takes numbers below 0."""

import argparse
import re
from typing import Any

NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """One that takes ``-1e-05`` for a number, which argparse takes for a flag before 3.14."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._negative_number_matcher = NEGATIVE
