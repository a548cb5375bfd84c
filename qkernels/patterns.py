"""Patterns over qualified layer names: globs, or regular expressions behind "re:".

A glob must match the whole name (`*` crosses dots, case counts); so must a regular expression.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

__all__ = ["Pattern", "compile_patterns", "unmatched_message"]


class Pattern:
    """One compiled pattern.

    Raises:
        TypeError: the pattern is not a string.
        ValueError: it is empty, or a regular expression that does not compile.
    """

    def __init__(self, text: str, argument: str) -> None:
        if not isinstance(text, str):
            raise TypeError(f"{argument}: expected patterns as strings, got {type(text).__name__}")
        if not text or text == "re:":
            raise ValueError(f"{argument}: expected a glob or 're:' and a regular expression, got {text!r}")
        self.text = text
        self.argument = argument
        try:
            self._regex = re.compile(text[3:] if text.startswith("re:") else fnmatch.translate(text))
        except re.error as error:
            raise ValueError(f"{argument}: {text!r} is not a valid regular expression: {error}") from error

    def matches(self, names: Iterable[str]) -> bool:
        """Whether one of `names` (a shared layer has several) matches."""
        return any(self._regex.fullmatch(name) for name in names)


def compile_patterns(texts: Iterable[str] | None, argument: str) -> list[Pattern]:
    """All patterns of one argument; None gives none. Raises as `Pattern` does, and TypeError for a bare string."""
    if texts is None:
        return []
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
        raise TypeError(f"{argument}: expected a sequence of patterns such as ('*.query',), got {texts!r}")
    return [Pattern(text, argument) for text in texts]


def unmatched_message(pattern: Pattern, layers: Sequence[str], modules: Sequence[str]) -> str:
    """What to say about a pattern that matched no layer, with the likeliest remedy."""
    message = f"{pattern.argument}: the pattern {pattern.text!r} matches no layer"
    if pattern.text in modules and not pattern.text.startswith("re:"):
        return f"{message}; it names a container, write {pattern.text + '.*'!r} for the layers in it"
    close = difflib.get_close_matches(pattern.text, layers, n=3, cutoff=0.5) or list(layers[:3])
    hint = f"; layers are called, for example, {', '.join(map(repr, close))}" if close else "; the model has no layers"
    return f"{message}{hint} (strict=False ignores it)"
