"""What became of every layer in INT8: range, scale, sensitivity, precision, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qsm_deploy.calibration.int8.calibration import Calibrated
from qsm_deploy.calibration.int8.layers import int8_layers, kept_from_int8
from qsm_deploy.calibration.int8.qdq import LARGEST, Int8Layer, shared_ranges
from qsm_deploy.calibration.int8.search import Found


@dataclass(frozen=True)
class LayerRow:
    """One convolution or residual add.

    Attributes
    ----------
    layer
        The name of its weights, or of the add.
    operator
        Conv, ConvTranspose or Add.
    macs_share
        Of all multiply-accumulates of convolutions.
    precision, why
        At the end.
    amax, scale
        The range of its activation and the step of INT8, with those that share a scale; of what
        may not be in INT8 there are none.
    sqnr_db, alone_mean_ppb, alone_p999_ppb
        If it alone is in INT8: SQNR at its output, and the in-mask error of the map.
    """

    layer: str
    operator: str
    macs_share: float
    precision: str
    why: str
    amax: float | None = None
    scale: float | None = None
    sqnr_db: float | None = None
    alone_mean_ppb: float | None = None
    alone_p999_ppb: float | None = None


def layer_rows(
    calibrated: Calibrated, found: Found, amax: Mapping[str, float]
) -> tuple[LayerRow, ...]:
    """Return a row for each convolution and candidate, in the order of the graph.

    Parameters
    ----------
    calibrated
        The network.
    found
        What the search ended with.
    amax
        Ranges by tensor.
    """
    graph, macs = calibrated.graphs.exact.graph, calibrated.macs
    reduced = calibrated.graphs.reduced
    kept = kept_from_int8(graph, reduced)
    layers = {layer.output: layer for layer in calibrated.candidates}
    kept |= {
        layer.output: ("fp16", "takes nothing but zeros on the calibration data")
        for layer in int8_layers(graph, reduced)
        if layer.output not in layers
    }
    in_int8 = {layer.output for layer in found.layers}
    ranges = dict(amax) | shared_ranges(graph, found.layers, amax)
    total = sum(macs.values())
    rows = []
    for node in graph.node:
        output = node.output[0]
        share = macs.get(output, 0) / total
        if output in kept:
            name = output if node.op_type == "Add" else node.input[1].removesuffix(".weight")
            rows.append(LayerRow(name, node.op_type, share, *kept[output]))
        elif output in layers:
            layer, alone = layers[output], found.sensitivities[output]
            precision, why = ("int8", "the budget holds with it")
            if output not in in_int8:
                precision, why = "fp16", _why_demoted(layer, in_int8)
            rows.append(
                LayerRow(
                    output if layer.kind == "Add" else layer.partner.removesuffix(".weight"),
                    node.op_type,
                    *(share, precision, why),
                    *(ranges[layer.activation], ranges[layer.activation] / LARGEST),
                    *(alone.sqnr_db, alone.error.mean_ppb, alone.error.p999_ppb),
                )
            )
    return tuple(rows)


def table_lines(rows: Sequence[LayerRow]) -> list[str]:
    """Return the rows as people read them."""
    head = ("layer", "operator", "MACs", "range", "scale", "SQNR", "alone, mean", "precision", "")
    cells = [head]
    for row in rows:
        cells.append(
            (
                *(row.layer, row.operator, f"{100 * row.macs_share:.1f} %"),
                *(_number(row.amax), _number(row.scale), _number(row.sqnr_db, " dB")),
                *(_number(row.alone_mean_ppb, " ppb"), row.precision, row.why),
            )
        )
    widths = [max(len(line[n]) for line in cells) for n in range(len(head))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


def row_dicts(rows: Sequence[LayerRow]) -> list[dict[str, Any]]:
    """Return the rows for JSON."""
    return [asdict(row) for row in rows]


def _why_demoted(layer: Int8Layer, in_int8: set[str]) -> str:
    if layer.kind == "Add" and layer.partner not in in_int8:
        return "its convolution is not in INT8"
    return "among the most harmful, demoted for the budget"


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.3g}{unit}"
