"""Render every style to 64 px RGB on white, one array file a style."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from assets.sources import Reader, reader

SIZE = 64
PRETRAIN_STYLES = ("noto", "twemoji", "fluent_flat", "fxemoji")
HELD_OUT_STYLES = ("openmoji_color", "openmoji_black", "fluent_3d", "fluent_high_contrast")
# Every concept has a picture in each of these; FxEmoji, drawn in 2013, only has about half of them.
COMPLETE_STYLES = tuple(style for style in (*PRETRAIN_STYLES, *HELD_OUT_STYLES) if style != "fxemoji")


def key_of(hexcode: str) -> str:
    """Return the code point sequence as packages agree on it: lower case, zero-padded, without variation selectors.

    >>> key_of("2764-FE0F"), key_of("a9-fe0f")
    ('2764', '00a9')
    """
    return "-".join(part.zfill(4) for part in hexcode.lower().split("-") if part != "fe0f")


def _on_white(image: Image.Image) -> np.ndarray:
    image = image.convert("RGBA")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    return np.asarray(canvas.convert("RGB"))


def _svg(text: str) -> np.ndarray:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=text, width=SIZE, height=SIZE, background="white")
    return _on_white(Image.open(io.BytesIO(bytes(png))))


def _iconify(icons: dict[str, Any], name: str) -> np.ndarray:
    alias = icons.get("aliases", {}).get(name, {})
    icon = icons["icons"][alias.get("parent", name)]
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    left, top = icon.get("left", 0), icon.get("top", 0)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{left} {top} '
    picture = _svg(f'{head}{width} {height}">{icon["body"]}</svg>')
    return picture[:, ::-1] if alias.get("hFlip") else picture


def _fxemoji_names(icons: dict[str, Any], emojibase: Reader) -> dict[str, str]:
    """Map hexcodes to FxEmoji icons by name, as that package carries no code points; ambiguous names are dropped."""
    candidates: dict[str, set[str]] = {}

    def add(hexcode: str, name: str) -> None:
        candidates.setdefault(re.sub(r"[^a-z0-9]", "", name.lower()), set()).add(hexcode)

    for hexcode, name in emojibase.json("meta/unicode-names.json").items():
        add(hexcode, name)
        add(hexcode, re.sub(r"\b(sign|symbol|face|with|the|of)\b", "", name.lower()))
    for entry in emojibase.json("en/data.json"):
        add(entry["hexcode"], entry["label"])
    for table in ("iamcal", "cldr", "github", "joypixels", "emojibase"):
        for hexcode, names in emojibase.json(f"en/shortcodes/{table}.json").items():
            for name in [names] if isinstance(names, str) else names:
                add(hexcode, name)
    found: dict[str, str] = {}
    for name in icons["icons"]:
        codes = {key_of(code) for code in candidates.get(re.sub(r"[^a-z0-9]", "", name), set())}
        if len(codes) == 1:
            found.setdefault(codes.pop(), name)
    return found


def _pictures(style: str, archives: Path) -> Iterator[tuple[str, np.ndarray]]:
    if style in ("noto", "twemoji"):
        folder = {"noto": "img/google/64/", "twemoji": "img/twitter/64/"}[style]
        for code, data in reader(archives, style).read_all(folder, ".png").items():
            yield code, _on_white(Image.open(io.BytesIO(data)))
    elif style == "fluent_3d":
        for code, data in reader(archives, style).read_all("assets/", ".webp").items():
            yield code, _on_white(Image.open(io.BytesIO(data)))
    elif style.startswith("openmoji"):
        folder = style.removeprefix("openmoji_")
        for code, data in reader(archives, "openmoji").read_all(f"{folder}/svg/", ".svg").items():
            yield code, _svg(data.decode())
    else:
        package = reader(archives, style)
        icons = package.json("icons.json")
        names = package.json("chars.json") or _fxemoji_names(icons, reader(archives, "emojibase"))
        for code, name in names.items():
            yield code, _iconify(icons, name)


def render(archives: Path, work: Path, wanted: set[str]) -> None:
    """Write ``<work>/<style>.npz`` with ``keys`` and ``images`` (N, 64, 64, 3) uint8 for every style.

    Args:
        archives: Folder of the pinned archives.
        work: Folder for results.
        wanted: Keys of the emoji worth rendering; the rest (skin tones, flags) is left out.
    """
    for style in (*PRETRAIN_STYLES, *HELD_OUT_STYLES):
        pictures: dict[str, np.ndarray] = {}
        for code, picture in _pictures(style, archives):
            if key_of(code) in wanted:
                pictures.setdefault(key_of(code), picture)
        keys = sorted(pictures)
        np.savez_compressed(work / f"{style}.npz", keys=np.array(keys), images=np.stack([pictures[key] for key in keys]))
        print(f"{style}: {len(keys)} pictures")


def load_style(work: Path, style: str) -> dict[str, np.ndarray]:
    """Return the rendered pictures of one style by key, each (64, 64, 3) uint8."""
    with np.load(work / f"{style}.npz") as data:
        return dict(zip(data["keys"].tolist(), data["images"], strict=True))
