"""The definition as text: one form for one content."""

from __future__ import annotations

import json

from farpage.definition.model import Definition


def canonical_json(definition: Definition) -> str:
    """Return the one JSON text of this content, so that two stores can be compared byte for byte."""
    return json.dumps(definition.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


def same_content(one: Definition, other: Definition) -> bool:
    """Tell whether two documents say the same, whatever their revisions."""
    return one.model_copy(update={"revision": other.revision}) == other
