"""Damage to files: bytes anywhere, and values inside JSON, pickles, zips and graphs, so that it gets past checksums.

All of it follows from a NumPy generator. A folder is a dict of names to contents.
"""

import contextlib
import copy
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

Rng = np.random.Generator

DEEP = 100_000
SIZES = [0, 1, 2, -1, 127, 255, 1 << 16, (1 << 20) + 1, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40, 10**10]
SIZES += [(1 << 63) - 1, 1 << 63, (1 << 64) - 1, 10**30]
WORDS = ["", "x", "é", "\0", "\n", "a\nb", "char", "tokenizer", "ids", "../x", "int8", "\ud800", "a" * 5000, "U"]
# JSON that stands for a value.
RAW = ["null", "true", "false", "NaN", "Infinity", "-Infinity", "1e999", "-0.0", "0.5", "1e-320", "[]", "{}", "[[1]]"]
RAW += ["9" * 5000, "[" * DEEP + "]" * DEEP, "[" * 600 + "]" * 600, '{"a":' * 900 + "1" + "}" * 900, "[" + "0," * 9999]
RAW += [*map(str, SIZES), *map(json.dumps, WORDS), '["a", "b"]', '{"type": "char", "itos": ["a"]}', "[null]", "1" * 20]
MARK = "@@"  # what RAW replaces, and a key that occurs a second time begins with


def pick(rng: Rng, values: Any) -> Any:
    """One of the values."""
    return values[int(rng.integers(len(values)))]


# --------------------------------------------------------------------------------------------------------- bytes


def place(rng: Rng, size: int) -> int:
    """A position, often near the beginning or the end, where headers are."""
    near = int(rng.integers(min(size, 600) + 1))
    return pick(rng, [near, size - near, int(rng.integers(size + 1))])


def span(rng: Rng, size: int) -> slice:
    """A range, mostly short."""
    start = place(rng, size)
    return slice(start, min(size, start + int(2 ** rng.uniform(0, np.log2(size + 2)))))


def change_bytes(content: bytes, rng: Rng, donor: bytes) -> tuple[bytes, str]:
    """One change of the bytes; what it was."""
    data, size = bytearray(content), len(content)
    at, part = place(rng, size), span(rng, size)
    kind = pick(rng, ["flip", "flip", "set", "set", "cut", "behead", "insert", "delete", "repeat", "splice", "length"])
    if kind == "flip":
        for _ in range(int(rng.integers(1, 9)) if size else 0):
            data[place(rng, size) % size] ^= 1 << int(rng.integers(8))
    elif kind == "set":
        data[at : at + 1] = bytes([pick(rng, [0, 0xFF, int(rng.integers(256)), *b'0129-.,:"[]{}ntf\n'])])
    elif kind == "cut":
        del data[at:]
    elif kind == "behead":
        del data[:at]
    elif kind == "insert":
        data[at:at] = rng.bytes(int(rng.integers(1, 64)))
    elif kind == "delete":
        del data[part]
    elif kind == "repeat":
        data[at:at] = data[part] * int(rng.integers(1, 4))
    elif kind == "splice":
        other = donor[span(rng, len(donor))]
        data[at : at + pick(rng, [0, len(other)])] = other
    else:
        number = struct.pack("<Q", pick(rng, SIZES) % (1 << 64))[: pick(rng, [2, 4, 8, 8])]
        at = pick(rng, [0, at, at & ~7])
        data[at : at + len(number)] = number
    return bytes(data), f"{kind} at {at}"


# ------------------------------------------------------------------------------------------------------ structure


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (dict or list, key) in a value."""
    pending = [value]
    while pending:
        container = pending.pop()
        for key in list(container) if isinstance(container, dict) else range(len(container)):
            yield container, key
            if isinstance(container[key], dict | list):
                pending.append(container[key])


def change_tree(value: Any, rng: Rng, other: Callable[[Rng, Any], Any]) -> tuple[Any, str]:
    """One change of a value in a tree of dicts and lists."""
    root = [value]
    everywhere = list(places(root))
    # A list of a thousand merges is one place among the others.
    few = [(c, k) for c, k in everywhere if not isinstance(c, list) or k < 4]
    container, key = pick(rng, few if rng.random() < 0.8 else everywhere)
    kind = pick(rng, ["replace"] * 4 + ["drop", "rename", "again", "swap"])
    if kind == "drop" and container is not root:
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        new = pick(rng, [f"{key}x", *WORDS, pick(rng, everywhere)[1]])
        container[new if isinstance(new, str) else f"{key}_"] = container.pop(key)
    elif kind == "again" and isinstance(container, dict):
        container[f"{MARK}{pick(rng, list(container))}"] = copy.deepcopy(container[key])
    elif kind == "again" and container is not root:
        container.insert(key, copy.deepcopy(container[key]))
    elif kind == "swap":
        there, name = pick(rng, everywhere)
        container[key] = copy.deepcopy(there[name])
    else:
        container[key] = other(rng, container[key])
    return root[0], f"{kind} {str(key)[:60]!r}"


def change_json(content: bytes, rng: Rng) -> tuple[bytes, str]:
    """One value of a JSON file."""
    value, what = change_tree(json.loads(content), rng, lambda *_: MARK)
    raw = pick(rng, RAW)
    text = json.dumps(value).replace(f'"{MARK}"', raw).replace(MARK, "")
    return text.encode("utf-8", "surrogatepass"), f"{what}, {raw[:40]}"


def change_safetensors(content: bytes, rng: Rng) -> tuple[bytes, str]:
    """One value of the header, whose length is right again."""
    (length,) = struct.unpack("<Q", content[:8])
    header, what = change_json(content[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + content[8 + length :], what


def plain(rng: Rng, _: Any) -> Any:
    """A Python value."""
    values = [None, True, -0.0, 0.5, float("nan"), float("inf"), [], {}, (), [[1]], {1: 2}, {None: []}, b"", set()]
    return pick(rng, [*values, pick(rng, SIZES), pick(rng, SIZES), pick(rng, WORDS).replace("\ud800", "")])


def change_pickle(content: bytes, rng: Rng) -> tuple[bytes, str]:
    """One value of a pickle, in any of its protocols."""
    value, what = change_tree(pickle.loads(content), rng, plain)
    return pickle.dumps(value, protocol=int(rng.integers(6))), what


def tensor_or_plain(rng: Rng, old: Any) -> Any:
    """A tensor of another type, shape or kind, or a plain value."""
    if not isinstance(old, torch.Tensor) or rng.random() < 0.3:
        return plain(rng, old)
    kinds: list[Callable[[], Any]] = [
        lambda: old.to(pick(rng, [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.int64])),
        lambda: old.to(torch.complex64),
        lambda: torch.zeros(1, dtype=old.dtype).expand(pick(rng, [0, 7, 1 << 20, 1 << 33]), *old.shape),
        lambda: torch.zeros(1, dtype=old.dtype).expand(1 << 17, 1 << 17),
        lambda: old[..., :-1] if old.ndim else old.reshape(1),
        lambda: old.reshape(-1),
        lambda: old.T if old.ndim == 2 else old[None],
        lambda: old.to_sparse(),
        lambda: torch.full_like(old, pick(rng, [0, 1, -128, 127])),
        lambda: torch.full_like(old, float("nan")) if old.is_floating_point() else old + 1,
        lambda: torch.full_like(old, 3e38) if old.is_floating_point() else old - 1,
        lambda: torch.empty(old.shape, dtype=old.dtype, device="meta"),
        lambda: torch.nn.Parameter(old.float()),
        lambda: torch.quantize_per_tensor(old.float(), 0.1, 0, torch.qint8),
    ]
    return pick(rng, kinds)()


def change_torch(content: bytes, rng: Rng) -> tuple[bytes, str]:
    """One value of what torch.save wrote."""
    value, what = change_tree(torch.load(io.BytesIO(content), weights_only=True), rng, tensor_or_plain)
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue(), what


def change_zip(content: bytes, rng: Rng) -> tuple[bytes, str]:
    """A member of a zip, whose checksum is right again."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    at = pick(rng, [int(rng.integers(len(members))), next(i for i, m in enumerate(members) if "data.pkl" in m[0])])
    (name, data), kind = members[at], pick(rng, ["change"] * 6 + ["drop", "twice", "rename", "compress"])
    if kind == "change":
        data, kind = change_bytes(data, rng, pick(rng, members)[1])
    renamed = pick(rng, members)[0] if kind == "rename" else name
    members[at : at + 1] = [(renamed, data)] * {"drop": 0, "twice": 2}.get(kind, 1)
    file, method = io.BytesIO(), zipfile.ZIP_DEFLATED if kind == "compress" else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", method) as archive:
        for member in members:
            archive.writestr(*member)
    return file.getvalue(), f"{kind} of {name}"


def change_onnx(content: bytes, rng: Rng) -> tuple[bytes, str]:
    """A part of the graph, or a value of the metadata."""
    proto = onnx.load_from_string(content)
    node, tensor, entry = pick(rng, proto.graph.node), pick(rng, proto.graph.initializer), proto.metadata_props[0]
    value = pick(rng, [*proto.graph.input, *proto.graph.output])
    kind = pick(rng, ["metadata"] * 6 + ["node", "input", "tensor", "dims", "type", "drop", "rename", "opset"])
    if kind == "metadata":
        text, kind = change_json(entry.value.encode(), rng)
        entry.value = text.decode("utf-8", "replace")
    elif kind == "node":
        node.op_type = pick(rng, ["Add", "MatMul", "Gather", "Loop", "x"])
    elif kind == "input":
        node.input[int(rng.integers(len(node.input)))] = pick(rng, ["", "x", tensor.name, value.name])
    elif kind == "tensor":
        tensor.raw_data, _ = change_bytes(tensor.raw_data, rng, tensor.raw_data)
    elif kind == "dims":
        tensor.dims[:] = [pick(rng, SIZES[:-3]) for _ in tensor.dims]
    elif kind == "type":
        value.type.tensor_type.elem_type = int(rng.integers(24))
    elif kind == "drop":
        del pick(rng, [proto.graph.node, proto.graph.initializer, proto.graph.input, proto.graph.output])[0]
    elif kind == "rename":
        value.name = pick(rng, ["", "x", tensor.name])
    else:
        proto.opset_import[0].version = pick(rng, SIZES[:8])
    return proto.SerializeToString(), kind


BY_SUFFIX: dict[str, list[Callable[[bytes, Rng], tuple[bytes, str]]]] = {
    ".json": [change_json],
    ".safetensors": [change_safetensors],
    ".pkl": [change_pickle],
    ".pt": [change_torch, change_zip],
    ".bin": [change_torch, change_zip],
    ".onnx": [change_onnx],
}


# -------------------------------------------------------------------------------------------------------- folders


def change_file(suffix: str, content: bytes, rng: Rng, donor: bytes) -> tuple[bytes, str]:
    """One change of a file: of what it says, or of its bytes."""
    if suffix in BY_SUFFIX and rng.random() < 0.6:
        # What an earlier change has damaged may have no structure any more.
        with contextlib.suppress(Exception):
            return pick(rng, BY_SUFFIX[suffix])(content, rng)
    return change_bytes(content, rng, donor)


def change(files: dict[str, bytes], rng: Rng) -> tuple[dict[str, bytes | None], str]:
    """One to three changes of the files; those that changed (None: it is gone), and what was done."""
    names = sorted(files)
    changed: dict[str, bytes | None] = {}
    done = []
    for _ in range(int(pick(rng, [1, 1, 1, 2, 3]))):
        name = pick(rng, names)
        content = changed.get(name, files[name])
        if content is None or rng.random() < 0.01:
            changed[name], what = None, "remove"
        elif rng.random() < 0.02:
            changed[name], what = pick(rng, [b"", files[pick(rng, names)]]), "empty, or another"
        else:
            changed[name], what = change_file(Path(name).suffix, content, rng, files[pick(rng, names)])
        done.append(f"{name}: {what}")
    return changed, "; ".join(done)
