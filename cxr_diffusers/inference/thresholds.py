"""The threshold of a map: a map value, or a quantile of the maps of healthy images."""

HEALTHY = "healthy:"


def parse_threshold(threshold: float | str) -> tuple[float | None, float | None]:
    """(value, None) of a map value such as 0.03 or "0.03"; (None, quantile) of a quantile such as "healthy:0.99".

    Raises:
        ValueError: neither, a value outside (0, 1), or a quantile outside [0, 1].
    """
    text = str(threshold)
    is_quantile = text.startswith(HEALTHY)
    try:
        number = float(text.removeprefix(HEALTHY))
    except ValueError:
        raise ValueError(
            f"expected `threshold` as a map value such as 0.03, or as a quantile of healthy images such as "
            f"{HEALTHY}0.99, got {threshold!r}"
        ) from None
    if is_quantile and not 0 <= number <= 1:
        raise ValueError(f"expected a quantile from 0 to 1 after `{HEALTHY}`, got {threshold!r}")
    if not is_quantile and not 0 < number < 1:
        raise ValueError(f"expected `threshold` between 0 and 1, got {threshold!r}")
    return (None, number) if is_quantile else (number, None)


def describe_threshold(value: float, quantile: float | None) -> str:
    """The map value and the quantile that gave it, such as "0.0312 (healthy 99% quantile)"."""
    return f"{value:g}" if quantile is None else f"{value:.3g} (healthy {100 * quantile:g}% quantile)"
