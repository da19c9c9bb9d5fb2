"""Text of data, models and names as a terminal or a log may show it: nothing in it moves the cursor, changes colours or
the direction of what follows, or hides."""

import unicodedata

UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
JOINERS = "\u200c\u200d"  # some scripts need them


def plain(text: str, keep: str = "") -> str:
    """The text in one line, with escapes for what would not be seen or would move what is: control, format and
    bidirectional characters, but for those to `keep`."""
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in UNSEEN and char not in JOINERS and char not in keep
        else char
        for char in text
    )


def lines(text: str) -> str:
    """The same, of several lines with tabs."""
    return plain(text, keep="\n\t")
