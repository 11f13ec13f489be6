"""Rows that name several findings each: the class of a row, and the names of the classes."""

from collections.abc import Iterable, Mapping, Sequence


def match_names(names: Sequence[str], choices: Iterable[str], aliases: Mapping[str, str] | None = None) -> list[str]:
    """Names in any case -> the same names as spelled in `choices`.

    Args:
        aliases: {name in lower case: name in `choices`}.

    Raises:
        ValueError: a single text in place of a list, or a name that is not among `choices`.
    """
    if isinstance(names, str):
        raise ValueError(f"expected a list of class names, got the text {names!r}")
    choices = list(choices)
    spelling = {choice.lower(): choice for choice in choices} | dict(aliases or {})
    unknown = [name for name in names if str(name).lower() not in spelling]
    if unknown:
        listing = ", ".join(choices)
        listing = listing if len(listing) <= 600 else f"{listing[:597]}..."
        raise ValueError(f"unknown class {unknown[0]!r}, expected some of {listing}")
    return [spelling[str(name).lower()] for name in names]


def check_other(other: bool, classes: Sequence[str] | None) -> None:
    """Raise ValueError for `other` without `classes`: all findings, or all images, are then one class."""
    if other and classes is None:
        raise ValueError("expected `classes` beside `other`, got none")


def class_id(findings: Iterable[str], classes: Sequence[str], *, healthy: bool, other: bool) -> int:
    """Class of a row: 1.. for the first of `classes` among its findings, 0 if healthy, -1 for rows to leave out.

    Args:
        findings: names of all findings of the row.
        healthy: whether the row is labelled as healthy; any finding takes precedence.
        other: whether a row with other findings only gets the class after the last of `classes`.
    """
    findings = set(findings)
    named = [i for i, name in enumerate(classes, start=1) if name in findings]
    if named:
        return named[0]
    if healthy and not findings:
        return 0
    return len(classes) + 1 if other and findings else -1


def class_names(classes: Sequence[str], other: bool) -> list[str]:
    """["healthy", the classes in lower case, and "other finding" if `other`]."""
    return ["healthy", *(name.lower() for name in classes), *(["other finding"] if other else [])]
