"""Texts of the greatest size that are made to be slow: bounded in time and in memory."""

import time

import numpy as np
import pytest

from qsm_deploy.kernels.errors import ProtocolError
from qsm_deploy.runtime.console.peak_memory import peak_rss_bytes, reset_peak, rss_bytes
from qsm_deploy.runtime.serve.image_roles import image_tokens
from qsm_deploy.runtime.serve.limits import Limits
from qsm_deploy.runtime.serve.parameters import parameters_from
from qsm_deploy.runtime.serve.texts import (
    MOST_TAGS,
    decoded,
    parse_attributes,
    parse_config,
    parse_header,
    parse_parameters,
    whole_attributes,
)

SIZE = Limits().text_bytes
SLOWEST_S = 8.0  # ten times what the slowest takes, for a machine that others use too
MOST_BYTES = 75 * SIZE  # in a process that holds what other tests loaded
META, HEADER = ("<ismrmrdMeta>", "</ismrmrdMeta>"), ("<ismrmrdHeader><g>", "</g></ismrmrdHeader>")
DEEP = MOST_TAGS // 2 - 1


def filled(unit, before="", after=""):
    """Return as much of a unit as there may be."""
    return before + unit * ((SIZE - len(before) - len(after)) // len(unit)) + after


def numbered(unit, before="", after=""):
    """Return as many different units as there may be."""
    count = (SIZE - len(before) - len(after)) // len(unit % 10**6)
    return before + "".join(unit % n for n in range(count)) + after


XML = {
    "elements": lambda: filled("<a/>", *META),
    "elements of a header": lambda: numbered("<b%d/>", *HEADER),
    "metas": lambda: numbered("<meta><name>%d</name><value/></meta>", *META),
    "metas that end": lambda: filled("<meta><name>a</name><value>1</value></meta>", META[0]),
    "values that end": lambda: filled("<value>1</value>", META[0] + "<meta><name>a</name>"),
    "metas that begin": lambda: filled("<meta>"),
    "metas and spaces": lambda: filled("<meta>" + 1000 * " "),
    "a value and spaces": lambda: filled(" ", "<meta><name>a</name><value>1</value>"),
    "nested": lambda: "<a>" * (SIZE // 7) + "</a>" * (SIZE // 7),
    "nested without end": lambda: filled("<a>"),
    "nested as deep as taken": lambda: META[0] + "<a>" * DEEP + "</a>" * DEEP + META[1],
    "nested as deep as taken, without end": lambda: "<a>" * MOST_TAGS,
    "attributes": lambda: numbered(' a%d=""', "<ismrmrdMeta", "/>"),
    "the same attribute": lambda: filled(' a=""', "<ismrmrdMeta", "/>"),
    "namespaces": lambda: numbered(' xmlns:a%d="b"', "<ismrmrdMeta", "/>"),
    "bare ampersands": lambda: filled("&", *META),
    "entities": lambda: filled("&amp;", *META),
    "unknown entities": lambda: filled("&lol;", *META),
    "entities within a name": lambda: filled("&lt;", "<meta><name>", "</name></meta>"),
    "references": lambda: filled("&#65;", *META),
    "NUL": lambda: filled("\0&", *META),
    "angles": lambda: filled("<"),
    "declarations": lambda: filled("<!"),
    "a comment": lambda: filled("-", "<!--"),
    "CDATA": lambda: filled("]", META[0] + "<![CDATA["),
    "a name": lambda: filled("a", "<", "/>"),
    "lines": lambda: filled("\n", *META),
    "controls": lambda: filled("\x01", *META),
}
JSON = {
    "lists": lambda: filled("["),
    "lists that end": lambda: "[" * (SIZE // 2) + "]" * (SIZE // 2),
    "objects": lambda: filled('{"a":'),
    "a number": lambda: filled("1"),
    "an exponent": lambda: filled("9", "1e"),
    "numbers": lambda: filled("1,", '{"a":[', "1]}"),
    "escapes": lambda: filled("\\u0041", '{"a":"', '"}'),
    "backslashes": lambda: filled("\\", '"'),
    "replaced": lambda: filled("\ufffd\\", '{"a":"'),
    "names": lambda: numbered('"%d":1,', "{", '"a":1}'),
    "spaces": lambda: filled(" "),
}


@pytest.fixture
def bounded():
    """Return a function that takes a text to a parser, which may refuse it in words."""

    def run(parse, text):
        reset_peak()
        before, began = rss_bytes(), time.monotonic()
        try:
            parse(decoded(text.encode()))
            said = "read"
        except ProtocolError as error:
            said = str(error)
        assert time.monotonic() - began < SLOWEST_S
        assert peak_rss_bytes() - before < MOST_BYTES
        assert len(said) < 300
        return said

    return run


@pytest.mark.parametrize("name", XML)
@pytest.mark.parametrize("parse", [parse_attributes, whole_attributes, parse_header, parse_config])
def test_xml(bounded, parse, name):
    bounded(parse, XML[name]())


@pytest.mark.parametrize("name", JSON)
def test_json(bounded, name):
    bounded(lambda text: parameters_from(parse_parameters(text)), JSON[name]())


def test_more_tags_than_a_host_ever_sends(bounded):
    said = bounded(parse_header, XML["elements of a header"]())
    assert said.startswith("the header is XML of ")
    assert said.endswith("tags; this server takes 20000")
    inside = "".join(f"<b{n}>1</b{n}>" for n in range(DEEP - 2))
    assert bounded(parse_header, HEADER[0] + inside + HEADER[1]) == "read"


@pytest.mark.parametrize("depth", [100, 800, 900])
def test_parameters_without_meaning_are_not_looked_into(depth):
    nested = depth * "[" + depth * "]"
    text = f'{{"parameters": {{"units": "ppm", "x": {nested}}}}}'
    assert parameters_from(parse_parameters(text)).unknown == ("x",)


def test_what_cannot_be_read_of_many_images_is_searched_once(
    decoded, serialise, mrd_images, image_message
):
    """Every role and echo is asked for many times."""
    image = mrd_images(np.zeros((4, 4, 1), dtype=np.float32))[0]
    text = filled("é\x01", "<ismrmrdMeta>").encode()[:SIZE]
    images = decoded(image_message(image, text) * 3, Limits())
    began = time.monotonic()
    for one in images:
        for _ in range(200):
            image_tokens(one)
    assert time.monotonic() - began < SLOWEST_S
    assert all(one.fault for one in images)
