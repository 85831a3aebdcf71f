"""What a real browser makes of a page: missing pictures, boxes that overlap or stick out, text too small to read.

Headless Chromium loads a page that holds the report in a frame for each width, because its own windows have a least
width. A script in the outer page measures the frames; the report itself has no scripts.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
_SCRIPT = """
function problems(frame) {
  const page = frame.contentDocument, found = [], least = 12, slack = 1;
  const box = element => element.getBoundingClientRect();
  const name = element => element.tagName + ' "' + (element.textContent || element.alt || '').trim().slice(0, 40) + '"';
  const root = page.documentElement;
  if (root.scrollWidth > root.clientWidth) found.push('the page is ' + root.scrollWidth + ' pixels wide');
  for (const image of page.images) {
    if (!image.complete || !image.naturalWidth) found.push('missing picture ' + image.alt);
    else if (Math.abs(box(image).width / box(image).height / (image.naturalWidth / image.naturalHeight) - 1) > 0.02)
      found.push('distorted picture ' + image.alt);
    else if (box(image).width < Math.min(300, image.naturalWidth / 2)) found.push('tiny picture ' + image.alt);
  }
  const leaves = [...page.querySelectorAll('h1,h2,h3,p,pre,dt,dd,figcaption,li,th,td,.scroll')];
  for (const one of leaves) {
    const scrolls = one.classList.contains('scroll'), inside = one.parentElement.closest('.scroll');
    if (!scrolls && one.textContent.trim() && parseFloat(frame.contentWindow.getComputedStyle(one).fontSize) < least)
      found.push('small text ' + name(one));
    if (!scrolls && one.scrollWidth > one.clientWidth + slack && one.clientWidth) found.push('cut off ' + name(one));
    if (!inside && (box(one).left < -slack || box(one).right > root.clientWidth + slack))
      found.push('sticks out ' + name(one));
  }
  for (const [i, one] of leaves.entries())
    for (const other of leaves.slice(i + 1)) {
      if (one.contains(other) || other.contains(one)) continue;
      const a = box(one), b = box(other);
      const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (width > slack && height > slack && !one.parentElement.closest('.scroll'))
        found.push(name(one) + ' overlaps ' + name(other));
    }
  return {images: page.images.length, problems: found};
}
onload = () => {
  const all = [...document.querySelectorAll('iframe')];
  const result = all.map(frame => ({page: frame.title, width: frame.contentWindow.innerWidth, ...problems(frame)}));
  document.getElementById('result').textContent = JSON.stringify(result);
};
"""


def chromium() -> str:
    """The browser's program; skips the test if there is none."""
    for name in _NAMES:
        if found := shutil.which(name):
            return found
    pytest.skip(f"no browser: none of {', '.join(_NAMES)} is installed (Debian: apt install chromium)")


def look(pages: dict[str, str], folder: Path, widths: tuple[int, ...] = (1280, 400)) -> list[dict[str, Any]]:
    """For each page and width {"page", "width", "images": number, "problems": what is wrong}."""
    frames = "".join(
        f'<iframe title="{name}" style="width:{width}px;height:3000px;border:0" srcdoc="{html.escape(page)}"></iframe>'
        for name, page in pages.items()
        for width in widths
    )
    outer = folder / "frames.html"
    outer.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body>{frames}<pre id="result"></pre><script>{_SCRIPT}</script>',
        encoding="utf-8",
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    command = [chromium(), *flags, str(outer)]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout
    result = re.search(r'<pre id="result">(.+?)</pre>', dumped, re.DOTALL)
    assert result is not None, dumped[-2000:]
    found: list[dict[str, Any]] = json.loads(html.unescape(result[1]))
    return found
