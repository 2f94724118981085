"""Keys as file names: reversible, readable for ordinary names, and never two keys on one path.

Every component of a key becomes one name that means the same on every file system, also on those that
fold case, normalise Unicode or reserve names:

- letters, digits and `_ - + = , @ ( )` stay; a dot stays inside a name, not at its ends; whatever else
  is written as the `%XX` of its UTF-8 bytes, so `BTC/USDT` is `BTC%2FUSDT`. Nothing outside ASCII is
  left, hence no two forms of one accent;
- the empty component is `%`, and a device name of Windows has its first letter escaped;
- a `symbol` is expected in capitals and every other component in small letters. A component with letters
  of the other case has a mark at its end, `~` and the positions of those letters as a number in base 36,
  so that `btcusdt`, `Btcusdt` and `BTCUSDT` differ where case does not count;
- a name above 180 bytes is cut and has a hash at its end. Such a name cannot be read back: the envelope
  of the record has the whole key.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Final
from urllib.parse import unquote_to_bytes

from backtest_kit.errors import UserError
from backtest_kit.persist.contracts import Contract

KeyPart = str | int | bool
Key = tuple[KeyPart, ...]
"""The components of a record's name, in the order of `Contract.key_fields`."""

MAX_NAME: Final = 180
"""Longest file name that a component may have, in bytes. Leaves room for a suffix below the usual 255."""

_EMPTY: Final = "%"
_CASE_MARK: Final = "~"
_HASH_MARK: Final = "~~"
_SAFE: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+=,@().")
_SMALL: Final = re.compile(r"[a-z0-9_\-+=,@()]{1,180}")
_CAPITALS: Final = re.compile(r"[A-Z0-9_\-+=,@()]{1,180}")
"""Names that stay as they are, which nearly all do."""
_BASE_36: Final = "0123456789abcdefghijklmnopqrstuvwxyz"
_DEVICES: Final = frozenset(
    ("con", "prn", "aux", "nul", *(f"com{n}" for n in range(10)), *(f"lpt{n}" for n in range(10)))
)
_TYPES: Final[dict[str, type]] = {"timestamp": int, "revision": int, "backtest": bool}
"""Of the fields that are not text."""
_MODES: Final = {True: "backtest", False: "live"}


def check_key(contract: Contract, key: Sequence[object], *, prefix: bool = False) -> Key:
    """`key` as a tuple, if it names a record of `contract` (or, with `prefix`, the beginning of one).

    Raises:
        UserError: a component is missing, too many, of the wrong type or not valid Unicode; it is named.
    """
    fields = contract.key_fields
    if len(key) > len(fields) or (len(key) < len(fields) and not prefix):
        raise UserError(f"a {contract.name} key is ({', '.join(fields)}): got {len(key)} components")
    for field, part in zip(fields, key, strict=False):
        expected = _TYPES.get(field, str)
        if type(part) is not expected:
            raise UserError(f"{contract.name} key: {field} is {part!r}, give a {expected.__name__}")
        if isinstance(part, str) and not part.isascii():
            try:
                part.encode()
            except UnicodeEncodeError:
                raise UserError(f"{contract.name} key: {field} is {part!r}, which is not valid Unicode") from None
    return tuple(part for part in key if isinstance(part, str | int))


def path_of(contract: Contract, key: Key) -> tuple[str, ...]:
    """One file name per component of a checked key or prefix; the last one has no suffix yet."""
    return tuple(escape(part, field) for field, part in zip(contract.key_fields, key, strict=False))


def escape(part: KeyPart, field: str) -> str:
    """The file name of one component of the key field called `field`."""
    if isinstance(part, bool):
        return _MODES[part]
    if isinstance(part, int):
        return str(part)
    if (_CAPITALS if field == "symbol" else _SMALL).fullmatch(part) and part.lower() not in _DEVICES:
        return part
    name = _mark_case(part, field, _escape_text(part))
    if len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(part.encode()).hexdigest()[:32]
    head = name[: MAX_NAME - len(digest) - len(_HASH_MARK)]
    return head + _HASH_MARK + digest


def unescape(name: str, field: str) -> KeyPart | None:
    """The component whose file name is `name`, or None if it was cut or no component is called so."""
    if field == "backtest":
        return next((mode for mode, text in _MODES.items() if text == name), None)
    if _TYPES.get(field) is int:
        return int(name) if name.isascii() and name.isdigit() else None
    text, _, _ = name.partition(_CASE_MARK)
    try:
        part = "" if text == _EMPTY else unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        return None
    return part if escape(part, field) == name else None


def _escape_text(text: str) -> str:
    if not text:
        return _EMPTY
    parts = [char if char in _SAFE else "".join(f"%{byte:02X}" for byte in char.encode()) for char in text]
    for end in (0, -1):
        if parts[end] == ".":
            parts[end] = "%2E"
    if text.partition(".")[0].lower() in _DEVICES:
        parts[0] = f"%{ord(text[0]):02X}"
    return "".join(parts)


def _mark_case(text: str, field: str, name: str) -> str:
    letters = [char for char in text if char.isascii() and char.isalpha()]
    unexpected = str.islower if field == "symbol" else str.isupper
    positions = sum(1 << index for index, char in enumerate(letters) if unexpected(char))
    return f"{name}{_CASE_MARK}{_base_36(positions)}" if positions else name


def _base_36(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = _BASE_36[digit] + digits
    return digits
