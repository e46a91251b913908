"""Files damaged at random, for the tests that what is read is right or refused: bytes and JSON."""

import json

PIECES = [  # what is put between bytes
    b"\0",
    b"\xff\xfe",
    b"\xe2\x80\xa8",
    b"\xc2\x85",
    b"\n",
    b'"',
    b"{",
    b"]",
    b"NaN",
    b"1e400",
    b"9" * 400,
    b"\\ud800",
    b"\xe9",
]
VALUES = [  # what takes the place of a value
    None,
    True,
    0,
    -1,
    3.5,
    1e400,
    "",
    " ",
    "a\0b",
    "\u2028",
    "f.npz",
    ".",
    [],
    {},
    [[0, 0, 42, 31]],
    [-1, 0, 9, 9],
]
VALUES += [[[0, 0, 41, 31]], [39.9, 0, 40.9, 9], {"a": 2}, {"A": 0.9, "a.": 0.9}, "test", 10**30, ["a.png"], "\ud83d"]


def damage_bytes(rng, content):
    """Bytes changed, put in, taken out or cut off, at one to four random places."""
    content = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        i = int(rng.integers(len(content) + 1))
        end = i + int(rng.integers(1, 40))
        how = rng.integers(5)
        if how == 0:
            content[i : i + 1] = rng.bytes(1)
        elif how == 1:
            content[i:i] = PIECES[rng.integers(len(PIECES))]
        elif how == 2:
            del content[i:end]
        elif how == 3:
            content[i:i] = content[i:end]
        elif len(content) > 1:
            content = content[: i + 1]
    return bytes(content)


def damage_json(rng, record):
    """A JSON object with one value changed, taken out, or under another key, at any depth; as bytes."""
    record = json.loads(json.dumps(record))
    place = record
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = keys[rng.integers(len(keys))]
        if not isinstance(place[key], dict | list) or len(place[key]) == 0 or rng.random() < 0.5:
            break
        place = place[key]
    how = rng.random()
    if how < 0.6:
        place[key] = VALUES[rng.integers(len(VALUES))]
    elif how < 0.8:
        del place[key]
    elif isinstance(place, dict):
        place[f"{key}s"] = place.pop(key)
    return json.dumps(record).encode()
