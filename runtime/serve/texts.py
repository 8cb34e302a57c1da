"""The texts of a host, as hosts write them: a configuration, the header, attributes, and JSON.

Hosts write UTF-8, or what their country's Windows writes. Whatever matters here is ASCII, which all
of these share, so what is not UTF-8 is replaced and the rest is read.
"""

import html
import json
import re
from typing import Any
from xml.etree.ElementTree import Element, ParseError, fromstring

from qsm_deploy.kernels.errors import ProtocolError

Attributes = dict[str, list[str]]

REPLACEMENT = "\ufffd"
LINE_CHARACTERS = 700
MOST_TAGS = 20_000  # since a tag of three bytes takes a hundred times as much when parsed
# XML 1.0 has no place for these; NUL, which ends a text in C, stays
FORBIDDEN = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
UTF16 = re.compile(rb"\xff\xfe|\xfe\xff|[^\0]\0[^\0]\0")
BLANK = "\ufeff\0 \t\r\n"
BARE_AMPERSAND = re.compile("&(?!(?:amp|lt|gt|quot|apos);)")
VALUE = r"\s*<value>([^<]*)</value>"
META = re.compile(rf"<meta>\s*<name>([^<]*)</name>((?:{VALUE})+)\s*</meta>")


def decoded(content: bytes) -> str:
    """Return a text in UTF-8 or UTF-16; what is neither, or no character of XML, is replaced."""
    encoding = "utf-16" if UTF16.match(content) else "utf-8-sig"
    return FORBIDDEN.sub(REPLACEMENT, content.decode(encoding, "replace"))


def one_line(text: str) -> str:
    """Return a text as a line of bounded length, without characters that cannot be shown."""
    line = " ".join(text.split())
    if len(line) > LINE_CHARACTERS:
        line = f"{line[:LINE_CHARACTERS]}..."
    return printable(line)


def printable(text: str) -> str:
    """Return a text in which what cannot be shown, but for the ends of lines, is replaced."""
    return "".join(c if c.isprintable() or c == "\n" else REPLACEMENT for c in text)


def parse_config(text: str) -> str:
    """Return the name in a configuration text, which some hosts put into XML.

    Raises
    ------
    ProtocolError
        If it begins like XML and is none.
    """
    name = _before_nul(text)
    if not name.startswith("<"):
        return name
    return "".join(_parse_xml(name, "configuration is").itertext()).strip()


def parse_header(text: str) -> dict[str, list[str]]:
    """Return the values in an ISMRMRD header by the path of their element, without namespaces.

    Only what is in the header is there: ``sequenceParameters/TE`` has as many values as echoes.

    Raises
    ------
    ProtocolError
        If it is not such a header.
    """
    values: dict[str, list[str]] = {}
    for group in _parse_xml(text, "header is", "ismrmrdHeader"):
        for element in group:
            path = f"{_local(group.tag)}/{_local(element.tag)}"
            values.setdefault(path, []).append((element.text or "").strip())
    return values


def parse_attributes(text: str) -> Attributes:
    """Return the attributes of an image, each a list of texts.

    Raises
    ------
    ProtocolError
        If they are not what the protocol asks for.
    """
    found: Attributes = {}
    if not _before_nul(text):
        return found
    for meta in _parse_xml(text, "attributes are", "ismrmrdMeta"):
        texts = [(_local(child.tag), child.text or "") for child in meta]
        names = [text for tag, text in texts if tag == "name"]
        if len(names) != 1:
            raise ProtocolError(f"the attributes have a meta of {len(names)} names, expected one")
        found.setdefault(names[0], []).extend(text for tag, text in texts if tag == "value")
    return found


def whole_attributes(text: str) -> Attributes:
    """Return those attributes that are whole in a text that is broken XML."""
    found: Attributes = {}
    for name, values, _ in META.findall(text):
        found.setdefault(html.unescape(name), []).extend(
            html.unescape(value) for value in re.findall(VALUE, values)
        )
    return found


def parse_parameters(text: str) -> dict[str, Any]:
    """Return the parameters in a host's JSON; numbers are the text that some hosts send.

    They are the object ``parameters``, or where there is none, what else there is.

    Raises
    ------
    ProtocolError
        If it is not JSON with an object.
    """
    text = _before_nul(text)
    try:
        try:
            content = _json(text)
        except ValueError:
            # characters of Shift-JIS, Big5 and GBK may end in a byte that is a backslash
            content = _json(text.replace(f"{REPLACEMENT}\\", REPLACEMENT))
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the TEXT with the parameters is not JSON ({error})") from None
    parameters = content.get("parameters", content) or {} if isinstance(content, dict) else None
    if not isinstance(parameters, dict):
        raise ProtocolError('the JSON has no object "parameters", as in {"parameters": {}}')
    return parameters


def _json(text: str) -> Any:
    # as text, since Python's numbers have limits that JSON's do not
    return json.loads(text, strict=False, parse_int=str, parse_float=str, parse_constant=str)


def _parse_xml(text: str, what: str, root_tag: str | None = None) -> Element:
    """Return the root of XML, with characters that its writer should have escaped or left out."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # it could expand to more than it is
        raise ProtocolError("XML with a document type; this server takes none")
    if (tags := text.count("<")) > MOST_TAGS:
        raise ProtocolError(f"the {what} XML of {tags} tags; this server takes {MOST_TAGS}")
    escaped, faults = BARE_AMPERSAND.sub("&amp;", text), []
    whole = escaped.strip(BLANK).replace("\0", REPLACEMENT)
    for attempt in dict.fromkeys((_before_nul(text), _before_nul(escaped), whole)):
        try:
            root = fromstring(attempt)
            break
        except (ParseError, ValueError) as error:
            faults.append(str(error))
    else:
        raise ProtocolError(f"the {what} not XML ({faults[0]})")
    if root_tag is not None and _local(root.tag) != root_tag:
        raise ProtocolError(f"the {what} <{_local(root.tag)[:80]}>, expected <{root_tag}>")
    return root


def _before_nul(text: str) -> str:
    return text.lstrip("\ufeff").partition("\0")[0].strip(BLANK)


def _local(tag: str) -> str:
    return tag.rsplit("}", 1)[-1]
