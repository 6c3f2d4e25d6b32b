"""Image sizes: the forms in which a user may give one, and what they mean for an image."""

from collections.abc import Mapping, Sequence
from typing import Any

from cdetr_fast.common.validation import refuse

DEFAULT_LONGEST_EDGE = 1333

_FORMS = (
    {"shortest_edge", "longest_edge"},
    {"shortest_edge"},
    {"longest_edge"},
    {"height", "width"},
    {"max_height", "max_width"},
)


def check_size(name: str, value: Any, max_size: int | None = None) -> dict[str, int]:
    """Brings a size into its dictionary form.

    Args:
        name: Name of the argument in error messages.
        value: A dictionary in one of the forms of `resized_hw`; (height, width); or the shortest
            edge.
        max_size: Longest edge for an integer `value`, or for one with a shortest edge alone.

    Raises:
        ValueError: `value` has none of these forms.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"shortest_edge": value, "longest_edge": max_size or DEFAULT_LONGEST_EDGE}
    elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    elif not isinstance(value, Mapping):
        # transformers' SizeDict is no Mapping: iterating it gives (name, value) pairs.
        try:
            value = dict(value)
        except (TypeError, ValueError):
            refuse(name, "a dict, (height, width) or an integer", value)
    size = {key: edge for key, edge in value.items() if edge is not None}
    if set(size) == {"shortest_edge"} and max_size is not None:
        size["longest_edge"] = max_size
    if set(size) not in _FORMS:
        refuse(name, "keys " + " or ".join(str(sorted(form)) for form in _FORMS), size)
    for edge in size.values():
        if isinstance(edge, bool) or not isinstance(edge, int) or edge < 1:
            refuse(name, "positive integers", size)
    return size


def check_pad_size(name: str, value: Any) -> dict[str, int]:
    """Brings the size of a padded batch into the form {"height", "width"}; an integer is both."""
    if isinstance(value, int):
        value = (value, value)
    size = check_size(name, value)
    if set(size) != {"height", "width"}:
        refuse(name, "keys ['height', 'width']", size)
    return size


def resized_hw(height: int, width: int, size: Mapping[str, int]) -> tuple[int, int]:
    """Returns the height and width to which an image is resized.

    - {"shortest_edge": s, "longest_edge": l}: shortest edge s, or less if the longest would exceed
      l.
    - {"shortest_edge": s} or {"longest_edge": l}: that edge exactly (transformers refuses these
      two).
    - {"max_height", "max_width"}: as large as fits in there.
    - {"height", "width"}: exactly so; the aspect ratio changes.

    Fractions are cut off as in transformers, whose sizes these equal. An edge is never below 1.
    """
    if "height" in size:
        return size["height"], size["width"]
    if "max_height" in size:
        scale = min(size["max_height"] / height, size["max_width"] / width)
        return max(1, int(height * scale)), max(1, int(width * scale))

    short, long = min(height, width), max(height, width)
    if "shortest_edge" not in size:
        new_short, new_long = int(size["longest_edge"] * short / long), size["longest_edge"]
    else:
        wanted = new_short = size["shortest_edge"]
        longest = size.get("longest_edge")
        if longest is not None and long / short * wanted > longest:
            # The unrounded edge gives the longest one, so that it does not exceed its limit.
            wanted = longest * short / long
            new_short = round(wanted)
        if new_short == short:
            return height, width
        new_long = int(wanted * long / short)
    new_short, new_long = max(1, new_short), max(1, new_long)
    return (new_long, new_short) if width < height else (new_short, new_long)
