"""What is known about a network before its weights are there."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qsm_deploy.kernels.errors import UsageError, WeightsError

WEIGHTS_FOLDER = Path(__file__).parents[1] / "weights"


@dataclass(frozen=True)
class Weights:
    """Where weights come from, and under which licence."""

    source: str
    licence: str


@dataclass(frozen=True)
class NetworkSpec:
    """One network.

    Attributes
    ----------
    name
        What ``--model`` calls it.
    module
        The file under ``networks`` that builds it; of an entry point the dotted path of one.
    inputs
        The names of what its graph takes, with the default options.
    parameters
        Trained numbers that the published network uses.
    divisor
        Every spatial size must be a multiple of this.
    gmac_64
        Multiply-accumulates of the convolutions in its graph, with the default options, for one
        64x64x64 volume, in billions; of all its graphs if it has several.
    marks
        Keys of its checkpoint that together tell it from the other networks.
    published
        The weights of its authors.
    output, further_outputs
        The names of what its graph gives.
    doi
        Of the paper that describes it.
    options
        The choices it offers, the default first.
    only_with
        Of an option that makes sense with one value of another, that other and its value.
    bundled
        A file in the weights folder and where it comes from, if weights come along.
    onnx_weights
        Whether its weights are read from an ONNX file of MATLAB too.
    foreign_words
        Words in the name of a file that its keys cannot tell from another network's, if they say
        that it is one.
    """

    name: str
    module: str
    inputs: tuple[str, ...]
    parameters: int
    divisor: int
    gmac_64: float
    marks: tuple[str, ...]
    published: Weights
    output: str = "chi_ppm"
    further_outputs: tuple[str, ...] = ()
    doi: str | None = None
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    only_with: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    bundled: tuple[str, Weights] | None = None
    onnx_weights: bool = False
    foreign_words: frozenset[str] = frozenset()

    def bundled_file(self) -> Path:
        """Return the weights that come with this package.

        Raises
        ------
        WeightsError
            If there are none; the message names the authors' source.
        """
        if self.bundled and (path := WEIGHTS_FOLDER / self.bundled[0]).is_file():
            return path
        raise WeightsError(
            f"no weights of {self.name} are bundled; get them at {self.published.source} "
            "and pass the file with --weights"
        )

    def refuse_foreign(self, paths: Sequence[Path]) -> None:
        """Refuse files whose names say that they are another network's of the same keys.

        Raises
        ------
        WeightsError
            If there is one; under the wrong name its map would be called what it is not.
        """
        for path in paths:
            words = re.split(r"[^a-z]+|v(?=\d)", path.name.lower())
            if found := self.foreign_words.intersection(words):
                raise WeightsError(
                    f"{path}: {min(found)!r} in its name is none of {self.name}'s, and its keys "
                    f"cannot tell; pass another --model, or rename a file that is {self.name}'s"
                )

    def chosen_options(self, chosen: Mapping[str, str | None]) -> dict[str, str]:
        """Return a value for every option that makes sense, the default where none was chosen.

        Raises
        ------
        UsageError
            If an option was chosen that this network does not have, or does not have with the
            others chosen, or a value it does not know.
        """
        given = {name: value for name, value in chosen.items() if value is not None}
        for name, value in given.items():
            if value not in self.options.get(name, ()):
                known = ", ".join(f"{flag(n)} {'|'.join(v)}" for n, v in self.options.items())
                raise UsageError(
                    f"{flag(name)} {value} is no option of {self.name}, which has {known or 'none'}"
                )
        options = {name: given.get(name, values[0]) for name, values in self.options.items()}
        for name, (other, needed) in self.only_with.items():
            if options[other] != needed:
                if name in given:
                    raise UsageError(
                        f"{flag(name)} {given[name]} needs {flag(other)} {needed} of {self.name}, "
                        f"not {flag(other)} {options[other]}"
                    )
                del options[name]
        return options


def flag(option: str) -> str:
    """Return an option as it is typed."""
    return f"--{option.replace('_', '-')}"
