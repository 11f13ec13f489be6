"""Seeded mutations of bytes, texts and nested settings."""

import copy

ODD_VALUES = (
    None,
    True,
    -1,
    0,
    2.5,
    10**9,
    -(10**18),
    float("nan"),
    float("inf"),
    "",
    "x",
    "../..",
    "\0",
    [],
    {},
    [[]],
)
ODD_NUMBERS = (b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\0\0\0\0")
ODD_CELLS = (
    "",
    "nan",
    "inf",
    "-1",
    "1e50",
    "x",
    "../../etc/passwd",
    "\0",
    "é",
    '"',
    ",",
    ";",
    "\n",
    "9" * 400,
    "/",
    ".",
)


def mutate_bytes(content, rng):
    """One to four changes: flipped, removed, repeated or overwritten bytes, or a cut end."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        # most of what can go wrong is in the header
        end = min(len(content), 400) if rng.random() < 0.7 else len(content)
        at, length = rng.randrange(end + 1), rng.randint(1, 16)
        change = rng.randrange(5)
        if change == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            del content[at : at + length]
        elif change == 2:
            content[at:at] = content[at : at + length]
        elif change == 3:
            value = rng.choice(ODD_NUMBERS)
            content[at : at + len(value)] = value
        elif rng.random() < 0.5:
            del content[rng.randrange(len(content) + 1) :]
    return bytes(content)


def mutate_text(text, rng):
    """One to four changes: a cell replaced, a line removed or repeated, or the text cut."""
    lines = text.split("\n")
    for _ in range(rng.randint(1, 4)):
        at, change = rng.randrange(len(lines)), rng.randrange(5)
        if change <= 1:
            cells = lines[at].split(",")
            cells[rng.randrange(len(cells))] = rng.choice(ODD_CELLS)
            lines[at] = ",".join(cells)
        elif change == 2:
            lines.insert(at, lines[at])
        elif change == 3 and len(lines) > 1:
            del lines[at]
        else:
            lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
    return "\n".join(lines)


def mutate_values(values, rng):
    """A copy of nested dicts and lists with one to three values replaced, removed or moved to another key."""
    values = copy.deepcopy(values)
    for _ in range(rng.randint(1, 3)):
        containers = list(_containers(values))
        if not containers:
            return values
        container = rng.choice(containers)
        key = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
        change = rng.randrange(6)
        if change == 0:
            del container[key]
        elif change == 1 and isinstance(container, dict):
            container[rng.choice(["x", "name", f"{key}s"])] = container.pop(key)
        else:
            container[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return values


def _containers(values):
    """Every dict and list in nested values that is not empty."""
    if isinstance(values, dict | list) and values:
        yield values
        for value in values.values() if isinstance(values, dict) else values:
            yield from _containers(value)
