"""scripts/shared/texts.py: the packaged text."""

import hashlib
import sys

from scripts.shared import texts


def test_the_packaged_text_is_pinned_and_long_enough():
    text = texts.read_text(None)
    assert "Objects, values and types" in text.text and len(text.text) > 40_000
    assert text.sha256 == hashlib.sha256(text.text.encode()).hexdigest()
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in text.source
