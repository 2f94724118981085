"""Values as plain JSON trees and back, and the envelope around every stored record.

`encode` and `decode` are one codec for all backends. What JSON has no word for becomes an object with a
single key that begins with `@`; a user's own object of that shape is wrapped, so nothing is mistaken for
a tag. The keys of a user's objects are never changed.

`seal` and `unseal` are the text form of a record, which a person can read in an editor. Its last line is
a CRC-32 of every byte before it, so no byte of a record, its key or its revision changes unnoticed.
"""

from __future__ import annotations

import contextlib
import json
import math
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable
from datetime import UTC, datetime
from enum import Enum
from functools import lru_cache
from numbers import Integral
from typing import Any, Final, NoReturn, TypeVar

import msgspec
import numpy as np

from backtest_kit.errors import Damaged, UserError
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.store import Key, Plain, Record

T = TypeVar("T")

SCHEMA_VERSION: Final = 1
"""Version of the envelope that this program writes, and the newest that it reads."""
MAX_DEPTH: Final = 100
"""How deep the objects and lists of a value may lie in each other."""

_LINE_END: Final = len(',"checksum":"01234567"}')
_TAG: Final = "@"
_WRAPPED: Final = "@object"
_INT_LIMIT: Final = 1 << 63


class NewerSchema(Damaged):
    """The record is sound, but was written by a newer version of this program. It is left where it is."""


def encode(value: object, path: str = "value") -> Plain:
    """`value` as a plain JSON tree, from which `decode` makes an equal value.

    Takes dicts with str keys, lists and tuples (which come back as lists), str, int of any size, float,
    bool, None, bytes, datetimes (a naive one is taken as UTC and comes back aware), enums (as their value),
    msgspec structs (as the dict that they encode to, under their own renaming) and single numpy numbers and
    truth values (as those of Python).

    Raises:
        UserError: something else is inside, or the nesting is deeper than `MAX_DEPTH`. The message names
            the place, beginning with `path`.
    """
    return _encode(value, path, 0)


def decode(plain: Plain) -> Any:
    """The value that `encode` made `plain` of.

    Raises:
        Damaged: a tag is unknown or its content is not what `encode` writes.
    """
    if isinstance(plain, list):
        return [decode(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if len(plain) == 1:
        (tag,) = plain
        if tag.startswith(_TAG):
            return _decode_tag(tag, plain[tag])
    return {name: decode(item) for name, item in plain.items()}


def decode_as(kind: type[T], plain: Plain) -> T:
    """The value of type `kind` that `encode` made `plain` of.

    Raises:
        Damaged: it is not such a value.
    """
    try:
        return msgspec.convert(decode(plain), kind)
    except msgspec.ValidationError as error:
        name = getattr(kind, "__name__", str(kind)).lstrip("_")
        raise Damaged(f"a record is not a {name}: {error}; `backtest-kit store get` shows it") from None


def dump_value(value: Plain) -> bytes:
    """A plain JSON tree as compact text: a copy that no later change of `value` reaches.

    Raises:
        UserError: it is not a plain JSON tree.
    """
    # Several times as fast as the strict encoder. It lets pass what no JSON is (NaN, dates, sets), but none of that
    # comes back as it was.
    with contextlib.suppress(TypeError, ValueError, OverflowError, RecursionError):
        text = msgspec.json.encode(value)
        if msgspec.json.decode(text) == value:
            return text
    try:
        return _ENCODER.encode(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the value is not a plain JSON tree, encode it first: {error}") from None


def dump_record(contract: Contract, record: Record, value: bytes | None = None) -> bytes:
    """A record with its envelope as compact JSON; `value` is that of the record if it is written out already."""
    fields = {
        "contract": contract.name,
        "key": dict(zip(contract.key_fields, record.key, strict=True)),
        "rev": record.rev,
        "when": record.when,
        "writtenAt": record.written_at,
        "removed": record.removed,
        "schemaVersion": record.schema_version,
    }
    text = dump_value(record.value) if value is None else value
    return msgspec.json.encode(fields)[:-1] + b',"value":' + text + b"}"


def seal(contract: Contract, record: Record) -> bytes:
    """The text form of a record: indented JSON that ends with the checksum of all before it.

    Raises:
        UserError: the value is not a plain JSON tree.
    """
    return seal_text(dump_record(contract, record))


def seal_text(dumped: bytes) -> bytes:
    """The text form of what `dump_record` returned."""
    head = msgspec.json.format(dumped, indent=2)[: -len(b"\n}")] + b",\n"
    return head + _checksum_line(head)


def unseal(contract: Contract, key: Key | None, data: bytes) -> Record:
    """The record in `data`, which must be one of `contract` under `key` (any key, if None).

    Raises:
        Damaged: the bytes are not what `seal` wrote for that contract and key; the message says in what.
        NewerSchema: they are, but of a newer version.
    """
    _verify_checksum(data)
    return open_envelope(contract, key, parse(data))


def unseal_head(contract: Contract, key: Key | None, data: bytes) -> Record:
    """As `unseal`, at a fraction of the cost, with None for the value: enough to decide about a write.

    Raises:
        Damaged, NewerSchema: as `unseal`.
    """
    _verify_checksum(data)
    # The fields of the envelope stand at two spaces, and text has no raw newline: this is the first of its kind.
    head, _, _ = data.partition(b',\n  "value": ')
    try:
        envelope = _ENVELOPE.decode(head + b',"value":null}')
    except msgspec.MsgspecError:
        return unseal(contract, key, data)
    if envelope.schema_version > SCHEMA_VERSION:
        return unseal(contract, key, data)
    return _identified(contract, key, envelope)


def seal_line(dumped: bytes) -> bytes:
    """The JSON object `dumped` as a line that ends with the checksum of all before it, which is its last field."""
    return b'%b,"checksum":"%08x"}\n' % (dumped[:-1], zlib.crc32(dumped[:-1]))


def unseal_line(line: bytes) -> bytes:
    """What `seal_line` made a line of, given with or without its newline.

    Raises:
        Damaged: the line is not whole.
    """
    text = line.rstrip(b"\n")
    head = text[:-_LINE_END]
    if text[-_LINE_END:] != b',"checksum":"%08x"}' % zlib.crc32(head):
        raise Damaged("the checksum of the line does not match: it was torn, changed on the disk or edited by hand")
    return head + b"}"


def unseal_record_line(contract: Contract, line: bytes) -> Record:
    """The record in a line that `seal_line` made of what `dump_record` returned.

    Raises:
        Damaged, NewerSchema: as `unseal`.
    """
    dumped = unseal_line(line)
    try:
        envelope = _ENVELOPE.decode(dumped)
    except msgspec.MsgspecError:
        return open_envelope(contract, None, parse(dumped))
    if envelope.schema_version > SCHEMA_VERSION:
        return open_envelope(contract, None, parse(dumped))
    return _identified(contract, None, envelope)


def reseal(contract: Contract, data: bytes) -> Record:
    """The record in `data` whatever its checksum says: for an operator who edited it by hand.

    Raises:
        Damaged: it is not a record of `contract`.
    """
    return open_envelope(contract, None, parse(data))


def parse(data: bytes) -> Any:
    """Strict JSON: UTF-8, no duplicate names, no `NaN` or `Infinity`.

    Raises:
        Damaged: `data` is not that.
    """
    try:
        return _DECODER.decode(data.decode())
    except RecursionError:
        raise Damaged("the JSON is nested too deep") from None
    except ValueError as error:
        raise Damaged(f"it is not JSON: {error}") from None


def _encode(value: object, path: str, depth: int) -> Plain:
    if value is None or value is True or value is False:
        return value
    encoder = _encoder_of(type(value))
    if encoder is None:
        raise UserError(
            f"{path} is a {type(value).__name__}, which cannot be stored: "
            "use dicts, lists, text, numbers, datetimes, bytes or structs"
        )
    if depth > MAX_DEPTH:
        raise UserError(f"{path[:120]} is nested more than {MAX_DEPTH} deep, or contains itself")
    return encoder(value, path, depth)


def _is_plain(value: object) -> bool:
    """Whether it is a scalar that stands for itself, as nearly all do."""
    kind = type(value)
    if kind is str:
        return value.isascii()  # type: ignore[attr-defined, no-any-return]
    if kind is float:
        return math.isfinite(value)  # type: ignore[arg-type]
    return value is None or kind is bool or (kind is int and -_INT_LIMIT <= value < _INT_LIMIT)  # type: ignore[operator]


def _encode_text(value: Any, path: str, depth: int) -> Plain:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{path} is {value[:40]!r}, which is not valid Unicode text") from None
    return str(value)


def _encode_int(value: Any, path: str, depth: int) -> Plain:
    number = int(value)
    # Hexadecimal, because Python refuses to turn more than 4300 decimal digits into a number.
    return number if -_INT_LIMIT <= number < _INT_LIMIT else {"@int": hex(number)}


def _encode_float(value: Any, path: str, depth: int) -> Plain:
    number = float(value)
    return number if math.isfinite(number) else {"@float": repr(number)}


def _encode_bool(value: Any, path: str, depth: int) -> Plain:
    return bool(value)


def _encode_datetime(value: Any, path: str, depth: int) -> Plain:
    return {"@datetime": (value if value.tzinfo else value.replace(tzinfo=UTC)).isoformat()}


def _encode_bytes(value: Any, path: str, depth: int) -> Plain:
    return {"@bytes": b64encode(value).decode()}


def _encode_list(value: Any, path: str, depth: int) -> Plain:
    return [_encode(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]


def _encode_dict(value: Any, path: str, depth: int) -> Plain:
    plain: dict[str, Plain] = {}
    for name, item in value.items():
        if not isinstance(name, str):
            raise UserError(f"{path} has the key {name!r}: keys are text, write {str(name)!r}")
        plain[str(_encode_text(name, f"a key of {path}", depth))] = (
            item if _is_plain(item) else _encode(item, f"{path}.{name}", depth + 1)
        )
    return _wrapped(plain)


def _wrapped(plain: dict[str, Plain]) -> Plain:
    """As it is, or where it looks like a tag, inside of one."""
    if len(plain) == 1 and next(iter(plain)).startswith(_TAG):
        return {_WRAPPED: plain}
    return plain


def _encode_struct(value: Any, path: str, depth: int) -> Plain:
    kind = type(value)
    config = kind.__struct_config__
    plain: dict[str, Plain] = {} if config.tag is None else {config.tag_field: config.tag}
    for name, renamed in zip(kind.__struct_fields__, kind.__struct_encode_fields__, strict=True):
        item = getattr(value, name)
        if _is_plain(item):
            plain[renamed] = item
        elif item is not msgspec.UNSET:
            plain[renamed] = _encode(item, f"{path}.{renamed}", depth + 1)
    return _wrapped(plain)


def _encode_enum(value: Any, path: str, depth: int) -> Plain:
    return _encode(value.value, path, depth)


_ENCODERS: Final[dict[type, Callable[[Any, str, int], Plain]]] = {
    Enum: _encode_enum,
    str: _encode_text,
    Integral: _encode_int,
    float: _encode_float,
    np.float32: _encode_float,
    np.float16: _encode_float,
    np.bool_: _encode_bool,
    dict: _encode_dict,
    list: _encode_list,
    tuple: _encode_list,
    datetime: _encode_datetime,
    bytes: _encode_bytes,
    bytearray: _encode_bytes,
    msgspec.Struct: _encode_struct,
    int: _encode_int,
}
_BASES: Final = tuple(_ENCODERS)


def _find_encoder(kind: type) -> Callable[[Any, str, int], Plain] | None:
    return _ENCODERS.get(kind) or next((_ENCODERS[base] for base in _BASES if issubclass(kind, base)), None)


_encoder_of: Final[Callable[[type], Callable[[Any, str, int], Plain] | None]] = lru_cache(maxsize=1024)(_find_encoder)
"""Its own, or that of the first base: found once for each type, because a state has hundreds of structs."""


def _decode_tag(tag: str, content: Plain) -> Any:
    if tag == _WRAPPED and isinstance(content, dict):
        return {name: decode(item) for name, item in content.items()}
    decoder = _DECODERS.get(tag)
    if decoder is None or not isinstance(content, str):
        raise Damaged(f"a value has the tag {tag!r} around {str(content)[:40]!r}, which this version does not know")
    try:
        return decoder(content)
    except ValueError as error:
        raise Damaged(f"a value has the tag {tag!r} around {content[:40]!r}: {error}") from None


def _decode_float(content: str) -> float:
    number = float(content)
    if math.isfinite(number):
        raise ValueError("a finite number needs no tag")
    return number


_DECODERS: Final[dict[str, Callable[[str], Any]]] = {
    "@int": lambda content: int(content, 16),
    "@float": _decode_float,
    "@datetime": datetime.fromisoformat,
    "@bytes": lambda content: b64decode(content, validate=True),
}


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return fields


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"))


def _verify_checksum(data: bytes) -> None:
    mark = data.rfind(b'  "checksum"')
    if mark < 0 or data[mark:] != _checksum_line(data[:mark]):
        raise Damaged("the checksum does not match: the file was cut, changed on the disk or edited by hand")


def _checksum_line(head: bytes) -> bytes:
    return b'  "checksum": "%08x"\n}\n' % zlib.crc32(head)


class _Envelope(msgspec.Struct, rename="camel"):
    contract: str
    key: dict[str, str | int | bool]
    rev: int
    when: int | None
    written_at: int
    removed: bool
    schema_version: int
    value: Any


_ENVELOPE: Final = msgspec.json.Decoder(_Envelope)


def open_envelope(contract: Contract, key: Key | None, fields: Any) -> Record:
    """The record in parsed JSON. Raises as `unseal`, but knows of no checksum."""
    version = fields.get("schemaVersion") if isinstance(fields, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise NewerSchema(
            f"it was written by a newer version of this program (schema {version}, this one reads up to "
            f"{SCHEMA_VERSION}): upgrade, the record is untouched"
        )
    try:
        envelope = msgspec.convert(fields, _Envelope)
    except msgspec.ValidationError as error:
        raise Damaged(f"it has no envelope: {error}") from None
    return _identified(contract, key, envelope)


def _identified(contract: Contract, key: Key | None, envelope: _Envelope) -> Record:
    found = tuple(envelope.key.values())
    if envelope.contract != contract.name or tuple(envelope.key) != contract.key_fields:
        raise Damaged(f"it is a record of {envelope.contract}, found where one of {contract.name} belongs")
    if key is not None and found != key:
        raise Damaged(f"it is the record of {found}, found where that of {key} belongs")
    return Record(
        key=found,
        value=envelope.value,
        rev=envelope.rev,
        when=envelope.when,
        written_at=envelope.written_at,
        removed=envelope.removed,
        schema_version=envelope.schema_version,
    )
