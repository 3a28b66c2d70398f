"""The command `mocov3`: its table, its exit codes, and what it does without torch."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mocov3_cli
from mocov3_hf import options, recipe_files, reporting


SCRIPTS = Path(__file__).parents[2] / "scripts"
# The script of a command, where its name is another.
SCRIPT_NAMES = {
    "linear-probe": "linear_probe",
    "extract": "extract_features",
    "convert": "convert_checkpoint",
    "push": "push_to_hub",
}


def ended(arguments, code, capsys):
    with pytest.raises(SystemExit) as raised:
        mocov3_cli.main(arguments)
    assert raised.value.code == code
    return capsys.readouterr()


@pytest.mark.parametrize("name", mocov3_cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    for arguments in (["--help"], ["--help", "all"]):
        text = ended([name, *arguments], 0, capsys).out
        assert text.startswith(f"usage: mocov3 {name} ")
        assert len(text.splitlines()) < (150 if arguments == ["--help"] else 400)
        assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", mocov3_cli.COMMANDS)
def test_every_command_refuses_unknown_options_with_exit_code_2(name, capsys):
    error = ended([name, "--no_such_option_at_all", "1"], 2, capsys).err
    assert error.startswith("error: there is no option '--no_such_option_at_all'")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", sorted(set(mocov3_cli.COMMANDS) - {"recipes", "zoo"}))
def test_every_command_has_a_script(name):
    script = SCRIPTS / f"{SCRIPT_NAMES.get(name, name)}.py"
    assert f'main(["{name}", *sys.argv[1:]])' in script.read_text(encoding="utf-8")


def test_unknown_command_offers_the_nearest(capsys):
    assert ended(["pretrian"], 2, capsys).err == "error: there is no command 'pretrian'; did you mean 'pretrain'?\n"


def test_misspelled_option_before_a_command_offers_the_nearest(capsys):
    assert ended(["--verison"], 2, capsys).err.endswith("'--verison'; did you mean '--version'?\n")


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_a_closed_pipe_is_no_error(argument):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-u", "-m", "mocov3_cli", argument]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")


def test_old_spelling_with_underscore(capsys):
    assert ended(["linear_probe", "--help"], 0, capsys).out.startswith("usage: mocov3 linear-probe")


def test_recipes(capsys):
    mocov3_cli.main(["recipes"])
    listed = capsys.readouterr().out
    assert "  quickstart\n" in listed
    groups = re.split(r"^([a-z-]+):$", listed, flags=re.MULTILINE)[1:]
    assert groups[::2] == ["pretrain", "linear-probe", "finetune"]
    for command, names in zip(groups[::2], groups[1::2], strict=True):
        assert names.split() == recipe_files.recipe_names(command)
        assert all(
            f" {command} " in recipe_files.find_recipe(name).read_text().splitlines()[0] for name in names.split()
        )
    assert sum(len(names.split()) for names in groups[1::2]) == len(list(recipe_files.RECIPES.rglob("*.yaml")))
    mocov3_cli.main(["recipes", "quickstart"])
    written = (recipe_files.RECIPES / "quickstart.yaml").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == written.strip()
    assert "did you mean 'quickstart'?" in ended(["recipes", "quikstart"], 2, capsys).err


def test_zoo(capsys):
    mocov3_cli.main(["zoo"])
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == [
        "name",
        "architecture",
        "stage",
        "epochs",
        "params",
        "M",
        "GFLOPs",
        "top-1",
        "%",
        "source",
    ]
    assert any(row.startswith("vit-small-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k ") for row in rows)


# Ends the process where torch would be imported, and prints how threads would wait.
AT_THE_IMPORT_OF_TORCH = """
import os, runpy, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            import mocov3_cli
            print({name: os.environ[name] for name in mocov3_cli.WAITING if name in os.environ}, flush=True)
            os._exit(0)

sys.meta_path.insert(0, Finder())
"""
STARTS = {
    "mocov3": "import mocov3_cli; mocov3_cli.main(['knn', '--model', 'm'])",
    "-m mocov3_hf": "sys.argv[:] = ['-m', 'knn']; runpy.run_module('mocov3_hf')",
    **{
        name: f"sys.argv[:] = ['{name}']; runpy.run_path({str(SCRIPTS / name)!r}, run_name='__main__')"
        for name in ("pretrain.py", "quickstart.py")
    },
}


@pytest.mark.parametrize("start", STARTS)
def test_threads_wait_passively_from_the_import_of_torch_on(start):
    """OpenMP reads the environment when torch is imported; what is set later has no effect."""
    clean = {name: value for name, value in os.environ.items() if name not in mocov3_cli.WAITING}
    command = [sys.executable, "-c", AT_THE_IMPORT_OF_TORCH + STARTS[start]]
    result = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
    assert result.stdout == "{'OMP_WAIT_POLICY': 'PASSIVE', 'KMP_BLOCKTIME': '0'}\n"


@pytest.mark.parametrize("name", mocov3_cli.WAITING)
def test_how_threads_wait_is_the_users_choice(monkeypatch, name):
    for other in mocov3_cli.WAITING:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "1000")
    mocov3_cli.wait_passively()
    assert {other: os.environ[other] for other in mocov3_cli.WAITING if other in os.environ} == {name: "1000"}


def test_help_and_version_need_no_torch():
    code = (
        "import sys, mocov3_cli; mocov3_cli.main(['--help']); mocov3_cli.main(['--version']);"
        " assert not {'torch', 'transformers', 'mocov3_hf'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"  {name} " in result.stdout for name in mocov3_cli.COMMANDS)


@pytest.mark.slow
def test_module_is_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "mocov3_hf", "nonsense"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.strip().endswith("commands are " + ", ".join(mocov3_cli.COMMANDS))


@pytest.mark.slow
def test_a_reader_that_stops_early_gets_no_traceback():
    command = f"{sys.executable} -m mocov3_hf zoo | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert result.stdout.startswith("name")
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("one\ntwo"), 2, "error: one two\n"),
        (reporting.UsageError("wrong"), 2, "error: wrong\n"),
        (reporting.RunError("failed"), 1, "error: failed\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (ValueError("Traceback (most recent call last):\n  File x\nValueError: bad image"), 2, "error: bad image\n"),
    ],
)
def test_exit_codes(error, code, message, capsys):
    with pytest.raises(SystemExit) as raised, reporting.reporting():
        raise error
    assert raised.value.code == code
    assert capsys.readouterr().err == message


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), reporting.reporting():
        raise ZeroDivisionError


def test_one_process_speaks_for_all(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), reporting.reporting():
        raise ValueError("wrong")
    reporting.warn("old")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "environment", "shown"),
    [
        (["/usr/bin/mocov3", "pretrain", "a b"], {}, "mocov3 pretrain 'a b'"),
        (["scripts/pretrain.py", "--x"], {}, "python scripts/pretrain.py --x"),
        (["/lib/mocov3_hf/__main__.py", "pretrain"], {}, "python -m mocov3_hf pretrain"),
        (
            ["/lib/mocov3_hf/__main__.py", "pretrain"],
            {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
            "torchrun --nproc_per_node 2 -m mocov3_hf pretrain",
        ),
        (
            ["scripts/pretrain.py"],
            {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            "torchrun --nproc_per_node 2 scripts/pretrain.py",
        ),
        (
            ["/lib/mocov3_hf/__main__.py", "pretrain"],
            {"WORLD_SIZE": "8", "ACCELERATE_MIXED_PRECISION": "no"},
            "accelerate launch --num_processes 8 -m mocov3_hf pretrain",
        ),
    ],
)
def test_messages_name_the_command_that_was_typed(monkeypatch, argv, environment, shown):
    monkeypatch.setattr(sys, "argv", argv)
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert reporting.typed_command() == shown


def handles(process_id, number):
    """Whether a process handles a signal itself."""
    status = Path(f"/proc/{process_id}/status").read_text()
    (mask,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("program", "number"),
    [
        (["-m", "mocov3_hf", "knn"], signal.SIGTERM),
        ([str(SCRIPTS / "pretrain.py")], signal.SIGTERM),
        ([str(SCRIPTS / "finetune.py")], signal.SIGINT),
    ],
)
def test_a_signal_while_packages_are_imported_ends_in_one_line(program, number):
    """Importing torch takes seconds; nothing has begun then."""
    process = subprocess.Popen([sys.executable, *program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not handles(process.pid, signal.SIGTERM):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (128 + number, "")
    assert errors == f"stopped by {number.name}: start the command again\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt, None])
def test_after_a_command_signals_are_as_before(error, monkeypatch, capfd):
    def command(arguments):
        assert signal.getsignal(signal.SIGTERM) is mocov3_cli.end
        if error is not None:
            raise error

    monkeypatch.setattr(options, "recipes_main", command)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    if error is None:
        mocov3_cli.main(["recipes"])
    else:
        with pytest.raises(SystemExit) as ended:
            mocov3_cli.main(["recipes"])
        assert ended.value.code == 130
        assert capfd.readouterr().err == "stopped by SIGINT: start the command again\n"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
