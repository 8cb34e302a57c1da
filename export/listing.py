"""What ``qsm-export --list`` shows."""

from typing import Any

from qsm_deploy.export.networks.network_spec import flag
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.runtime.card.card import UNITS


def list_rows() -> list[dict[str, Any]]:
    """Return the known networks, a row of facts for each."""
    return [
        {
            "network": spec.name,
            "parameters": spec.parameters,
            "divisor": spec.divisor,
            "gmac_64": spec.gmac_64,
            "inputs": {name: UNITS[name] for name in spec.inputs},
            "output": {spec.output: UNITS[spec.output]},
            "options": {name: list(values) for name, values in spec.options.items()},
            "bundled_weights": spec.bundled[1].source if spec.bundled else None,
            "published_weights": spec.published.source,
            "licence": spec.published.licence,
            "doi": spec.doi,
        }
        for spec in REGISTRY.values()
    ]


def list_text(rows: list[dict[str, Any]]) -> str:
    """Return the rows as people read them."""
    return "\n".join(line for row in rows for line in _lines(row))


def _lines(row: dict[str, Any]) -> list[str]:
    options = (f"{flag(name)} {'|'.join(values)}" for name, values in row["options"].items())
    return [
        row["network"],
        f"  size               {row['parameters']:,} parameters, {row['gmac_64']:g} GMAC for 64^3",
        f"  grid               multiples of {row['divisor']}",
        f"  inputs             {_with_units(row['inputs'])}",
        f"  output             {_with_units(row['output'])}",
        f"  options            {', '.join(options) or 'none'}",
        f"  bundled weights    {row['bundled_weights'] or 'none'}",
        f"  published weights  {row['published_weights']}",
        f"  licence            {row['licence']}",
        f"  doi                {row['doi'] or 'none'}",
    ]


def _with_units(tensors: dict[str, str]) -> str:
    return ", ".join(f"{name} [{unit}]" for name, unit in tensors.items())
