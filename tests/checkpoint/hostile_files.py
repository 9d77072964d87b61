"""Safetensors files that are sound, broken, or sound to the reference crate alone.

Each entry is one rule of the format (README "Format" and `safetensors/src/tensor.rs`), built
by hand so that nothing but the rule in question is broken.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from loftq_cli.checkpoint.safetensors import MAX_JSON_MARKS
from loftq_cli.formats import DTYPE_BITS


def file_bytes(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header text, claiming `length` for it."""
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: str = "U8", shape: Any = (2,), offsets: Any = (0, 2), **more: Any) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets, **more})


def one(text: str, data: bytes = b"ab") -> bytes:
    """A file with the single tensor `a`."""
    return file_bytes(f'{{"a":{text}}}', data)


def extra(value: str) -> bytes:
    """A tensor with a field nobody knows, which the format allows."""
    return one(f'{{"dtype":"U8","shape":[2],"data_offsets":[0,2],"x":{value}}}')


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


A = '"a":' + entry()
LEAST = one(entry())

SOUND = {
    "one tensor": LEAST,
    "no tensor": file_bytes("{}"),
    "spaces after the header": file_bytes("{" + A + "}     ", b"ab"),
    "other white space after it": file_bytes("{" + A + "}\n\r\t", b"ab"),
    "scalar": one(entry(shape=[], offsets=[0, 1]), b"a"),
    "tensor without elements": one(entry(shape=[3, 0], offsets=[0, 0]), b""),
    "empty tensors between others": file_bytes(
        f'{{{A},"b":{entry(shape=[0], offsets=[2, 2])},"c":{entry(offsets=[2, 4])}}}', b"abcd"
    ),
    "not in file order": file_bytes(f'{{"b":{entry(offsets=[2, 4])},{A}}}', b"abcd"),
    "a hundred thousand dimensions": one(entry(shape=[1] * 100_000 + [2])),
    "metadata": file_bytes('{"__metadata__":{"format":"pt"},' + A + "}", b"ab"),
    "metadata null": file_bytes('{"__metadata__":null,' + A + "}", b"ab"),
    "unknown field": extra("[1,{}]"),
    "unknown field with a long number": extra("1" * 300),
    "unknown field nested as deep as allowed": extra(nested(125)),
    "name empty": file_bytes(f'{{"":{entry()}}}', b"ab"),
    "name with escapes": file_bytes(f'{{"\\u0000\\ud83d\\ude00\\n":{entry()}}}', b"ab"),
    "name of ten kilobytes": file_bytes(f'{{"{"n" * 10_000}":{entry()}}}', b"ab"),
    "zero before an overflow": one(entry(shape=[0, 2**63, 2], offsets=[0, 0]), b""),
    "largest dimension": one(entry(shape=[0, 2**64 - 1], offsets=[0, 0]), b""),
    "two halves of a byte": one(entry("F4", [2, 1], [0, 1]), b"a"),
    "four times six bits": one(entry("F6_E3M2", [4], [0, 3]), b"abc"),
    **{
        f"dtype {dtype}": one(entry(dtype, [8], [0, bits]), b"\0" * bits)
        for dtype, bits in DTYPE_BITS.items()
    },
}

BROKEN = {
    # The length.
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "header empty": file_bytes(""),
    "header longer than the file": file_bytes("{}", length=100),
    "header longer than the limit": file_bytes("{}", length=100_000_001),
    "header of 2^63 bytes": file_bytes("{}", length=2**63),
    "header cut short": file_bytes("{" + A + "}", b"ab", length=20),
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 9\n",
    "web page": b"<!DOCTYPE html>\n<html><head><title>429 Too Many Requests</title></head></html>",
    "torch archive": b"PK\x03\x04\x00\x00\x08\x08\x00\x00\x00\x00archive/data.pkl",
    "legacy torch pickle": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.",
    # The text.
    "not UTF-8": file_bytes(b'{"\xe9":' + entry().encode() + b"}", b"ab"),
    "overlong UTF-8": file_bytes(b'{"\xc0\x80":' + entry().encode() + b"}", b"ab"),
    "surrogate in UTF-8": file_bytes(b'{"\xed\xa0\x80":' + entry().encode() + b"}", b"ab"),
    "half a surrogate pair": file_bytes(f'{{"\\ud800":{entry()}}}', b"ab"),
    "half a pair in an unknown field": extra('"\\udfff"'),
    "byte order mark": file_bytes("\ufeff{" + A + "}", b"ab"),
    "trailing NUL": file_bytes("{" + A + "}\0", b"ab"),
    "two objects": file_bytes("{}{}"),
    "a list": file_bytes("[]"),
    "a brace": file_bytes("{"),
    "trailing comma": file_bytes("{" + A + ",}", b"ab"),
    "comment": file_bytes("{/**/" + A + "}", b"ab"),
    "single quotes": file_bytes("{'a':" + entry() + "}", b"ab"),
    "control character in a name": file_bytes(f'{{"\x01":{entry()}}}', b"ab"),
    "bad escape": file_bytes(f'{{"\\x41":{entry()}}}', b"ab"),
    "NaN": extra("NaN"),
    "Infinity": extra("-Infinity"),
    "number out of range": extra("1e999"),
    "whole number out of range": extra("1" * 400),
    "leading zero": one(entry().replace("[2]", "[02]")),
    "nested deeper than allowed": extra(nested(126)),
    "nested very deeply": extra(nested(100_000)),
    "nothing but brackets": file_bytes("[" * 1_000_000),
    # The tensors.
    "null tensor": file_bytes('{"a":null}'),
    "tensor is a string": file_bytes('{"a":"b"}'),
    "tensor is a list too long": one('["U8",[2],[0,2],0]'),
    "no dtype": one('{"shape":[2],"data_offsets":[0,2]}'),
    "no shape": one('{"dtype":"U8","data_offsets":[0,2]}'),
    "no offsets": one('{"dtype":"U8","shape":[2]}'),
    "dtype twice": one('{"dtype":"U8","dtype":"U8","shape":[2],"data_offsets":[0,2]}'),
    "dtype unknown": one(entry("F8")),
    "dtype in small letters": one(entry("u8")),
    "dtype a number": one(entry(8)),  # type: ignore[arg-type]
    "shape null": one(entry(shape=None)),
    "shape a number": one(entry(shape=2)),
    "shape a float": one(entry(shape=[2.0])),
    "shape an exponent": one(entry().replace("[2]", "[2e0]")),
    "shape a string": one(entry(shape=["2"])),
    "shape a truth value": one(entry(shape=[True, 2])),
    "shape negative": one(entry(shape=[-2])),
    "shape minus zero": one(entry(shape=[0], offsets=[0, 0]).replace("[0]", "[-0]"), b""),
    "shape above 64 bits": one(entry(shape=[0, 2**64], offsets=[0, 0]), b""),
    "shape overflows": one(entry(shape=[2, 2**64 - 1])),
    "shape overflows before a zero": one(entry(shape=[2**63, 2, 0], offsets=[0, 0]), b""),
    "shape overflows in bits": one(entry("F64", [2**58], [0, 0]), b""),
    "one offset": one(entry(offsets=[0])),
    "three offsets": one(entry(offsets=[0, 2, 2])),
    "offset null": one(entry(offsets=[0, None])),
    "offset negative": one(entry(offsets=[-1, 1])),
    "offset above 64 bits": one(entry(offsets=[0, 2**64])),
    "offsets reversed": one(entry(shape=[0], offsets=[2, 0])),
    "end before start, empty tensor": file_bytes(
        f'{{{A},"c":{entry(shape=[0], offsets=[2, 1])}}}', b"ab"
    ),
    "shape too large for the offsets": one(entry(shape=[3])),
    "shape too small for the offsets": one(entry(shape=[1])),
    "dtype too large for the offsets": one(entry("F32")),
    "half a byte": one(entry("F4", [3], [0, 2])),
    "three times six bits": one(entry("F6_E2M3", [3], [0, 3]), b"abc"),
    "gap at the start": one(entry(offsets=[1, 3]), b"abc"),
    "gap between": file_bytes(f'{{{A},"b":{entry(offsets=[3, 5])}}}', b"abcde"),
    "overlap": file_bytes(f'{{{A},"b":{entry(offsets=[1, 3])}}}', b"abc"),
    "the same bytes twice": file_bytes(f'{{{A},"b":{entry()}}}', b"ab"),
    "empty tensor inside another": file_bytes(
        f'{{{A},"z":{entry(shape=[0], offsets=[1, 1])}}}', b"ab"
    ),
    "trailing bytes": one(entry(), b"abc"),
    "trailing bytes without a tensor": file_bytes("{}", b"x"),
    "data cut short": one(entry(), b"a"),
    "no data": one(entry(), b""),
    # The metadata.
    "metadata a list": file_bytes('{"__metadata__":[],' + A + "}", b"ab"),
    "metadata a tensor": file_bytes('{"__metadata__":' + entry() + "}", b"ab"),
    "metadata of numbers": file_bytes('{"__metadata__":{"a":1},' + A + "}", b"ab"),
    "metadata of nulls": file_bytes('{"__metadata__":{"a":null},' + A + "}", b"ab"),
    "metadata twice": file_bytes('{"__metadata__":{},"__metadata__":{},' + A + "}", b"ab"),
}

# Accepted by the crate and refused by us, with the argument.
STRICTER = {
    "space before the header": (
        file_bytes(" {" + A + "}", b"ab"),
        "the README: the header MUST begin with '{'; a reader that looks at byte 8 would differ",
    ),
    "tensor twice": (
        file_bytes(f'{{{A},"a":{entry("I8")}}}', b"ab"),
        "the README disallows duplicate keys; which one counts would depend on the reader",
    ),
    "metadata key twice": (
        file_bytes('{"__metadata__":{"format":"pt","format":"np"},' + A + "}", b"ab"),
        "the same",
    ),
    "unknown field twice": (extra('1,"x":2'), "the same"),
    "key twice in an unknown field": (extra('{"y":1,"y":2}'), "the same"),
    "tensor is a list": (
        one('["U8",[2],[0,2]]'),
        "serde reads a struct from a list too; the README and every writer have an object",
    ),
    "dtype is an object": (
        one('{"dtype":{"U8":null},"shape":[2],"data_offsets":[0,2]}'),
        "serde reads a unit variant from a map too; the README has a string",
    ),
    "millions of values": (
        extra("[" + "0," * MAX_JSON_MARKS + "0]"),
        "parsed, 100 MB of brackets take gigabytes; 400,000 tensors stay below this limit",
    ),
}
