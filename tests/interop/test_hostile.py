"""Files that lie, and folders that cannot be written: each a model or one line, never a crash."""

import io
import json
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from benchmarks import fuzz_convert
from mocov3_hf.interop import ConversionError, convert_state_dict
from mocov3_hf.interop.files import read_checkpoint
from mocov3_hf.interop.pickled import Call, read_pickle
from mocov3_hf.interop.torch_files import MAX_READ, DamagedError
from tests.interop.conftest import official
from tests.interop.test_files import convert


def read(path):
    return read_checkpoint(path).state_dict


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "whole.pth"
    torch.save({"state_dict": official("vit")}, path)
    return path


# Reading


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_reading_agrees_with_torch_load(tmp_path, legacy, protocol):
    """Also of views, steps, scalars, parameters and other types than float32."""
    matrix = torch.arange(24.0).reshape(4, 6)
    tensors = OrderedDict(
        whole=matrix,
        view=torch.arange(100, dtype=torch.int16)[7:19].reshape(3, 4),
        transposed=torch.randn(5, 3).t(),
        channels_last=torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        scalar=torch.tensor(3),
        half=torch.randn(3).half(),
        brain=torch.randn(3).bfloat16(),
        double=torch.randn(3).double(),
        flag=torch.tensor([True, False]),
        parameter=torch.nn.Parameter(torch.randn(2)),
        frozen=torch.nn.Parameter(torch.randn(2), requires_grad=False),
    )
    tensors["byte"] = torch.tensor([1, 2, 3], dtype=torch.uint8)  # the next storage is not aligned in a legacy file
    tensors["after"] = torch.randn(7)
    tensors._metadata = OrderedDict({"": {"version": 1}})
    path = tmp_path / "file.pth"
    payload = {"state_dict": tensors, "optimizer": {"state": {0: {"step": 3}}, "groups": [{"params": [0, 1]}]}}
    torch.save(payload, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    expected = torch.load(path, weights_only=False)["state_dict"]  # its safe reader knows protocol 2 only
    found = read(path)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].stride()) == (value.dtype, value.stride())
        assert torch.equal(found[name], value), name
    assert read_checkpoint(path).others == {"optimizer": "dict"}


def test_a_pickle_is_read_without_calling_anything(tmp_path):
    class Dangerous:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    found = read_pickle(io.BytesIO(pickle.dumps({"a": Dangerous(), "b": [1, 2.5, "c", None, (True,)]}, protocol=4)))
    assert isinstance(found.value["a"], Call)
    assert found.value["b"] == [1, 2.5, "c", None, (True,)]
    assert found.harmful == [f"{Path.__module__}.Path.touch", f"{Path.__module__}.PosixPath"]
    assert not (tmp_path / "executed").exists()


def test_names_by_the_stack_and_by_python_2_are_known():
    by_stack = b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R."
    assert read_pickle(io.BytesIO(by_stack)).harmful == ["posix.system"]
    assert read_pickle(io.BytesIO(b"(cposix\nsystem\nX\x04\x00\x00\x00trueo.")).harmful == ["posix.system"]
    assert read_pickle(io.BytesIO(b"(X\x04\x00\x00\x00trueiposix\nsystem\n.")).harmful == ["posix.system"]


def test_every_flipped_bit_of_a_tensor_is_noticed(whole, tmp_path):
    with zipfile.ZipFile(whole) as archive:
        records = [record for record in archive.infolist() if "/data/" in record.filename or "pkl" in record.filename]
    content = whole.read_bytes()
    for number in range(40):
        record = records[number * len(records) // 40]
        place = record.header_offset + 30 + sum(struct.unpack("<HH", content[record.header_offset + 26 :][:4]))
        changed = bytearray(content)
        changed[place + number * 97 % record.file_size] ^= 1 << number % 8
        (tmp_path / "flipped.pth").write_bytes(changed)
        with pytest.raises(DamagedError, match=f"the checksum of its record {re.escape(record.filename)} is wrong"):
            read(tmp_path / "flipped.pth")


def test_a_file_without_checksums_is_read_with_a_warning(tmp_path, capsys):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(official("vit"), tmp_path / "file.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert all(torch.equal(value, official("vit")[name]) for name, value in read(tmp_path / "file.pth").items())
    assert "file.pth has no checksums: a damaged tensor would not be noticed" in capsys.readouterr().err


def zipped(path, records, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def test_a_file_is_what_its_content_says(tmp_path):
    """Neither the suffix nor a size in the file is believed."""
    safetensors, torch_file = tmp_path / "really.pth", tmp_path / "really.safetensors"
    save_file({"a": torch.ones(2)}, safetensors)
    torch.save({"a": torch.ones(3)}, torch_file)
    assert read(safetensors)["a"].shape == (2,)
    with pytest.raises(ConversionError):  # named for what it is not, as its suffix promises
        read(tmp_path / "none.safetensors")
    assert read(torch_file)["a"].shape == (3,)
    zipped(
        tmp_path / "script.pt", {"script/data.pkl": b"", "script/code/__torch__.py": b"", "script/constants.pkl": b""}
    )
    zipped(tmp_path / "arrays.npz", {"a.npy": b"x", "b.npy": b"y"})
    zipped(tmp_path / "bomb.pth", {"bomb/data.pkl": bytes(1 << 24)}, zipfile.ZIP_DEFLATED)
    zipped(tmp_path / "big.pth", {"big/data.pkl": b"", "big/byteorder": b"big"})
    (tmp_path / "packed.pth.gz").write_bytes(b"\x1f\x8b\x08" + bytes(100))
    (tmp_path / "dump.pth").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "bin.pth").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with tarfile.open(tmp_path / "old.pth.tar", "w") as archive:
        archive.add(torch_file, "storages")
    for name, message in {
        "script.pt": "is a TorchScript program: save torch.jit.load",
        "arrays.npz": r"is a zip archive of other things \(a.npy, b.npy\)",
        "bomb.pth": "is compressed or encrypted, which torch.save never does",
        "packed.pth.gz": "is a gzip file: unpack it first",
        "dump.pth": "is a pickle, but not of torch.save",
        "bin.pth": "is an HDF5 file",
        "old.pth.tar": "is a tar archive: unpack it",
    }.items():
        with pytest.raises(ConversionError, match=message) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(DamagedError):
        read(tmp_path / "big.pth")


def header(size, text, data=b""):
    return size.to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(2**63 - 1, b"{}"), "its header has 9,223,372,036,854,775,807 bytes, of 10 in the file"),
        (header(17 << 20, b"{" + b" " * (17 << 20)), "its header has 17,825,792 bytes"),
        (header(200_001, b"[" * 200_000 + b"1"), "recursion"),
        (header(2, b"[]"), "its header has 0 names|deserializing header"),
        (header(70, b'{"a":{"dtype":"F32","shape":[9999999,99999999],"data_offsets":[0,4]}} ', bytes(4)), "header"),
        (
            header(
                107,
                b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
                bytes(4),
            ),
            "its header has 2 names, of which 1 differ",
        ),
        (save({"a": torch.ones(8)})[:-4], "deserializing header"),
    ],
)
def test_headers_of_safetensors_that_lie_are_refused(tmp_path, content, message):
    (tmp_path / "file.safetensors").write_bytes(content)
    with pytest.raises(DamagedError, match=message):
        read(tmp_path / "file.safetensors")


def test_no_length_in_a_file_is_read_at_once(tmp_path):
    """Memory would be taken before the end of the file is noticed."""
    zipped(tmp_path / "archive.pth", {"a/data.pkl": bytes(MAX_READ + 1)})
    for operation, size in ((b"X", 4), (b"\x8d", 8), (b"B", 4), (b"\x8b", 4), (b"T", 4)):
        length = MAX_READ + 1
        (tmp_path / "old.pth").write_bytes(b"\x80\x02" + operation + length.to_bytes(size, "little") + b"text.")
        for name in ("archive.pth", "old.pth"):
            with pytest.raises(DamagedError, match=f"it asks for {length:,} bytes at once"):
                read(tmp_path / name)


# What a state dict may not hold


def changed(change):
    state_dict = official("vit")
    change(state_dict)
    return state_dict


KEY = "base_encoder.norm.weight"
CHANGES = {
    "sparse": (lambda s: s.update({KEY: s[KEY].to_sparse()}), f"{KEY} is sparse"),
    "quantized": (
        lambda s: s.update({KEY: torch.quantize_per_tensor(s[KEY], 0.1, 0, torch.quint8)}),
        f"{KEY} is quantized",
    ),
    "meta": (lambda s: s.update({KEY: torch.ones(32, device="meta")}), f"{KEY} is on the meta device"),
    "complex": (lambda s: s.update({KEY: s[KEY].to(torch.complex64)}), f"{KEY} is complex, quantized or otherwise"),
    "shared": (
        lambda s: s.update({KEY: s["base_encoder.norm.bias"]}),
        f"{KEY} shares its memory with base_encoder.norm.bias|base_encoder.norm.bias shares its memory with {KEY}",
    ),
    "expanded": (lambda s: s.update({KEY: torch.ones(1).expand(10**9)}), f"{KEY} repeats its values in memory"),
    "integer keys": (lambda s: s.update({5: s[KEY]}), r"the state dict has the key 5 \(int\), expected names"),
    "long names": (lambda s: s.update({"x" * 10**6: s.pop(KEY)}), r"key x+\.\.\. \(1,000,000 characters\)"),
    "strange names": (lambda s: s.update({"a\nb\x1b[1m": torch.ones(2)}), r"unexpected keys: a\\nb\\x1b\[1m"),
    "NaN": (
        lambda s: s.update({KEY: torch.full((32,), float("nan"))}),
        f"keys with values that are NaN or infinite: {KEY}",
    ),
    "infinity": (lambda s: s[KEY].__setitem__(3, float("-inf")), f"NaN or infinite: {KEY}"),
    "no elements": (lambda s: s.update({KEY: torch.ones(0, 32)}), rf"{KEY} is empty: its shape is \[0, 32\]"),
    "two types": (lambda s: s.update({KEY: s[KEY].half()}), f"{KEY} has torch.float16, the others torch.float32"),
    "bytes": (lambda s: s.update({KEY: s[KEY].to(torch.uint8)}), f"{KEY} has torch.uint8, expected torch.float32"),
    "huge index": (
        lambda s: s.update({"base_encoder.blocks.999999999.norm1.weight": s[KEY].clone()}),
        r"missing keys: base_encoder.blocks.2.\*, although the file has base_encoder.blocks.999999999",
    ),
    "huge number": (lambda s: s.update({f"base_encoder.blocks.{'9' * 400}.x": s[KEY].clone()}), "unexpected keys"),
    "many keys": (
        lambda s: s.update({f"x.{index}": s["base_encoder.pos_embed"] for index in range(10_001)}),
        r"holds 10,\d\d\d tensors, expected at most 10,000",
    ),
    "few dimensions": (
        lambda s: s.update({"base_encoder.cls_token": torch.tensor(1.0)}),
        r"base_encoder.cls_token has \[\], expected 3 dimensions",
    ),
    "other depth": (
        lambda s: s.update({"base_encoder.blocks.2.norm1.weight": torch.ones(32)}),
        "missing keys: base_encoder.blocks.2",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about sparse and quantized tensors
@pytest.mark.parametrize("kind", CHANGES)
def test_contents_that_are_no_model_are_named_in_one_line(kind, tmp_path, capsys):
    change, message = CHANGES[kind]
    torch.save({"state_dict": changed(change)}, tmp_path / "file.pth")
    assert convert(tmp_path / "file.pth", "--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1
    assert len(error) < 2000
    assert not (tmp_path / "out").exists()


def test_zero_heads_and_other_impossible_settings_are_named():
    for overrides in ({"num_attention_heads": 0}, {"num_attention_heads": 5}, {"num_attention_heads": "two"}):
        with pytest.raises(ConversionError, match="no model has these shapes"):
            convert_state_dict(official("vit"), **overrides)


def test_numbers_in_a_file_do_not_reach_memory(tmp_path):
    """A tensor whose sizes, steps or place exceed its storage."""
    torch.save({"state_dict": {"a": torch.ones(4)}}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    program = records["a/data.pkl"]
    sizes = b"K\x04\x85q"  # the shape (4,), then put into the memo
    assert program.count(sizes) == 1
    for size in (
        b"K\x05",
        b"J\xff\xff\xff\x7f",
        b"\x8a\x09" + b"\xff" * 8 + b"\x00",
        b"J\xff\xff\xff\xff",
        b"N",
        b"G" + bytes(8),
    ):
        zipped(tmp_path / "b.pth", records | {"a/data.pkl": program.replace(sizes, size + b"\x85q")})
        with pytest.raises(DamagedError, match=r"larger than its storage|impossible sizes"):
            read(tmp_path / "b.pth")


# Outputs


def test_outputs_that_cannot_be_written_are_named_before_any_work(whole, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output in ("", tmp_path / "file" / "below", tmp_path / ("x" * 300), "/proc/here/out"):
        assert convert(whole, "--output_dir", output) == 2, output
        error = capsys.readouterr().err
        assert "--output_dir" in error
        assert error.count("\n") == 1
    assert convert("x" * 5000 + ".pth", "--output_dir", tmp_path / "out") == 2
    assert "cannot be read: File name too long" in capsys.readouterr().err
    assert convert("/dev/zero", "--output_dir", tmp_path / "out") == 2
    assert "/dev/zero is not a file" in capsys.readouterr().err


# Chance


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about sparse and quantized tensors
def test_mutated_files_convert_or_are_refused(tmp_path, monkeypatch):
    """The short form of benchmarks/fuzz_convert.py, in this process."""
    monkeypatch.chdir(tmp_path)
    seeds = fuzz_convert.write_seeds(tmp_path / "seeds")
    expected = fuzz_convert.expected_weights(seeds, tmp_path / "whole")
    outcomes = set()
    for index in range(60):
        form, mutation, content = fuzz_convert.mutated(seeds, 1, index)
        path = tmp_path / f"mutated{seeds[form].suffix}"
        path.write_bytes(content)
        outcome, line = fuzz_convert.outcome_of(path, tmp_path / f"out-{index}", expected[form])
        row = {"outcome": outcome, "seconds": 0, "memory": 0, "events": []}
        assert fuzz_convert.judge(form, mutation, len(content), row) is None, (index, form, mutation, line)
        outcomes.add(outcome)
    assert {"converted", "refused"} <= outcomes
    assert not list(tmp_path.rglob("hacked"))


@pytest.mark.slow
def test_mutated_files_in_processes_with_limits(tmp_path):
    command = [sys.executable, fuzz_convert.__file__, "--files", "10", "--seed", "2", "--work_dir", tmp_path]
    done = subprocess.run([*command, "--output", tmp_path / "out.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out.json").read_text())
    assert (summary["files"], summary["wrong"]) == (10, {})
