"""Thrift's compact protocol, read into plain values and written again, without knowing what they mean.

A struct is a dict of field number to `Field`. The specification is "Thrift compact protocol encoding" of Apache Thrift.
"""

from enum import IntEnum
from typing import Any, NamedTuple


class Type(IntEnum):
    TRUE = 1
    FALSE = 2
    BYTE = 3
    I16 = 4
    I32 = 5
    I64 = 6
    DOUBLE = 7
    BINARY = 8
    LIST = 9
    SET = 10
    MAP = 11
    STRUCT = 12


class Field(NamedTuple):
    type: Type
    value: Any


class Items(NamedTuple):
    """A list or a set."""

    type: Type
    values: list[Any]


Struct = dict[int, Field]

_LONG_LIST = 15


def read_struct(data: bytes) -> Struct:
    """Raises ValueError for what is not one whole struct."""
    reader = _Reader(data)
    try:
        found = reader.struct()
    except IndexError as error:
        raise ValueError("the struct is cut off") from error
    if reader.position != len(data):
        raise ValueError(f"{len(data) - reader.position} bytes follow the struct")
    return found


def write_struct(struct: Struct) -> bytes:
    """A struct in it may be the bytes that this made of it before."""
    out = bytearray()
    _write_struct(out, struct)
    return bytes(out)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def struct(self) -> Struct:
        fields: Struct = {}
        number = 0
        while header := self._byte():
            delta, type_ = header >> 4, Type(header & 15)
            number = number + delta if delta else self._zigzag()
            fields[number] = Field(type_, None if type_ in (Type.TRUE, Type.FALSE) else self._value(type_))
        return fields

    def _value(self, type_: Type) -> Any:
        match type_:
            case Type.TRUE | Type.FALSE | Type.BYTE:
                return self._byte()
            case Type.I16 | Type.I32 | Type.I64:
                return self._zigzag()
            case Type.DOUBLE:
                return self._bytes(8)
            case Type.BINARY:
                return self._bytes(self._varint())
            case Type.LIST | Type.SET:
                header = self._byte()
                size = header >> 4
                items = Type(header & 15)
                if size == _LONG_LIST:
                    size = self._varint()
                return Items(items, [self._value(items) for _ in range(size)])
            case Type.STRUCT:
                return self.struct()
            case Type.MAP:
                raise ValueError("a map is not expected here")

    def _byte(self) -> int:
        byte = self._data[self.position]
        self.position += 1
        return byte

    def _bytes(self, size: int) -> bytes:
        if len(self._data) - self.position < size:
            raise ValueError("the struct is cut off")
        self.position += size
        return self._data[self.position - size : self.position]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
        return value | byte << shift

    def _zigzag(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)


def _write_struct(out: bytearray, struct: Struct | bytes) -> None:
    if isinstance(struct, bytes):
        out += struct
        return
    last = 0
    for number, (type_, value) in sorted(struct.items()):
        if 0 < number - last < 16:
            out.append(number - last << 4 | type_)
        else:
            out.append(type_)
            _write_varint(out, _zigzag(number))
        last = number
        if type_ not in (Type.TRUE, Type.FALSE):
            _write(out, type_, value)
    out.append(0)


def _write(out: bytearray, type_: Type, value: Any) -> None:
    match type_:
        case Type.TRUE | Type.FALSE | Type.BYTE:
            out.append(value)
        case Type.I16 | Type.I32 | Type.I64:
            _write_varint(out, _zigzag(value))
        case Type.DOUBLE:
            out += value
        case Type.BINARY:
            _write_varint(out, len(value))
            out += value
        case Type.LIST | Type.SET:
            items, values = value
            if len(values) < _LONG_LIST:
                out.append(len(values) << 4 | items)
            else:
                out.append(_LONG_LIST << 4 | items)
                _write_varint(out, len(values))
            for each in values:
                _write(out, items, each)
        case Type.STRUCT:
            _write_struct(out, value)
        case Type.MAP:
            raise ValueError("a map is not expected here")


def _write_varint(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _zigzag(value: int) -> int:
    return value << 1 if value >= 0 else (-value << 1) - 1
