"""Pages as tests read them: parsed, and opened in a headless browser that has no network."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-quic"),
    "--virtual-time-budget=60000",
)
TIMEOUT_S = 180
VOID = {"meta", "img", "br", "hr", "link", "input"}
# waits for the viewers, and leaves what the body returns where the dumped page shows it
DRIVER = """<script>
const waiting = setInterval(async () => {
  if (!document.documentElement.dataset.state) return;
  clearInterval(waiting);
  const found = await (async () => { %s })();
  document.documentElement.dataset.found = JSON.stringify(found);
}, 20);
</script>"""


class Page(HTMLParser):
    """Collects what a page links to and its text by table row, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.images = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.images += tag == "img"
        self.links += [v for k, v in attributes if k in ("src", "href", "srcset", "data")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "h2":
            self.headings[-1] += data


def assert_asks_nobody(text: str) -> None:
    """Check that a page has nothing from elsewhere, and may not ask for it."""
    page = Page(text)
    assert page.open == []
    assert all(re.match(r"data:image/png;base64,|[\w.%+-]+\.html$", link) for link in page.links)
    assert "content=\"default-src 'none'; script-src 'unsafe-inline';" in text
    assert not re.search(r"@import|url\(|https?:|\bfetch\(|XMLHttpRequest|<script[^>]* src", text)


def browser() -> str:
    """Return the path of a browser, or skip the test."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no headless browser: none of {', '.join(BROWSERS)} is installed")
    return found


def screenshot(page: Path, folder: Path, width: int, height: int, *flags: str) -> Path:
    """Return a picture of a page that was opened."""
    shot = folder / "shot.png"
    _browse(page, folder, f"--window-size={width},{height}", f"--screenshot={shot}", *flags)
    return shot


def driven(text: str, folder: Path, body: str, *, width: int = 1400, height: int = 1000):
    """Return what a script finds in a page once its viewers are there."""
    page = folder / "driven.html"
    page.write_text(text.replace("</body>", f"{DRIVER % body}</body>"))
    dumped = _browse(page, folder, f"--window-size={width},{height}", "--dump-dom")
    found = re.search(r'data-found="([^"]*)"', dumped)
    assert found, dumped[:2000]
    return json.loads(html.unescape(found[1]))


def _browse(page: Path, folder: Path, *flags: str) -> str:
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [browser(), *FLAGS, profile, *flags, page.as_uri()],
        check=True,
        capture_output=True,
        timeout=TIMEOUT_S,
    )
    return done.stdout.decode()
