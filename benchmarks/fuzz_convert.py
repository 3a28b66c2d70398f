"""
Convert mutated checkpoint files, one process each, and count what happens.

    python benchmarks/fuzz_convert.py --files 2000 --output benchmarks/results/fuzz_convert.json

Every file must either convert or be refused in one line. A crash, a traceback, more than 10 CPU seconds, executed
code, more memory than three times the file (plus 32 MB for Python's objects), or other weights from a damaged file
with checksums is a failure, and the exit code is 1. Results are kept in `--work_dir`: an interrupted run continues.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mocov3_hf.interop.convert import main as convert  # noqa: E402
from tests.interop.conftest import encoder_of, mmpretrain_classification, official, solo_learn  # noqa: E402


SECONDS = 10
ALLOWANCE = 32 << 20  # bytes of Python objects, beyond three times the file
MARKS = ("os.", "subprocess.", "socket.", "pickle.", "shutil.", "ctypes.dlopen")  # audit events that no file may cause
ALLOWED = ("os.scandir", "os.listdir", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.link",
           "os.walk", "os.truncate", "os.utime", "shutil.rmtree", "shutil.copyfile", "os.putenv")  # fmt: skip


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


# One conversion


def attempt(path: Path, output_dir: Path) -> tuple[str, str]:
    """Outcome and last line of one conversion in this process: converted, refused, or what must not be."""
    printed, errors = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            convert([str(path), "--output_dir", str(output_dir), "--num_attention_heads", "2"])
        except SystemExit as end:
            code = end.code
        except BaseException:
            return "traceback", traceback.format_exc()[-2000:]
    lines = [line for line in errors.getvalue().splitlines() if not line.startswith("warning: ")]
    if code == 0:
        return "converted", ""
    if code not in (1, 2) or len(lines) != 1 or not lines[0].startswith("error: ") or len(lines[0]) > 2500:
        return "unclear", "\n".join(lines)[:2000]
    return ("refused" if not output_dir.exists() else "left a folder"), lines[0]


def outcome_of(path: Path, output_dir: Path, expected: dict[str, torch.Tensor]) -> tuple[str, str]:
    """As `attempt`; weights other than those of the whole file are `"other weights"`."""
    outcome, line = attempt(path, output_dir)
    if outcome == "converted":
        found = load_file(output_dir / "model.safetensors")
        same = found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
        outcome = "converted" if same else "other weights"
    return outcome, line


def expected_weights(seeds: dict[str, Path], folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of every whole file, which must convert."""
    expected = {}
    shutil.rmtree(folder, ignore_errors=True)
    for name, path in seeds.items():
        outcome, line = attempt(path, folder / name)
        if outcome != "converted":
            raise SystemExit(f"the whole file {path} does not convert: {line}")
        expected[name] = load_file(folder / name / "model.safetensors")
    return expected


def in_child(path: Path, whole: Path, folder: Path, expected: dict[str, torch.Tensor]) -> dict:
    """Convert in a child process with limits, and measure it. `whole` is a file of the same form that converts."""
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        events: list[str] = []
        sys.addaudithook(lambda event, _: events.append(event) if event.startswith(MARKS) else None)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 2))
        attempt(whole, folder / "whole")  # a fork maps the pages of libraries at their first use
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        base = memory("VmRSS")
        begin = time.process_time()
        outcome, line = outcome_of(path, folder / "out", expected)
        measured = {
            "outcome": outcome,
            "line": line,
            "seconds": round(time.process_time() - begin, 2),
            "memory": memory("VmHWM") - base,
            "events": sorted(set(events) - set(ALLOWED)),
        }
        report.write_text(json.dumps(measured))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not report.exists():
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        name = signal.Signals(number).name if number else f"exit {os.WEXITSTATUS(status)}"
        return {"outcome": "hang" if number == signal.SIGXCPU else "crash", "line": name, "memory": 0, "seconds": 0}
    return json.loads(report.read_text())


def memory(name: str) -> int:
    """A number of `/proc/self/status`, in bytes."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) << 10


def judge(form: str, mutation: str, size: int, row: dict) -> str | None:
    """What is wrong with a result; None if nothing is."""
    if row["outcome"] not in ("converted", "refused", "other weights"):
        return row["outcome"]
    # Files without checksums, and values that the mutation itself changed, may differ.
    is_protected = form not in ("legacy", "safetensors") and mutation in (f.__name__ for f in BYTES)
    if row["outcome"] == "other weights" and is_protected:
        return "other weights"
    if row["seconds"] > SECONDS:
        return "hang"
    if row["memory"] > 3 * size + ALLOWANCE:
        return f"memory: {row['memory']:,} bytes for a file of {size:,}"
    if row["events"] or row.get("hacked"):
        return f"executed: {row['events']}"
    return None


def run(seeds: dict[str, Path], work_dir: Path, files: int, seed: int) -> Iterator[dict]:
    """One row per file; rows of an earlier run are read, not repeated."""
    log = work_dir / f"rows-{seed}.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    yield from rows[:files]
    expected = expected_weights(seeds, work_dir / "whole")
    with log.open("a") as lines:
        for index in range(len(rows), files):
            form, mutation, content = mutated(seeds, seed, index)
            path = work_dir / f"mutated{seeds[form].suffix}"
            path.write_bytes(content)
            folder = work_dir / "child"
            row = in_child(path, seeds[form], folder, expected[form])
            row |= {"hacked": any(path.name == "hacked" for path in folder.rglob("*"))}
            row |= {"index": index, "form": form, "mutation": mutation, "bytes": len(content)}
            row["wrong"] = judge(form, mutation, len(content), row)
            if row["wrong"]:
                path.rename(work_dir / f"wrong-{index}{path.suffix}")

            for name in ("out", "whole"):
                shutil.rmtree(folder / name, ignore_errors=True)
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000, help="number of mutated files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work_dir", type=Path, default=Path("/tmp/fuzz_convert"), help="working folder")
    parser.add_argument("--output", type=Path, help="JSON file for the summary")
    args = parser.parse_args()
    args.work_dir = args.work_dir.resolve()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of torch, about sparse and quantized tensors
    seeds = write_seeds(args.work_dir / "seeds")
    rows = []
    for row in run(seeds, args.work_dir, args.files, args.seed):
        rows.append(row)
        if row["wrong"]:
            print(f"{row['index']} {row['form']} {row['mutation']}: {row['wrong']} {row['line'][-600:]}", flush=True)
    table = Counter((row["form"], row["mutation"], row["outcome"]) for row in rows)
    summary = {
        "files": len(rows),
        "seed": args.seed,
        "outcomes": dict(Counter(row["outcome"] for row in rows)),
        "wrong": dict(Counter(row["wrong"].partition(":")[0] for row in rows if row["wrong"])),
        "largest_seconds": max(row["seconds"] for row in rows),
        "largest_memory_beyond_start": max(row["memory"] for row in rows),
        "table": [
            {"form": form, "mutation": mutation, "outcome": outcome, "files": count}
            for (form, mutation, outcome), count in sorted(table.items())
        ],
    }
    print(json.dumps({key: value for key, value in summary.items() if key != "table"}, indent=2))
    if args.output:
        args.output.write_text(json.dumps(summary, indent=2) + "\n")
    sys.exit(1 if summary["wrong"] else 0)


if __name__ == "__main__":
    main()
