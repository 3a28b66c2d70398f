"""Checkpoint files of every format, whole and with mutated bytes, records, pickles, headers and state dicts."""

import contextlib
import io
import json
import random
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.interop.conftest import encoder_of, mmpretrain_classification, official, solo_learn


# Whole files


def write_seeds(folder: Path) -> dict[str, Path]:
    """One whole file of every format, tiny."""
    state_dict = official("vit")
    wrapped = {f"module.{name}": value for name, value in state_dict.items()}
    meta = {"epoch": 90, "dataset_meta": {"classes": ["a", "b", "c", "d", "e"]}, "cfg": "frozen_stages = 4"}
    payloads = {
        "official": {"epoch": 300, "arch": "vit", "state_dict": wrapped, "optimizer": {"state": {0: torch.ones(3)}}},
        "mmpretrain": {"meta": meta, "state_dict": mmpretrain_classification("vit")},
        "solo-learn": {"epoch": 1000, "state_dict": solo_learn("vit")},
        "legacy": {"epoch": 300, "state_dict": state_dict},
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, payload in payloads.items():
        paths[name] = folder / f"{name}.pth"
        torch.save(payload, paths[name], _use_new_zipfile_serialization=name != "legacy")
    paths["safetensors"] = folder / "encoder.safetensors"
    save_file(encoder_of(state_dict, "vit"), paths["safetensors"])
    return paths


# Mutations of bytes: content, random numbers -> content


def flip_bits(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 4, 32))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def flip_in_head_or_tail(content: bytes, draw: random.Random) -> bytes:
    changed, reach = bytearray(content), min(len(content), 4000)
    for _ in range(draw.choice((1, 2, 8))):
        position = draw.randrange(reach)
        changed[position if draw.random() < 0.5 else -1 - position] = draw.randrange(256)
    return bytes(changed)


def truncate(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def move_bytes(content: bytes, draw: random.Random) -> bytes:
    """A part is overwritten, removed, doubled or inserted."""
    begin, size = draw.randrange(len(content)), int(2 ** draw.uniform(0, 14))
    other = draw.choice((bytes(size), draw.randbytes(size), b"\xff" * size, content[:size]))
    keep = draw.choice((0, size))
    if draw.random() < 0.2:
        return content[:begin] + content[begin + size :]
    return content[:begin] + other + content[begin + keep :]


# Mutations of the parts of a zip archive, with right checksums


def repack(content: bytes, change: Callable[[dict[str, bytes]], None], compress: bool = False) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    change(records)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return packed.getvalue()


def mutate_pickle(content: bytes, draw: random.Random) -> bytes:
    def change(records: dict[str, bytes]) -> None:
        name = next(name for name in records if name.endswith("data.pkl"))
        program = records[name]
        for _ in range(draw.choice((1, 1, 2, 6))):
            program = draw.choice((flip_bits, insert_operations, replace_number))(program, draw)
        records[name] = program

    return repack(content, change)


HOSTILE = (
    b"cposix\nsystem\n(X\x0c\x00\x00\x00touch hackedtR",
    b"cbuiltins\nexec\n(X\x04\x00\x00\x001/0\ntR",
    b"c__builtin__\nbytearray\n(J\xff\xff\xff\x7ftR",
    b"ctorch\nload\n(X\x01\x00\x00\x00xtR",
    b"r\xff\xff\xff\x7f",  # a huge memo
    b"(" * 5000,
    b"]" * 20000,
    b"}" * 250_000,
    b"]" * 2_000_000,
    b"X\x00\x00\x30\x00" + b"x" * 0x300000,
    b"X\x03\x00\x30\x00" + b"x" * 0x300000 + "\u20ac".encode(),
    b"\x85" * 20000,  # nested tuples
    b"}" + b"\x85" * 20000 + b"Ns",
    b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\x7f",
    b"Q",
    b"b",
    b"R",
    b"\x81",
    b"0" * 50,
    b"2" * 50,
    b"\x82\x01",
    b"icposix\nsystem\n",
    b"I" + b"9" * 5000 + b"\n",
)


def insert_operations(program: bytes, draw: random.Random) -> bytes:
    position = draw.randrange(len(program))
    return program[:position] + draw.choice(HOSTILE) + program[position:]


def replace_number(program: bytes, draw: random.Random) -> bytes:
    """One small integer becomes another one, often a huge one."""
    places = [found.start() for found in re.finditer(b"[KMJ]", program)]
    if not places:
        return program
    place = draw.choice(places)
    width = {b"K": 2, b"M": 3, b"J": 5}[program[place : place + 1]]
    number = draw.choice((0, -1, 1, 2**31 - 1, 2**40, 2**62, 2**500, draw.randrange(4096)))
    size = number.bit_length() // 8 + 1
    return (
        program[:place] + bytes([0x8A, size]) + number.to_bytes(size, "little", signed=True) + program[place + width :]
    )


def mutate_records(content: bytes, draw: random.Random) -> bytes:
    def change(records: dict[str, bytes]) -> None:
        name = draw.choice(list(records))
        match draw.randrange(7):
            case 0:
                del records[name]
            case 1:
                records[name] = records[name][: len(records[name]) // 2]
            case 2:
                records[name] *= 3
            case 3:
                records[f"{name}/../../up"] = records.pop(name)
            case 4:
                records[next(name for name in records if name.endswith("data.pkl"))] = bytes(1 << 26)
            case 5:
                records[name.partition("/")[0] + "/constants.pkl"] = b""
            case 6:
                records[name.partition("/")[0] + "/byteorder"] = b"big"

    return repack(content, change, compress=draw.random() < 0.4)


def mutate_directory(content: bytes, draw: random.Random) -> bytes:
    """Sizes, offsets and names in the central directory."""
    begin = content.rindex(b"PK\x01\x02") if draw.random() < 0.3 else content.index(b"PK\x01\x02")
    changed = bytearray(content)
    field = draw.choice((8, 10, 16, 20, 24, 28, 30, 42, 46))
    changed[begin + field : begin + field + 4] = struct.pack("<I", draw.choice((0, 1, 1000, 2**31, 2**32 - 1)))
    return bytes(changed)


# Mutations of state dicts


def mutate_state_dict(content: bytes, draw: random.Random) -> bytes:
    payload = torch.load(io.BytesIO(content), weights_only=True)
    state_dict = payload["state_dict"]
    key = draw.choice(list(state_dict))
    value = state_dict[key]
    changes: list[Callable[[], object]] = [
        lambda: state_dict.update({key: value.to_sparse()}),
        lambda: state_dict.update({key: torch.empty(value.shape, device="meta")}),
        lambda: state_dict.update({key: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.quint8)}),
        lambda: state_dict.update({key: torch.full_like(value.float(), float("nan"))}),
        lambda: state_dict.update({key: torch.ones(1).expand(10**9)}),
        lambda: state_dict.update({key: torch.ones(1).expand(10**5, 10**5, 10**5)}),
        lambda: state_dict.update({key: value.flatten()}),
        lambda: state_dict.update({key: value[..., None]}),
        lambda: state_dict.update({key: torch.empty(0, *value.shape)}),
        lambda: state_dict.update({key: value.to(draw.choice((torch.bool, torch.int8, torch.complex64, torch.half)))}),
        lambda: state_dict.update({key: draw.choice((None, "text", 3, [1], {}, 10**5000))}),
        lambda: state_dict.update({draw.choice(list(state_dict)): value}),
        lambda: state_dict.update({7: value}),
        lambda: state_dict.update({draw.choice((None, 2.5, True, b"x")): value}),
        lambda: state_dict.update({"x" * 10**6: value}),
        lambda: state_dict.update({"two\nlines\x1b[31m": value}),
        lambda: state_dict.update({re.sub(r"\d+", draw.choice(("999999999", "99", "9" * 5000)), key, count=1): value}),
        lambda: state_dict.update({f"blocks.{index}.norm1.weight": value for index in range(20_000)}),
        lambda: state_dict.pop(key),
        lambda: [state_dict.pop(key) for key in draw.sample(list(state_dict), draw.randrange(len(state_dict)))],
        lambda: state_dict.update(zip(list(state_dict), list(state_dict.values())[::-1], strict=True)),
        lambda: payload.update({"state_dict": draw.choice(([], None, {}, {"state_dict": state_dict}))}),
        lambda: payload.update({"epoch": draw.choice((10**5000, -1, "three", None, [1], True))}),
        lambda: payload.update({"meta": draw.choice(([], {"cfg": [1]}, {"dataset_meta": {"classes": [None] * 5}}))}),
        lambda: payload.update(dict.fromkeys(range(5000), "entry")),
    ]  # fmt: skip
    for change in draw.sample(changes, draw.choice((1, 1, 2))):
        with contextlib.suppress(RuntimeError, NotImplementedError, KeyError):  # not every tensor has every form
            change()
    saved = io.BytesIO()
    torch.save(payload, saved, _use_new_zipfile_serialization=content.startswith(b"PK"))
    return saved.getvalue()


def mutate_header(content: bytes, draw: random.Random) -> bytes:
    """The JSON header of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    name = draw.choice(list(header))
    header[name] = draw.choice(
        (
            header[name] | {"shape": [10**9, 10**9]},
            header[name] | {"shape": [-1]},
            header[name] | {"shape": []},
            header[name] | {"dtype": draw.choice(("F64", "BOOL", "F8_E4M3", "X", 3))},
            header[name] | {"data_offsets": [0, 10**15]},
            header[name] | {"data_offsets": [16, 8]},
            {},
            None,
            [],
        )
    )
    text = json.dumps(header).encode()
    match draw.randrange(6):
        case 0:
            text = text[:-1] + f', "{name}": {json.dumps(header[name])}}}'.encode()
        case 1:
            text = b'{"a":' * 10**5 + text
        case 2:
            text = text[:-1] + b', "' + b"x" * 10**6 + b'": 0}'
        case 3:
            text += b" " * 10**7
    length = draw.choice((len(text), len(text), len(text), len(text) + 1, 2**62, 2**63, 0))
    return length.to_bytes(8, "little") + text + data


BYTES = (flip_bits, flip_bits, flip_in_head_or_tail, truncate, move_bytes)
ZIP = (mutate_pickle, mutate_pickle, mutate_records, mutate_directory, mutate_state_dict, mutate_state_dict)
MUTATIONS = {
    "official": (*BYTES, *ZIP),
    "mmpretrain": (*BYTES, *ZIP),
    "solo-learn": (*BYTES, *ZIP),
    "legacy": (*BYTES, insert_operations, replace_number, mutate_state_dict, mutate_state_dict),
    "safetensors": (*BYTES, mutate_header, mutate_header),
}


def mutated(seeds: dict[str, Path], seed: int, index: int) -> tuple[str, str, bytes]:
    """Format, mutation and content of one file."""
    draw = random.Random(f"{seed} {index}")
    form = draw.choice(list(seeds))
    mutation = draw.choice(MUTATIONS[form])
    return form, mutation.__name__, mutation(seeds[form].read_bytes(), draw)
