"""One session with a host, without its socket: messages in, frames out.

A session collects until CLOSE and answers then: lines of text, the images that came, the map,
and CLOSE, which is last whatever happens. What is wrong with the stream itself ends it at once;
what is wrong with its content is told at the end, so that the host gets its images back.
"""

import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from qsm_deploy.kernels.errors import DataError, ProtocolError, QsmDeployError, UsageError
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.job.report import inversion_rows
from qsm_deploy.runtime.serve.budget import held_bytes
from qsm_deploy.runtime.serve.chi_images import chi_frames, encode_chi, free_series
from qsm_deploy.runtime.serve.codec import (
    Buffer,
    Id,
    Image,
    Message,
    Text,
    close_frame,
    resent_frames,
    text_frame,
)
from qsm_deploy.runtime.serve.configuration import Configuration, Request
from qsm_deploy.runtime.serve.dipole_config import source_from_field
from qsm_deploy.runtime.serve.limits import Limits
from qsm_deploy.runtime.serve.parameters import Config, Parameters, parameters_from, require_config
from qsm_deploy.runtime.serve.qsm_config import source_from_echoes
from qsm_deploy.runtime.serve.texts import (
    BLANK,
    one_line,
    parse_config,
    parse_header,
    parse_parameters,
    printable,
)
from qsm_deploy.runtime.serve.turns import TakingTurns

TRACE_CHARACTERS = 10_000
CONFIGURATIONS: dict[Config, Configuration] = {
    "qsm": source_from_echoes,
    "dipole": source_from_field,
}


@dataclass
class MrdSession:
    """What one host has sent, and the answer to it.

    Attributes
    ----------
    limits
        Bounds on what it may send.
    images
        Those that came.
    complete
        Whether CLOSE came.
    error
        What went wrong, if anything did, as one line.
    trace
        Where it did, if that is a bug; as text, since frames would keep the images alive.
    summary
        What was reconstructed, for the server's log.
    stages
        What each stage took.
    held_bytes
        What Python holds of it in memory.
    """

    limits: Limits
    images: list[Image] = field(default_factory=list)
    complete: bool = False
    error: str | None = None
    trace: str = ""
    summary: str = "no map"
    stages: Stages = field(default_factory=Stages)
    held_bytes: int = 0
    _config: str | None = None
    _header: dict[str, list[str]] | None = None
    _parameters: Parameters | None = None
    _content_error: Exception | None = None
    _texts: dict[Id, int] = field(default_factory=dict)
    _resent: int = 0

    def receive(self, message: Message) -> None:
        """Take a message.

        Raises
        ------
        ProtocolError
            If there is more than the limits allow, and the stream must not go on.
        """
        if isinstance(message, Image):
            held = self.held_bytes + message.held_bytes
            if len(self.images) == self.limits.images or held > self.limits.session_bytes:
                raise ProtocolError(
                    f"more than {self.limits.images} images or {self.limits.session_bytes} bytes "
                    "of them in one session"
                )
            self.held_bytes = held
            self.images.append(message)
        try:
            self._take(message)
        except Exception as error:  # told after CLOSE: the host gets all its images back
            self._content_error = self._content_error or error

    def answer(self, reconstructor: TakingTurns) -> Iterator[Buffer]:
        """Yield the frames that answer a complete session; the last is CLOSE."""
        try:
            if self._content_error is not None:
                raise self._content_error
            if not self.images:
                yield text_frame("WRN", "no images were sent; nothing to reconstruct")
            else:
                yield from self._answer_images(reconstructor)
            yield close_frame()
        except Exception as error:  # whatever it is, the host gets its images back
            yield self.reason(error)
            yield from self.ending()

    def reason(self, error: Exception) -> bytes:
        """Note what went wrong and return the line that tells the host."""
        if isinstance(error, QsmDeployError):
            said = str(error)
        elif isinstance(error, MemoryError):
            said = "out of memory; send a smaller volume"
        else:
            trace = "".join(traceback.format_exception(error))
            said, self.trace = repr(error), printable(trace[:TRACE_CHARACTERS])
        self.error = one_line(said)
        return text_frame("ERR", self.error)

    def ending(self) -> Iterator[Buffer]:
        """Yield the frames after a reason: the images that were not sent yet, and CLOSE."""
        yield from self._originals()
        yield close_frame()

    def _take(self, message: Message) -> None:
        if isinstance(message, Text):
            self._take_text(message)
        elif isinstance(message, Image):
            if self._header is None:
                raise DataError("images without a header; send it (3) before them")
        elif message.id == Id.CLOSE:
            self.complete = True
        elif message.id == Id.ACQUISITION:
            raise DataError("raw data (ACQUISITION); let the host send reconstructed images")

    def _take_text(self, message: Text) -> None:
        if message.id in (Id.CONFIG_FILE, Id.CONFIG_TEXT):
            self._config = message.text
            self._keep(Id.CONFIG_FILE, self._config)
        elif message.id == Id.HEADER:
            self._header = parse_header(message.text)
            self._keep(Id.HEADER, self._header)
        elif self._parameters is None and message.text.strip(BLANK):
            # the first TEXT is the JSON, later ones are for people
            self._parameters = parameters_from(parse_parameters(message.text))
            self._keep(Id.TEXT, self._parameters.unknown)

    def _keep(self, place: Id, text: object) -> None:
        """Count a text in place of the one that it replaces."""
        before, self._texts[place] = self._texts.get(place, 0), held_bytes(text)
        self.held_bytes += self._texts[place] - before

    def _answer_images(self, reconstructor: TakingTurns) -> Iterator[Buffer]:
        parameters = self._parameters or Parameters()
        name = parameters.config or parse_config(self._config or "")
        if not name:
            raise UsageError("no configuration: send CONFIG_FILE (1), or the parameter config")
        configuration = CONFIGURATIONS[require_config(name)]
        assert self._header is not None  # or the first image had been an error
        if parameters.unknown:
            names = ", ".join(parameters.unknown)[:500]
            yield text_frame("WRN", f"parameters without meaning here: {names}")
        if faults := [image.fault for image in self.images if image.fault is not None]:
            yield text_frame(
                "WRN",
                f"the attributes of {len(faults)} images are broken, and used as far as they can "
                f"be read: {faults[0]}",
            )
        if parameters.send_original:
            yield from self._originals()
        if reconstructor.busy:
            yield text_frame("INFO", "another session is being reconstructed; waiting")
        reconstructor = reconstructor.named(parameters.method)
        needs = reconstructor.needs
        # the turn is given back while the host takes a line: a slow one holds nobody up
        request = Request(self.images, self._header, parameters, needs.magnitude, needs.takes_noise)
        lines = configuration(request, self.stages)
        while True:
            # what overflows is Inf, which is refused by what it is
            with reconstructor.turn(), np.errstate(over="ignore", invalid="ignore"):
                try:
                    line = next(lines)
                except StopIteration as finished:
                    source = finished.value
                    break
            yield text_frame("INFO", line)
        if needs.magnitude and source.scan.magnitude is None:
            raise DataError(
                f"{needs.network} takes the edges of a magnitude, and this session has none: send "
                "phase and magnitude of every echo (configuration qsm), or the parameter method tv"
            )
        with reconstructor.turn():
            made = reconstructor.make(source.scan, self.stages)
        with self.stages("encode"):
            encoded = encode_chi(source.scan.axes.turn_back(made.map_ppm))
        findings = made.findings
        del made
        for note in [*source.scan.notes, *findings["notes"]]:
            yield text_frame("WRN", note)
        rows = inversion_rows(findings.get("inversion", {}))
        found = "; ".join([needs.network, *(f"{what} {value}" for what, value in rows.items())])
        self.summary = f"{name}, {source.stack.geometry}, {found}"
        yield text_frame("INFO", found)
        yield text_frame("INFO", self._timing())
        yield text_frame("INFO" if encoded.clipped == 0 else "WRN", _clipping(encoded.clipped))
        series = free_series({image.head.image_series_index for image in self.images})
        comment = f"chi [ppb], {reconstructor.name}"
        yield from chi_frames(encoded.codes, source.stack, series, comment)

    def _originals(self) -> Iterator[Buffer]:
        while self._resent < len(self.images):
            self._resent += 1
            yield from resent_frames(self.images[self._resent - 1])

    def _timing(self) -> str:
        return "stages: " + ", ".join(f"{n} {s:.3f} s" for n, s in self.stages.seconds.items())


def _clipping(count: int) -> str:
    if count == 0:
        return "no voxel lies beyond 2.047 ppm"
    return f"{count} voxels lie beyond 2.047 ppm and were put at the bound of the scale"
