"""The texts that a host sends: the name of a configuration, the header, and JSON."""

import json
from xml.etree.ElementTree import ParseError, fromstring

from qsm_deploy.kernels.errors import ProtocolError


def parse_config(text: str) -> str:
    """Return the name in a configuration text, which some hosts put into XML.

    Raises
    ------
    ProtocolError
        If it begins like XML and is none.
    """
    name = text.strip("\0 \n")
    if not name.startswith("<"):
        return name
    refuse_entities(name)
    try:
        return "".join(fromstring(name).itertext()).strip()
    except ParseError as error:
        raise ProtocolError(f"the configuration is not XML ({error})") from None


def parse_header(text: str) -> dict[str, list[str]]:
    """Return the values in an ISMRMRD header by the path of their element, without namespaces.

    Only what is in the header is there: ``sequenceParameters/TE`` has as many values as echoes.

    Raises
    ------
    ProtocolError
        If it is not such a header.
    """
    refuse_entities(text)
    try:
        root = fromstring(text.rstrip("\0"))
    except (ParseError, ValueError) as error:
        raise ProtocolError(f"the header is not XML ({error})") from None
    if _local(root.tag) != "ismrmrdHeader":
        raise ProtocolError(f"the header is <{_local(root.tag)}>, expected <ismrmrdHeader>")
    values: dict[str, list[str]] = {}
    for group in root:
        for element in group:
            path = f"{_local(group.tag)}/{_local(element.tag)}"
            values.setdefault(path, []).append((element.text or "").strip())
    return values


def parse_parameters(text: str) -> dict[str, str]:
    """Return the parameters in a host's JSON, each as the text that some hosts send.

    Raises
    ------
    ProtocolError
        If it is not JSON with an object ``parameters`` of plain values.
    """
    try:
        content = json.loads(text.rstrip("\0"))
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the TEXT with the parameters is not JSON ({error})") from None
    parameters = content.get("parameters") if isinstance(content, dict) else None
    if not isinstance(parameters, dict):
        raise ProtocolError('the JSON has no object "parameters", as in {"parameters": {}}')
    plain = (str, int, float, bool)
    if found := [n for n, value in parameters.items() if not isinstance(value, plain)]:
        raise ProtocolError(f"the parameter {found[0]} is neither text, number nor true or false")
    return {name: str(value).strip() for name, value in parameters.items()}


def refuse_entities(text: str) -> None:
    """Refuse XML that could expand to more than it is.

    Raises
    ------
    ProtocolError
        If it has a document type.
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ProtocolError("XML with a document type; this server takes none")


def _local(tag: str) -> str:
    return tag.rsplit("}", 1)[-1]
