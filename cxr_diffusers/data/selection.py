"""Which rows of a table make a data set: by patient, per class, and the same on every machine."""

import hashlib
from typing import TypedDict

import pandas as pd


class Selection(TypedDict, total=False):
    """The keywords of `select_rows`, as loaders take them."""

    per_class: int | None
    seed: int
    one_per_patient: bool
    holdout: float
    part: str
    holdout_seed: int


def lottery(seed: int | str, key: str) -> float:
    """A number in [0, 1) that depends on `seed` and `key` alone: not on the machine, the library or the other rows.

    >>> round(lottery(0, "patient00001"), 6) == round(lottery(0, "patient00001"), 6)
    True
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8]) / 2**64


def select_rows(
    table: pd.DataFrame,
    *,
    per_class: int | None = None,
    seed: int = 0,
    one_per_patient: bool = False,
    holdout: float = 0.0,
    part: str = "train",
    holdout_seed: int = 0,
) -> pd.DataFrame:
    """Rows of a table (columns label, patient, key) -> those asked for, in the table's order.

    Of several rows of one image (the same `key`) with one label, the first counts.

    Args:
        per_class: at most so many rows of each class, drawn by `seed` and the row's `key`; None keeps all.
        one_per_patient: one row of each patient, drawn likewise, before `per_class`.
        holdout: share of the *patients* that is set aside; `part` "train" gives the others, "holdout" them. Who is set
            aside depends on `holdout_seed` and the patient's name alone, so the two parts never share a patient, also
            when `seed`, `per_class` or the classes differ between the two calls.

    Raises:
        ValueError: an option that is not as said above, a part of the patients without any, or rows of one image with
            different labels.
    """
    if part not in ("train", "holdout"):
        raise ValueError(f"expected `part` train or holdout, got {part!r}")
    if not 0 <= holdout < 1:
        raise ValueError(f"expected `holdout`, a share of the patients, in [0, 1), got {holdout}")
    if part == "holdout" and not holdout:
        raise ValueError("`part='holdout'` is empty with `holdout=0`: give the share of patients, for example 0.1")
    if per_class is not None and per_class < 1:
        raise ValueError(f"expected `per_class` of 1 or more, or none, got {per_class}")
    table = one_row_each(table)
    if holdout:
        # patients, not images, are split: two views of one chest must not sit on both sides
        aside = {p: lottery(f"holdout {holdout_seed}", p) < holdout for p in table["patient"].unique()}
        table = table[table["patient"].map(aside).astype(bool) == (part == "holdout")]
        if aside and table.empty:
            raise ValueError(
                f"the data set is empty: holdout={holdout:g} puts none of {len(aside)} patients into part={part}; give "
                "another `holdout` or `holdout_seed`"
            )
    if per_class is None and not one_per_patient:
        return table
    order = table["key"].map(lambda key: lottery(seed, key)).sort_values(kind="stable").index
    drawn = table.loc[order]
    if one_per_patient:
        drawn = drawn.drop_duplicates("patient")
    if per_class is not None:
        drawn = drawn.groupby("label", sort=False).head(per_class)
    return drawn.sort_index()


def one_row_each(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of a table (columns label, key) -> the first of each key; ValueError where a key has different labels."""
    again = table["key"].duplicated()
    if not again.any():
        return table
    first = table[~again].set_index("key")["label"]
    for key, label in table.loc[again, ["key", "label"]].itertuples(index=False):
        if label != first[key]:
            raise ValueError(f"expected one label an image, got the classes {first[key]} and {label} for {key}")
    return table[~again]
