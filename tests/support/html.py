"""Pages as a browser sees them: what is inside which element, and what they would load."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

VOID = {"meta", "br", "input", "link", "img", "base", "hr"}
SHAPES = {"use", "image", "line", "rect", "circle", "path"}
LOADS = re.compile(r"url\(|@import|https?:|//[a-z]|\bfetch\b|XMLHttpRequest|\bimport\(")


class Page(HTMLParser):
    """A page that is well-formed; `texts` has the text of each element, by tag."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.texts, self.tags, self.elements = [], {}, [], []
        self.feed(html)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, []))

    def handle_startendtag(self, tag, attrs):
        assert tag in SHAPES, tag
        self.tags.append(tag)
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        opened, parts = self.open.pop()
        assert opened == tag, f"<{opened}> ends with </{tag}>"
        self.texts.setdefault(tag, []).append(" ".join("".join(parts).split()))

    def handle_data(self, data):
        for _, parts in self.open:
            parts.append(data)

    def of(self, tag):
        """The attributes of all elements of a tag."""
        return [attributes for name, attributes in self.elements if name == tag]


def mask_levels(page, number, size):
    """The masks of a picture of a page as uint8 arrays: 0 outside, 1 inside, 2 on the edge.

    Args:
        page: The page.
        number: Of the picture, in the order of the page.
        size: Width and height of the picture in units.
    """
    pictures = []
    for tag, attributes in page.elements:
        if tag == "svg" and attributes.get("class") == "picture":
            pictures.append([])
        target = attributes.get("href", "")
        if tag == "image" and target.startswith("data:image/png;base64,"):
            drawn = Image.open(io.BytesIO(base64.b64decode(target.partition(",")[2])))
            left, top, width, height = (
                round(float(attributes[k])) for k in ("x", "y", "width", "height")
            )
            assert drawn.size == (width, height)
            whole = np.zeros((size[1], size[0]), np.uint8)
            whole[top : top + height, left : left + width] = np.asarray(drawn)
            pictures[-1].append(whole)
    return pictures[number]


def read_page(path):
    """Read a page; fails if it is not well-formed, or loads something."""
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "data", "poster", "background"):
            assert name not in attributes, (tag, name)
        assert not any(name.startswith("on") for name in attributes), attributes
        target = attributes.get("href", "")
        if tag != "a":
            inside = ("data:image/jpeg;base64,", "data:image/png;base64,", "#")
            assert target.startswith(inside) or not target, target[:60]
    assert not {"link", "iframe", "object", "embed", "base", "img"} & set(page.tags)
    for part in page.texts["style"] + page.texts["script"]:
        assert not LOADS.search(part), LOADS.search(part)
    return page
