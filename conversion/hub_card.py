# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
A card that is uploaded over another: what the converter did not write is kept. A comment at the end of each card that
it writes holds digests of its front matter and of its text, by which a later upload sees whether they were edited.
"""

import hashlib
import json
import re
from typing import Any

from huggingface_hub import RepoCard
from yaml import YAMLError


SEAL = re.compile(r"\n*<!-- convert_weights\.py ([0-9a-f]{16}) ([0-9a-f]{16}) -->\s*$")


def sealed(content: str) -> str:
    """The card with the comment that says that the converter wrote it."""
    card = RepoCard(SEAL.sub("", content) + "\n")
    return f"{str(card).rstrip()}\n\n<!-- convert_weights.py {digest(card.data.to_dict())} {digest(card.text)} -->\n"


def digest(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256("\n".join(text.split()).encode()).hexdigest()[:16]


def is_untouched(content: str) -> tuple[bool, bool]:
    """Whether the converter wrote the front matter, and the text, as they are."""
    seal = SEAL.search(content)
    if seal is None:
        return False, False
    try:
        card = RepoCard(content[: seal.start()] + "\n")
    except (ValueError, RecursionError, YAMLError):
        return False, False
    return seal[1] == digest(card.data.to_dict()), seal[2] == digest(card.text)


def card_for(content: str, repo_id: str) -> str:
    """The converter's card with a usage example for `repo_id`."""
    changed = re.sub(r'^model_id = ".*"$', f'model_id = "{repo_id}"', content, flags=re.M)
    return sealed(changed) if all(is_untouched(content)) else changed


def merged_card(present: str, new: str) -> tuple[str, bool]:
    """
    The card to upload where `present` is there: its text and the fields of its front matter are kept as far as the
    converter did not write them, and fields that it lacks come from `new`.

    Returns:
        `tuple[str, bool]`: The card, and whether it has the text of `present`.
    """
    own_fields, own_text = is_untouched(present)
    if own_fields and own_text:
        return new, False
    try:
        old, card = RepoCard(present), RepoCard(new)
    except (ValueError, RecursionError, YAMLError):
        # Fields cannot be added to a front matter that is no YAML.
        return present, True
    kept = {} if own_fields else old.data.to_dict()
    fields = card.data.to_dict() | kept
    if isinstance(kept.get("tags"), list):
        fields["tags"] = [*kept["tags"], *(x for x in card.data.to_dict().get("tags", []) if x not in kept["tags"])]
    if not own_text and fields == old.data.to_dict():
        return present, True
    base = card if own_text else old
    for name, value in fields.items():
        base.data[name] = value
    return str(base), not own_text
