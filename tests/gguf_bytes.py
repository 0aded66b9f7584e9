"""GGUF files put together by hand with ``struct``, so that any field can be wrong."""

import struct

ARRAY, STRING = 9, 8


def text(value, sign="<"):
    value = value.encode() if isinstance(value, str) else value
    return struct.pack(f"{sign}Q", len(value)) + value


def scalar(key, kind, code, value, sign="<"):
    return text(key, sign) + struct.pack(f"{sign}I{code}", kind, value)


def u32(key, value, sign="<"):
    return scalar(key, 4, "I", value, sign)


def string(key, value, sign="<"):
    return text(key, sign) + struct.pack(f"{sign}I", STRING) + text(value, sign)


def array(key, element, data, count, sign="<"):
    return text(key, sign) + struct.pack(f"{sign}IIQ", ARRAY, element, count) + data


def info(name, dims, kind=0, offset=0, sign="<"):
    return text(name, sign) + struct.pack(f"{sign}I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf(keys=(), infos=(), data=b"", *, n_keys=None, n_infos=None, version=3, magic=b"GGUF", alignment=32, sign="<"):
    n_keys = len(keys) if n_keys is None else n_keys
    n_infos = len(infos) if n_infos is None else n_infos
    head = magic + struct.pack(f"{sign}IQQ", version, n_infos, n_keys) + b"".join(keys) + b"".join(infos)
    if infos:
        head += bytes(-len(head) % alignment)
    return head + data
