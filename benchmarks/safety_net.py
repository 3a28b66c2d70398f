"""Record losses, weights and metrics of short runs of one source tree, and compare another tree with the recording.

    python benchmarks/safety_net.py record --tree PATH/TO/OLD --output FILE.json
    python benchmarks/safety_net.py compare --tree . --against FILE.json

Everything runs on one CPU thread in float32, offline, with a fixed seed, and must be bit-identical: losses and
metrics as floats, weights by SHA-256. `compare` prints one line per difference and exits with 1 if there is one.
Recordings are comparable only on the same kind of CPU with the same packages. `compare` prints a note where these
differ; record the old tree again then. Temporary: delete this file when the refactoring is done.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, Features, Image, disable_progress_bars
from safetensors import safe_open


STEPS = 20
TIMEOUT = 600  # seconds per command
PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "datasets", "numpy", "pillow", "scikit-learn")
WRITE_DIGITS = """
import sys, mocov3_hf
from mocov3_hf.data.digits import write_digits
write_digits(sys.argv[1])
print(mocov3_hf.__file__)
"""


class Case(NamedTuple):
    """One command.

    Attributes:
        script: file in `scripts`.
        options: in the spelling from before the refactoring; {quickstart} is the folder of that case's run.
        data: name of the data set, digits or shards.
        num_processes: more than one are started by torchrun.
        trained: whether the run trains by steps, and so leaves losses and weights.
        expected_to_change: differences are printed but are no failure.
    """

    script: str
    options: str
    data: str = "digits"
    num_processes: int = 1
    trained: bool = True
    expected_to_change: bool = False

    @property
    def needs_quickstart(self) -> bool:
        return "{quickstart}" in self.options


RUN = f"--max_steps {STEPS} --logging_steps 1 --mixed_precision no --seed 0 "
SMALL = RUN + "--image_size 32 --train_batch_size 64 --head_hidden_size 64 --projection_dim 16 "
TINY = '{"hidden_size":32,"num_hidden_layers":2,"num_attention_heads":2,"intermediate_size":64,'
VIT = f"--backbone_config {TINY}" + '"patch_size":8} '
CONV_STEM = f"--backbone_config {TINY}" + '"patch_size":16,"stem":"conv"} '
OTHER_VIT = f"--backbone_config {TINY}" + '"patch_size":8,"model_type":"vit","image_size":32} '
RESNET = '--backbone_config {"embedding_size":8,"hidden_sizes":[16,32],"depths":[1,1]} '
VIT_RECIPE = "--recipe mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k --base_learning_rate 1e-3 " + SMALL
RESNET_RECIPE = "--recipe mocov3_resnet50_8xb512-amp-coslr-100e_in1k " + SMALL
ONE_WORKER, NO_WORKERS = "--dataloader_num_workers 1 ", "--dataloader_num_workers 0 "
LABELED = "--model {quickstart} --test_split test "
FINETUNE = "--recipe vit-base-p16_mocov3-pre_8xb64-coslr-150e_in1k --train_batch_size 64 --ema_momentum 0.1 "
FINETUNE += "--base_learning_rate 1e-3 " + RUN + LABELED
PLAIN_IMAGES = "--augment false --mixup_alpha 0 --cutmix_alpha 0 --rand_augment_num_ops 0 "
PLAIN_IMAGES += "--random_erasing_probability 0 "
LINEAR = "--recipe vit-small-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k --train_batch_size 64 " + RUN + LABELED

CASES = {
    "quickstart": Case("pretrain.py", "--recipe quickstart " + RUN),
    "vit": Case("pretrain.py", VIT_RECIPE + VIT + ONE_WORKER),
    "other_vit": Case("pretrain.py", VIT_RECIPE + OTHER_VIT + NO_WORKERS),
    "resnet": Case("pretrain.py", RESNET_RECIPE + RESNET + ONE_WORKER),
    "conv_stem": Case("pretrain.py", VIT_RECIPE + CONV_STEM + NO_WORKERS),
    "two_processes": Case("pretrain.py", VIT_RECIPE + VIT + NO_WORKERS, num_processes=2),
    "two_processes_resnet": Case("pretrain.py", RESNET_RECIPE + RESNET + NO_WORKERS, num_processes=2),
    "streaming": Case("pretrain.py", VIT_RECIPE + VIT + ONE_WORKER + "--streaming true", data="shards"),
    "gradient_cache": Case("pretrain.py", VIT_RECIPE + VIT + NO_WORKERS + "--gradient_cache_chunk_size 16"),
    "knn": Case("knn.py", LABELED + "--mixed_precision no", trained=False),
    "linear": Case("linear_probe.py", LINEAR),
    "linear_cached": Case("linear_probe.py", "--cached --num_train_epochs 10 " + LABELED, trained=False),
    "finetune": Case("finetune.py", FINETUNE + PLAIN_IMAGES),
    "finetune_augmented": Case("finetune.py", FINETUNE, expected_to_change=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["record", "compare"])
    parser.add_argument("--tree", type=Path, required=True, help="Source tree to run: with src and scripts.")
    parser.add_argument("--output", type=Path, help="File to write the recording to; required by record.")
    parser.add_argument("--against", type=Path, help="Recording to compare with; required by compare.")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="Cases to run.")
    parser.add_argument(
        "--rename", nargs="+", default=[], metavar="OLD=NEW", help="Options to spell differently, as model=path."
    )
    options = parser.parse_args()
    needed = {"record": "output", "compare": "against"}[options.command]
    if getattr(options, needed) is None:
        parser.error(f"{options.command} needs --{needed}")
    names = dict(pair.split("=", 1) for pair in options.rename)
    recording = json.loads(options.against.read_text()) if options.command == "compare" else None

    started = time.perf_counter()
    found = run_cases(options.tree.resolve(), options.cases, names)
    found["seconds"] = round(time.perf_counter() - started, 1)
    failed = [f"{name}: {case['error']}" for name, case in found["cases"].items() if "error" in case]
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    differences = failed if recording is None else compare(recording, found)
    for line in differences:
        print(line)
    print(f"{len(found['cases'])} cases in {found['seconds']} s, {len(differences)} differences or failures")
    sys.exit(1 if differences else 0)


def run_cases(tree: Path, names: Iterable[str], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Run the cases, and quickstart where another needs it, in a folder that is deleted afterwards."""
    names = [*names]
    if any(CASES[name].needs_quickstart for name in names) and "quickstart" not in names:
        names.append("quickstart")
    found: dict[str, Any] = {"environment": environment(), "cases": {}}
    with tempfile.TemporaryDirectory(prefix="safety_net_") as temporary:
        folder = Path(temporary)
        variables = process_variables(tree, folder)
        written = run([sys.executable, "-c", WRITE_DIGITS, str(folder / "digits")], variables)
        imported = Path(written.stdout.split()[-1]) if written.returncode == 0 else None
        if imported is None:
            sys.exit(f"{tree} cannot write the digits: {error_line(written.stderr)}")
        if not imported.is_relative_to(tree / "src"):
            sys.exit(f"the package was imported from {imported}, expected one in {tree / 'src'}")
        found["digits_sha256"] = hash_files(folder / "digits")
        write_shards(folder / "digits" / "train", folder / "shards")
        for name in (name for name in CASES if name in names):
            started = time.perf_counter()
            found["cases"][name] = run_case(CASES[name], tree, folder, name, variables, renamed)
            print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return found


def process_variables(tree: Path, folder: Path) -> dict[str, str]:
    """The environment of every command: this tree alone, one thread, no GPU, no network, caches of its own."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "ACCELERATE_"))},
        "PYTHONPATH": str(tree / "src"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


def run_case(
    case: Case, tree: Path, folder: Path, name: str, variables: Mapping[str, str], renamed: Mapping[str, str]
) -> dict[str, Any]:
    """Losses, weights and metrics of one command, or its error."""
    output = folder / name
    words = case.options.replace("{quickstart}", str(folder / "quickstart")).split()
    words += ["--dataset_name", str(folder / case.data), "--output_dir", str(output)]
    words = ["--" + renamed.get(word[2:], word[2:]) if word.startswith("--") else word for word in words]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(case.num_processes)]
    launcher = torchrun if case.num_processes > 1 else []  # --standalone picks a free port
    done = run([sys.executable, *launcher, str(tree / "scripts" / case.script), *words], variables)
    if done.returncode != 0:
        return {"error": f"{case.script} ended with {done.returncode}: {error_line(done.stderr)}"}
    found: dict[str, Any] = {"expected_to_change": True} if case.expected_to_change else {}
    if case.trained:
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
        if list(losses) != list(range(1, STEPS + 1)):
            return {"error": f"metrics.jsonl has losses of the steps {list(losses)}, expected 1 to {STEPS}"}
        found["losses"] = list(losses.values())
        found["weights_sha256"] = hash_weights(output)
        found["checkpoint_sha256"] = hash_weights(output / f"checkpoint-{STEPS}", "model*.safetensors")
        found |= {key: line[key] for line in lines if "loss" not in line for key in line if "_loss" in key}
    if (output / "results.json").exists():
        found |= json.loads((output / "results.json").read_text())["results"][-1]["metrics"]
    elif case.script != "pretrain.py":
        return {"error": f"{case.script} left no results.json"}
    return found


def run(command: list[str], variables: Mapping[str, str]) -> subprocess.CompletedProcess:
    """A command's output; one that runs longer than TIMEOUT is ended, with a line about it in its stderr."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=dict(variables)) as process:
        try:
            stdout, stderr = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun passes this on to its workers, and kills them half a minute later
            try:
                stdout, stderr = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                stdout, stderr = process.communicate()
            return subprocess.CompletedProcess(command, 1, stdout, f"{stderr}\nerror: not finished in {TIMEOUT} s\n")
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def error_line(stderr: str) -> str:
    """The last line that reports an error, or else the last line: torchrun prints a box after the error."""
    lines = stderr.strip().splitlines() or ["no output"]
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: ?)?([\w.]*Error|error): ?\S", line)]
    return (errors or lines)[-1].strip()


def compare(recording: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """One line per difference; what the recording does not have is not compared."""
    for name, value in recording["environment"].items():
        if found["environment"].get(name) != value:
            print(f"note: recorded with {name} {value}, here it is {found['environment'].get(name)}")
    if recording["digits_sha256"] != found["digits_sha256"]:
        return ["digits: the images differ"]
    lines = []
    for name, now in found["cases"].items():
        before = recording["cases"][name]
        if "error" in now:
            lines.append(f"{name}: {now['error']}")
            continue
        # By repr: floats must be equal to the last digit, and nan is equal to nan.
        changed = [key for key, value in before.items() if repr(value) != repr(now.get(key))]
        changes = [f"{name}: {describe(key, before[key], now.get(key))}" for key in changed]
        if before.get("expected_to_change", False):
            for line in changes:
                print(f"expected: {line}")
        else:
            lines += changes
    return lines


def describe(key: str, before: Any, now: Any) -> str:
    """The difference of one value; of losses, the first step that differs and how many do."""
    if key != "losses" or now is None:
        return f"{key} was {before!r}, is {now!r}"
    steps = [step for step in range(STEPS) if repr(before[step]) != repr(now[step])]
    first = steps[0]
    return f"loss of step {first + 1} was {before[first]!r}, is {now[first]!r} ({len(steps)} steps differ)"


def hash_weights(folder: Path, pattern: str = "*.safetensors") -> str:
    """SHA-256 over name, dtype, shape and bytes of all tensors in the files of a folder, sorted by name."""
    tensors = {}
    for path in sorted(folder.glob(pattern)):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not tensors:
        raise ValueError(f"{folder} has no weights: expected {pattern}")
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_files(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.png")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def write_shards(images: Path, folder: Path) -> None:
    """The images in three parquet files of unequal length."""
    disable_progress_bars()
    paths = sorted(map(str, images.rglob("*.png")))
    folder.mkdir()
    for shard, rows in enumerate((slice(0, 300), slice(300, 900), slice(900, None))):
        encoded = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths[rows]]
        dataset = Dataset.from_dict({"image": encoded}, features=Features({"image": Image()}))
        dataset.to_parquet(folder / f"train-{shard:05}-of-00003.parquet")


def environment() -> dict[str, str]:
    """What has an influence on the last bit."""
    facts = {"machine": platform.machine(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    return facts | {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


if __name__ == "__main__":
    main()
