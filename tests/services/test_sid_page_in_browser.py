"""The page of a SID table in a real browser: tree, search and limits work, and a phone holds it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli import sid_page
from forge_ray.sid.config import SidConfig
from forge_ray.sid.fit import fit_sids
from forge_ray.sid.quantizers.rq_kmeans import RqKmeansConfig
from tests.evaluate.datasets import topic_dataset
from tests.services.chromium import rendered

pytestmark = pytest.mark.services

EVIL = "</script><script>document.title='broken'</script>"
TOPICS = ("soap", "brush", "cream", "mask", "razor", "comb", "scarf", "towel", "scent", "polish")


@pytest.fixture
def page(store: ArtifactStore, tmp_path: Path) -> Path:
    titles = [f"{TOPICS[item % 10]} number {item}" for item in range(300)]
    titles[7] = EVIL
    dataset = topic_dataset(store, columns={"title": titles})
    config = SidConfig(quantizer=RqKmeansConfig(levels=2, codebook_size=10))
    path = tmp_path / "page.html"
    sid_page.write_page(path, fit_sids(config, dataset, store), store)
    return path


def after(page: Path, script: str) -> str:
    """The document after a person did what `script` does."""
    text = page.read_text().replace("</body>", f"<script>{script}</script></body>")
    acted = page.with_name("acted.html")
    acted.write_text(text)
    return rendered(acted, page.parent / "profile")


def test_a_person_can_open_search_and_close(page: Path) -> None:
    dom = rendered(page, page.parent / "profile")
    assert dom.count('class="node"') >= 10
    assert "<title>broken" not in dom
    assert re.search(r'class="words">[^<]*soap', dom)
    search = """
      const field = document.getElementById("search");
      field.value = "razor number 14"; field.dispatchEvent(new Event("input"));
      document.querySelector("#found button").click();
    """
    found = after(page, search)
    assert re.search(r'class="item found"[^>]*>razor number 14<small>i0014', found)
    assert 'aria-expanded="true"' in found.split('id="tree">')[1]
    closed = after(page, search + 'document.getElementById("close").click();')
    assert 'aria-expanded="true"' not in closed.split('id="tree">')[1]
    nothing = after(page, search.replace("razor number 14", "zebra").split("document.query")[0])
    assert "No listed item matches." in nothing


def test_every_listed_item_can_be_reached(page: Path) -> None:
    script = """
      let missing = 0;
      for (let item = 0; item < data.ids.length; item++) {
        reveal(item);
        if (!document.querySelector('.found[data-item="' + item + '"]')) missing++;
      }
      document.title = data.ids.length + " items, " + missing + " missing";
    """
    assert "<title>300 items, 0 missing</title>" in after(page, script)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_width_scrolls_sideways_and_text_is_readable(
    page: Path, width: int, scheme: str
) -> None:
    script = """
      for (const row of document.querySelectorAll("#tree li")) if (row.open) row.open(true);
      const light = (color) => color.match(/[0-9.]+/g).slice(0, 3)
        .map((one) => one / 255)
        .map((one) => one <= .03928 ? one / 12.92 : ((one + .055) / 1.055) ** 2.4)
        .reduce((sum, one, place) => sum + one * [.2126, .7152, .0722][place], 0);
      const ground = light(getComputedStyle(document.body).backgroundColor);
      let worst = 99;
      for (const one of document.querySelectorAll("p, td, th, h1, h2, .words, .count, .near, dt")) {
        const ink = light(getComputedStyle(one).color);
        worst = Math.min(worst, (Math.max(ink, ground) + .05) / (Math.min(ink, ground) + .05));
      }
      parent.postMessage(JSON.stringify([document.documentElement.scrollWidth, innerWidth,
        ground < .2 ? "dark" : "light", Math.round(worst * 10)]), "*");
    """
    after(page, script)
    # A window is never narrower than 500 pixels, a frame is.
    frame = page.with_name("frame.html")
    frame.write_text(
        "<script>onmessage = (event) => { document.title = event.data; }</script>"
        f'<iframe src="acted.html" width="{width}" height="900" style="border:0"></iframe>'
    )
    flags = ["--window-size=1400,1000"]
    if scheme == "dark":
        flags.append("--blink-settings=preferredColorScheme=0")
    dom = rendered(frame, page.parent / "profile", *flags)
    found = re.search(r"<title>\[(\d+),(\d+),\"(\w+)\",(\d+)\]</title>", dom)
    assert found is not None
    needed, has, shown, contrast = found.groups()
    assert int(has) == width
    assert int(needed) <= width
    assert shown == scheme
    # WCAG AA asks for 4.5 : 1.
    assert int(contrast) >= 45
