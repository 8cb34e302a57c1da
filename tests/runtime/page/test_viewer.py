"""The viewer: what lies in its page, and what a browser makes of it."""

import base64
import gzip
import json
import re
import sys

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from qsm_deploy.kernels.errors import GeometryError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.page import viewer as module
from qsm_deploy.runtime.page.figure import BACKGROUND
from qsm_deploy.runtime.page.parts import page
from qsm_deploy.runtime.page.planes import PLANES, Planes, centre_of
from qsm_deploy.runtime.page.rows import Row
from qsm_deploy.runtime.page.viewer import OUTSIDE, viewer, viewer_head
from qsm_deploy.runtime.scan.axes import STORED, axes_named
from tests.browsing import assert_asks_nobody, driven, screenshot

SHAPE, SIZE_MM = (21, 27, 15), (1.0, 1.1, 2.0)
GEOMETRY = Geometry(SHAPE, SIZE_MM)
AFFINE = np.diag([*SIZE_MM, 1.0])
AFFINE[:3, 3] = -9, -11, 4
WINDOW = (-0.1, 0.2)
MARK = (15, 20, 10)  # to the right, the front and the head, in RAS
# a panel's canvas, by row and plane
CANVAS = "document.querySelectorAll('.row')[%d].querySelectorAll('canvas')[%d]"
GREYS = """
const grey = (canvas) => {
  const { width, height } = canvas;
  const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
  return Array.from({ length: height }, (_, y) => Array.from({ length: width }, (_, x) => {
    const at = 4 * (y * width + x);
    return data[at + 3] ? data[at] : -1;
  }));
};
const text = (selector) => [...document.querySelectorAll(selector)].map((one) => one.textContent);
const at = (canvas, x, y, kind, more = {}) => {
  const box = canvas.getBoundingClientRect();
  const where = { clientX: box.left + (x + 0.5) / canvas.width * box.width,
    clientY: box.top + (y + 0.5) / canvas.height * box.height, bubbles: true, cancelable: true };
  const Kind = kind === "wheel" ? WheelEvent : PointerEvent;
  return canvas.dispatchEvent(new Kind(kind, { ...where, ...more }));
};
const key = (canvas, name, more = {}) => canvas.parentElement.dispatchEvent(
  new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true, ...more }));
"""


def head(seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return a map in RAS with a mark, and its mask, whose box is not the grid's."""
    mask = np.zeros(SHAPE, bool)
    mask[3:19, 4:24, 2:14] = True
    mask[3:8, 4:8] = False
    chi = np.random.default_rng(seed).normal(0, 0.05, SHAPE).astype(np.float32)
    chi[tuple(slice(n - 1, n + 2) for n in MARK)] = 1
    return chi, mask


def shown(*viewers: str) -> str:
    return page("a page", viewers, head=viewer_head())


def volumes_in(text: str) -> list[np.ndarray]:
    """Return the volumes of a page with one viewer, in the picture's axes."""
    facts = json.loads(re.findall(r'class="facts">(.*?)</script>', text)[0])
    found = re.findall(r'class="volume">([^<]*)</script>', text)
    return [
        np.frombuffer(gzip.decompress(base64.b64decode(one)), "<i2").reshape(
            facts["shape"], order="F"
        )
        for one in found
    ]


def test_the_same_input_gives_the_same_bytes_and_asks_nobody() -> None:
    chi, mask = head()
    rows = [Row("χ <&>", chi, WINDOW)]
    made = shown(viewer(rows, mask, GEOMETRY, AFFINE, title="a <b>"))
    assert made == shown(viewer(rows, mask, GEOMETRY, AFFINE, title="a <b>"))
    assert_asks_nobody(made)
    assert "χ &lt;&amp;&gt;" in made
    assert "<b>" not in re.sub(r'<b class="\w+">', "", made).replace("</b>", "")


@pytest.mark.parametrize("letters", ["RAS", "LPS", "PSR", "ILA"])
def test_every_value_is_in_the_page_to_the_ppb_and_none_outside_the_mask(letters) -> None:
    chi, mask = head()
    axes = axes_named(letters)
    turned = Geometry(axes.sizes(SHAPE), axes.sizes(SIZE_MM))
    text = viewer(
        [Row("field", axes.turn(chi / 7), WINDOW), Row("χ", axes.turn(chi), WINDOW)],
        axes.turn(mask),
        turned,
        axes.affine(AFFINE, SHAPE),
    )
    box = np.s_[1:21, 2:26, 0:15]  # that of the mask and two voxels, where there are some
    inside = mask[box][::-1]  # the picture's x runs to the left of the head
    for volume, expected in zip(volumes_in(text), (chi / 7, chi), strict=True):
        assert volume.shape == inside.shape
        assert (volume[inside] == np.round(1000 * expected)[box][::-1][inside]).all()
        assert (volume[~inside] == OUTSIDE).all()


def test_what_does_not_fit_sixteen_bits_is_clipped_and_counted() -> None:
    chi, mask = head()
    chi[5:7, 10, 8] = 40, -50
    chi[9, 10, 8] = np.nan
    text = viewer([Row("χ", chi, WINDOW)], mask, GEOMETRY, AFFINE)
    assert "2 values lie beyond" in text
    (volume,) = volumes_in(text)
    assert sorted(volume[volume != OUTSIDE])[:: mask.sum() - 2] == [-32767, 32767]
    assert "values lie beyond" not in viewer([Row("χ", 0 * chi, WINDOW)], mask, GEOMETRY, AFFINE)


def test_large_volumes_are_halved_and_the_page_says_so(monkeypatch, tmp_path) -> None:
    chi, mask = head()
    monkeypatch.setattr(module, "MOST_VOXELS", 4000)
    at = MARK
    text = viewer([Row("χ", chi, WINDOW)], mask, GEOMETRY, AFFINE, at=at)
    assert "Shown at 2 x the voxel size" in text
    (half,) = volumes_in(text)
    assert half.shape == (10, 12, 8)
    # blocks of the picture's axes, whose x runs against the grid's
    values = np.where(mask, chi, np.nan)[1:21, 2:26, 0:15][::-1]
    block = values[8:10, 4:6, 6:8]
    assert half[4, 2, 3] == pytest.approx(1000 * np.nanmean(block), abs=0.6)
    found = driven(shown(text), tmp_path, GREYS + "return [text('.titles output'), text('.voxel')]")
    places = [float(title.split()[2]) for title in found[0]]
    exact = (AFFINE @ (*at, 1))[[2, 1, 0]]
    assert np.abs(np.abs(exact) - places).max() <= 1.01  # half a voxel
    stored = [int(n) for n in re.findall(r"\d+", found[1][0])]
    assert np.abs(np.subtract(stored, at)).max() <= 1


def test_a_page_stays_below_its_limit() -> None:
    chi, mask = head()
    rows = [Row("χ", chi, WINDOW)]
    whole = viewer(rows, mask, GEOMETRY, AFFINE)
    assert "Shown at" not in whole
    small = viewer(rows, mask, GEOMETRY, AFFINE, most_bytes=2000)
    assert "Shown at 2 x" in small
    assert len(re.findall(r'class="volume">([^<]*)<', small)[0]) <= 2000


def test_another_grid_is_refused_with_and_without_matplotlib(monkeypatch) -> None:
    chi, mask = head()
    for _ in range(2):
        with pytest.raises(GeometryError, match=r"the χ has shape \(20, 27, 15\)"):
            viewer([Row("χ", chi[1:], WINDOW)], mask, GEOMETRY, AFFINE)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def test_without_matplotlib_there_is_no_still_picture_and_all_else(monkeypatch, tmp_path) -> None:
    chi, mask = head()
    drawn = viewer([Row("χ", chi, WINDOW)], mask, GEOMETRY, AFFINE)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    plain = viewer([Row("χ", chi, WINDOW)], mask, GEOMETRY, AFFINE)
    assert plain == re.sub(r"<img [^>]*>\n", "", drawn)
    state = "return document.documentElement.dataset.state"
    assert driven(shown(plain), tmp_path, state) == "ready"
    assert "matplotlib" in sys.modules or "<img" not in drawn


def grey_of(cut: np.ndarray, window=WINDOW) -> np.ndarray:
    """Return the greys of a plane as matplotlib has them, from the top, -1 outside the mask."""
    low, high = window
    whole = np.round(1000 * cut) / 1000
    scaled = np.clip(np.floor(256 * (whole - low) / (high - low)), 0, 255)
    return np.where(np.isnan(scaled), -1, scaled)[::-1]


TURN = np.eye(4)
TURN[:3, :3] = Rotation.from_euler("xz", [20, 8], degrees=True).as_matrix()
STORAGES = {
    "LPS": (axes_named("LPS"), lambda affine: affine),
    "RAS": (STORED, lambda affine: affine),
    "PSR, oblique": (axes_named("PSR"), lambda affine: TURN @ affine),
    "none": (STORED, lambda affine: None),
}


def test_the_marked_corner_is_where_the_letters_say_in_every_storage(tmp_path) -> None:
    chi, mask = head()
    viewers = []
    for axes, affine_of in STORAGES.values():
        geometry = Geometry(axes.sizes(SHAPE), axes.sizes(SIZE_MM))
        at = axes.voxel(MARK, SHAPE)
        affine = affine_of(axes.affine(AFFINE, SHAPE))
        row = Row("χ", axes.turn(chi), WINDOW)
        viewers.append(viewer([row], axes.turn(mask), geometry, affine, at=at))
    body = f"""{GREYS}
      return [...document.querySelectorAll('.viewer')].map((one) => ({{
        greys: [...one.querySelectorAll('.panel canvas')].map(grey),
        letters: [...one.querySelectorAll('.panel')].map((panel) =>
          [...panel.querySelectorAll('b')].map((b) => b.textContent)),
        titles: [...one.querySelectorAll('.titles output')].map((t) => t.textContent),
        voxel: one.querySelector('.voxel').textContent,
      }}))"""
    found = dict(zip(STORAGES, driven(shown(*viewers), tmp_path, body), strict=True))
    for name, one in found.items():
        axes, affine_of = STORAGES[name]
        across = 1 if name == "none" else -1  # of the mark, to the right of the panel's middle
        for n, sides in enumerate([(across, 1), (across, 1), (1, 1)]):
            greys = np.array(one["greys"][n])
            row, column = np.argwhere(greys == 255).mean(axis=0) / greys.shape
            assert (np.sign([column - 0.5, 0.5 - row]) == sides).all(), name
        ends = [["R", "L", "P", "A"], ["R", "L", "I", "S"], ["P", "A", "I", "S"]]
        if name == "none":
            ends = [["?"] * 4] * 3
        assert [[letters[:1] for letters in panel] for panel in one["letters"]] == ends, name
        affine = affine_of(axes.affine(AFFINE, SHAPE))
        at = axes.voxel(MARK, SHAPE)
        planes = Planes(axes.turn(mask), affine, at)
        assert one["titles"] == [planes.title(plane) for plane in PLANES]
        assert one["letters"] == [planes.ends(plane) for plane in PLANES]
        assert one["voxel"].startswith(f"Stored voxel {', '.join(map(str, at))}.")
    for n in range(3):
        assert found["LPS"]["greys"][n] == found["RAS"]["greys"][n]
    assert found["LPS"]["titles"] == found["RAS"]["titles"]
    assert any(len(letters) == 2 for letters in found["PSR, oblique"]["letters"][1])


def test_greys_follow_the_values_the_cross_and_the_windows(tmp_path) -> None:
    chi, mask = head()
    field, _ = head(2)
    rows = [Row("field", field / 4, (-0.05, 0.05)), Row("χ", chi, WINDOW)]
    text = viewer(rows, mask, GEOMETRY, AFFINE)
    first = Planes(mask, AFFINE, centre_of(mask))
    x, y, z = first.at
    body = f"""{GREYS}
      const axial = {CANVAS % (1, 0)};
      const all = () => [...document.querySelectorAll('.panel canvas')].map(grey);
      const inputs = [...document.querySelectorAll('.row')[1].querySelectorAll('input')];
      const set = (n, value, kind) => {{
        inputs[n].value = value;
        inputs[n].dispatchEvent(new Event(kind));
      }};
      const found = {{ greys: [all()], values: [text('.value')] }};
      const push = () => {{ found.greys.push(all()); found.values.push(text('.value')); }};
      at(axial, 6, 7, "pointermove");
      found.pointed = text('.pointed');
      at(axial, 6, 7, "pointermove", {{ buttons: 1 }}); push();
      at(axial, 6, 7, "wheel", {{ deltaY: -100 }}); push();
      found.wheeled = text('.pointed');
      for (const name of ["ArrowRight", "ArrowUp", "ArrowUp", "PageDown"]) key(axial, name);
      push();
      set(0, -20, "change"); set(3, 80, "input"); push();
      found.ends = text('.ends');
      set(0, 500, "change"); found.pushed = inputs.map((input) => input.value);
      set(0, "", "change"); found.kept = inputs[0].value;
      document.querySelectorAll('button')[1].click(); push();
      at(axial, 0, 0, "pointermove"); found.outside = text('.pointed');
      at(axial, 0, 0, "pointerleave"); found.left = text('.pointed');
      at({CANVAS % (0, 2)}, -50, -50, "pointermove", {{ buttons: 1 }});
      found.titles = text('.titles output');
      return found;"""
    found = driven(shown(text), tmp_path, body)
    # the picture's x runs against the grid's, whose box goes from 1, 2, 0 to 20, 25, 14
    moved = (20 - 6, 25 - 7, z)
    up = (*moved[:2], z + 1)
    keyed = (moved[0] - 1, moved[1] + 2, z)
    voxels = [(x, y, z), moved, up, keyed, keyed, keyed]
    windows = [WINDOW] * 4 + [(-0.02, 0.08), WINDOW]
    for voxel, window, greys, values in zip(
        voxels, windows, found["greys"], found["values"], strict=True
    ):
        planes = Planes(mask, AFFINE, voxel)
        expected = [grey_of(planes.cut(field / 4, plane), (-0.05, 0.05)) for plane in PLANES]
        expected += [grey_of(planes.cut(chi, plane), window) for plane in PLANES]
        for grey, wanted in zip(greys, expected, strict=True):
            assert np.abs(np.array(grey) - wanted).max() <= 1
        says = [f"{round(1000 * float(volume[voxel]))} ppb" for volume in (field / 4, chi)]
        assert values == [text.replace("-0 ", "0 ") for text in says]
    assert found["pointed"] == found["values"][1]
    assert found["wheeled"] == found["values"][2]
    assert found["ends"][1] == "-20ppb80"
    assert found["pushed"][0] == "500"
    assert float(found["pushed"][2]) == pytest.approx(500.1)
    assert found["kept"] == "500"
    assert found["outside"] == ["outside", "outside"]
    assert found["left"] == ["-", "-"]
    last = Planes(mask, AFFINE, (keyed[0], 2, 14))
    assert found["titles"] == [last.title(plane) for plane in PLANES]


def test_what_is_the_browsers_own_stays_so(tmp_path) -> None:
    chi, mask = head()
    text = viewer([Row("χ", chi, WINDOW)], mask, GEOMETRY, AFFINE)
    body = f"""{GREYS}
      const panel = {CANVAS % (0, 0)}, before = text('.titles output');
      at(panel, 6, 7, "pointerdown", {{ button: 2, buttons: 2 }});
      const left = [at(panel, 6, 7, "wheel", {{ deltaY: 100, ctrlKey: true }}),
        key(panel, "ArrowLeft", {{ altKey: true }}), key(panel, "ArrowRight", {{ metaKey: true }})];
      const same = String(before) === String(text('.titles output'));
      return [left, same, key(panel, "ArrowLeft")];"""
    assert driven(shown(text), tmp_path, body) == [[True, True, True], True, False]


def test_the_screen_shows_the_greys_of_the_central_slices(tmp_path) -> None:
    image = pytest.importorskip("matplotlib.image")
    chi, mask = head()
    rows = [Row("field", chi / 4, (-0.05, 0.05)), Row("χ", chi, WINDOW)]
    text = shown(viewer(rows, mask, GEOMETRY, AFFINE))
    boxes = driven(
        text,
        tmp_path,
        "return [...document.querySelectorAll('.panel canvas')].map((c) =>"
        " c.getBoundingClientRect())",
    )
    made = tmp_path / "page.html"
    made.write_text(text)
    screen = np.rint(255 * image.imread(screenshot(made, tmp_path, 1400, 1000))[..., :3])
    planes = Planes(mask, AFFINE, centre_of(mask))
    background = [int(BACKGROUND[n : n + 2], 16) for n in (1, 3, 5)]
    for n, box in enumerate(boxes):
        row, plane = rows[n // 3], PLANES[n % 3]
        greys = grey_of(planes.cut(row.volume, plane), row.window)
        height, width = greys.shape
        y = box["top"] + (np.arange(height) + 0.5) / height * box["height"]
        x = box["left"] + (np.arange(width) + 0.5) / width * box["width"]
        seen = screen[np.ix_(y.astype(int), x.astype(int))]
        expected = np.where(greys[..., None] < 0, background, greys[..., None])
        apart = np.abs(seen - expected).max(axis=-1) > 2
        crossed = [apart.sum(axis=0).argmax(), apart.sum(axis=1).argmax()]
        apart[:, crossed[0]] = apart[crossed[1]] = False  # but for the lines of the cross
        assert not apart.any(), (row.name, plane.name)
    # every panel has one scale
    scales = [b["width"] / s for b, s in zip(boxes[:3], (20, 20, 24 * 1.1), strict=True)]
    scales += [b["height"] / s for b, s in zip(boxes[:3], (24 * 1.1, 30, 30), strict=True)]
    assert np.ptp(scales) / max(scales) < 0.01


def test_a_browser_that_cannot_unpack_shows_the_picture_and_says_so(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    chi, mask = head()
    text = shown(viewer([Row("χ", chi, WINDOW)], mask, GEOMETRY, AFFINE))
    old = text.replace("<title>", "<script>delete globalThis.DecompressionStream</script><title>")
    body = """const still = document.querySelector('.still');
      const live = document.querySelector('.live');
      return [document.documentElement.dataset.state, still?.getBoundingClientRect().height,
        live.hidden, document.querySelector('.said').textContent]"""
    state, height, hidden, said = driven(old, tmp_path, body)
    assert (state, hidden) == ("still", True)
    assert height > 100
    assert "cannot unpack" in said
    state, height, hidden, said = driven(text, tmp_path, body)
    assert (state, height, hidden, said) == ("ready", None, False, "")


@pytest.mark.parametrize("width", [360, 700, 1400])
def test_nothing_is_cut_off_at_any_width(width, tmp_path) -> None:
    chi, mask = head()
    text = shown(viewer([Row("susceptibility χ", chi, WINDOW)], mask, GEOMETRY, TURN @ AFFINE))
    body = """const live = document.querySelector('.live').getBoundingClientRect();
      const words = '.live b, .live output, .live input, .live canvas';
      const inside = [...document.querySelectorAll(words)];
      return [document.documentElement.scrollWidth - innerWidth, inside.every((one) => {
        const box = one.getBoundingClientRect();
        return box.left >= live.left && box.right <= live.right && box.width > 0;
      })]"""
    beyond, inside = driven(text, tmp_path, body, width=width)
    assert beyond <= 0
    assert inside


@pytest.mark.parametrize("height", [500, 1000])
def test_no_panel_is_higher_than_the_screen(height, tmp_path) -> None:
    chi, mask = head()
    tall = Geometry(SHAPE, (1, 1, 20))
    text = shown(viewer([Row("χ", chi, WINDOW)], mask, tall, np.diag([1, 1, 20, 1.0])))
    body = """return [...document.querySelectorAll('.panel canvas')].map((canvas) =>
      [canvas.getBoundingClientRect().height / innerHeight, canvas.parentElement.role])"""
    panels = driven(text, tmp_path, body, height=height)
    assert max(high for high, _ in panels) <= 0.86
    assert {role for _, role in panels} == {"application"}  # or a screen reader keeps the arrows


def test_a_browser_that_darkens_pages_leaves_the_colour_bar(tmp_path) -> None:
    image = pytest.importorskip("matplotlib.image")
    chi, mask = head()
    text = shown(viewer([Row("χ", chi, WINDOW)], mask, GEOMETRY, AFFINE))
    body = "return document.querySelector('.bar').getBoundingClientRect()"
    bar = driven(text, tmp_path, body)
    made = tmp_path / "page.html"
    made.write_text(text)
    dark = "--enable-features=WebContentsForceDark"
    screen = image.imread(screenshot(made, tmp_path, 1400, 1000, dark))[..., :3]
    middle = screen[int((bar["top"] + bar["bottom"]) / 2), :, 0]
    ends = middle[[int(bar["left"]) + 3, int(bar["right"]) - 3]]
    assert ends == pytest.approx([0, 1], abs=0.05)
