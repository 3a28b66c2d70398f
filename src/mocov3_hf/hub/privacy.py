"""What is published says nothing about the machine: paths, user names and host names leave the files of a push."""

import contextlib
import getpass
import html
import json
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


TEXTS = (".json", ".jsonl", ".yaml", ".yml", ".html", ".svg", ".md", ".txt")
# A character of a path: also as JSON and HTML write the unusual ones.
PART = r"(?:[\w.@+~%,=#-]|\\u[0-9a-fA-F]{4}|&(?:amp|\#39|\#x27);)"
PATHS = re.compile(
    rf"(?<![\w/.<+~\\-])(?:file:/*)?(?:~{PART}*|/{PART}+)(?:/{PART}+)+/?"
    r"|(?<![A-Za-z])[A-Za-z]:[\\/]+(?:[^\\/:*?\"<>|\s]+[\\/]+)*[^\\/:*?\"<>|\s]+"
    r"|(?<![\\\w])\\\\(?:\\\\)?[\w.-]+(?:\\+[\w.$-]+)+"
)
HOMES = re.compile(rf"(?:/home/|/Users/|:[\\/]+Users[\\/]+)({PART}+)")
IS_HOME = re.compile(rf"(?:~{PART}*|/root|(?:/home|/Users|[A-Za-z]:[\\/]+Users)[\\/]+[^\\/]+)[\\/]*")
# What no path can be in, although it looks like one.
LEFT_ALONE = re.compile(r"(data:[\w/+.;=-]+;base64,[A-Za-z0-9+/=]+|<(?:script|style)\b.*?</(?:script|style)>)", re.S)
# Names of elements and attributes, and values of those that refer to styles.
MARKUP = re.compile(r"<([a-z]\w*)|\s([a-z][\w-]*)=|\b(?:class|id|type|role)=\"([^\"]*)\"")
# Names that say nothing about a person or a machine.
COMMON = {"root", "user", "users", "home", "ubuntu", "admin", "runner", "data", "test", "localhost", "jovyan"}
# Keys of a record whose values name a person or a machine.
NAMING = {"user": ("user", "username"), "host": ("host", "hostname", "node", "fqdn")}
MAX_HEADER = 100 << 20  # what safetensors permits
PNG, PNG_TEXTS = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt", b"eXIf")


def hide_machine(folder: Path, *, keep: tuple[str, ...] = ()) -> None:
    """
    Rewrite the files of a staged folder without paths and names of this machine; only files that change are written.

    A path becomes its last component, a home folder `home`, a user `user`, a host `host`. Files are replaced, never
    written in place: they may be links to the originals.

    Args:
        folder: With the files to publish.
        keep: Names of files that stay as they are.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in keep]
    texts = {
        path: path.read_bytes().decode("utf-8", errors="surrogateescape") for path in files if path.suffix in TEXTS
    }
    keys, strings = set(), set()
    names = {name.lower(): "user" for text in texts.values() for name in HOMES.findall(text)} | own_names()
    for path, text in texts.items():
        for key, value in (pair for record in parsed(path, text) for pair in walk(record)):
            # The class names of a configuration may be those of users: they stay there, and hide nothing elsewhere.
            keys.update(() if is_config(path) else [key])
            if isinstance(value, str):
                strings.add(value)
                names |= {value.lower(): word for word, places in NAMING.items() if key in places}
        if path.suffix in (".html", ".svg"):
            keys.update(word for found in MARKUP.findall(text) for word in " ".join(found).lower().split())
    paths = {text for text in strings | keys if text[:1] in "/~\\" and len(text) > 1 and "\n" not in text}
    names = {name: word for name, word in names.items() if len(name) > 2 and name not in COMMON | keys}
    for path, text in texts.items():
        hidden = hide(text, paths, {} if is_config(path) else names)
        replace(path, hidden.encode("utf-8", errors="surrogateescape"))
    for path in files:
        if path.suffix == ".png":
            replace(path, without_texts(path.read_bytes()))
        elif path.suffix == ".safetensors":
            hide_in_metadata(path, paths, names)


def is_config(path: Path) -> bool:
    return path.name.endswith("config.json")


def parsed(path: Path, text: str) -> Iterator[Any]:
    """The records in a JSON, JSON Lines or YAML file; what is damaged is not one."""
    if path.suffix in (".yaml", ".yml"):
        with contextlib.suppress(yaml.YAMLError, RecursionError):
            yield yaml.safe_load(text)
    for part in [text] if path.suffix == ".json" else text.splitlines() if path.suffix == ".jsonl" else []:
        with contextlib.suppress(ValueError, RecursionError):
            yield json.loads(part)


def walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every value in a record with its key; values of a list have that of the list."""
    waiting = [("", value)]
    while waiting:
        key, value = waiting.pop()
        yield key, value
        if isinstance(value, dict):
            waiting += [(str(name), inner) for name, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(key, inner) for inner in value]


def own_names() -> dict[str, str]:
    """The names of the user and of the machine that push, and what replaces them."""
    hosts = dict.fromkeys((platform.node().lower(), platform.node().lower().partition(".")[0]), "host")
    try:
        return hosts | {getpass.getuser().lower(): "user"}
    except (OSError, KeyError):  # a user without a name, as in containers
        return hosts


def hide(text: str, paths: set[str], names: dict[str, str]) -> str:
    """A text without paths and names; what it embeds in base64 and its scripts stay."""
    written = (str, lambda path: json.dumps(path)[1:-1], html.escape, lambda path: path.replace("'", "''"))
    forms = sorted({form(path) for path in paths for form in written}, key=len, reverse=True)
    whole = "|".join(re.escape(form).replace(r"\ ", r"\s+") for form in forms)  # YAML wraps lines
    words = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    parts = LEFT_ALONE.split(text)
    for index in range(0, len(parts), 2):
        if whole:
            parts[index] = re.sub(rf"(?<![\w/.<+~\\-])(?:{whole})(?![\w/])", last_part, parts[index])
        parts[index] = PATHS.sub(last_part, parts[index])
        if words:
            parts[index] = re.sub(
                rf"(?<![^\W_])(?:{words})(?![^\W_])",
                lambda found: names[found.group().lower()],
                parts[index],
                flags=re.IGNORECASE,
            )
    return "".join(parts)


def last_part(found: re.Match[str]) -> str:
    """The last component of a path; that of a home folder is a user."""
    path = found.group()
    return "home" if IS_HOME.fullmatch(path) else re.split(r"[\\/]", path.rstrip("\\/"))[-1] or "home"


def replace(path: Path, content: bytes) -> None:
    """Give a file another content without touching what it is a link to."""
    if content != path.read_bytes():
        path.unlink()
        path.write_bytes(content)


def without_texts(content: bytes) -> bytes:
    """A PNG image without its comments and its EXIF data; anything else as it is."""
    kept, place = [PNG], len(PNG)
    while content.startswith(PNG) and place + 12 <= len(content):
        size = 12 + int.from_bytes(content[place : place + 4], "big")
        if content[place + 4 : place + 8] not in PNG_TEXTS:
            kept.append(content[place : place + size])
        place += size
    return b"".join(kept) if place == len(content) else content


def hide_in_metadata(path: Path, paths: set[str], names: dict[str, str]) -> None:
    """Rewrite a safetensors file if its metadata names the machine."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(path.stat().st_size, MAX_HEADER):
            return
        header = json.loads(file.read(size))
        metadata = header.get("__metadata__", {})
        hidden = {key: hide(str(value), paths, names) for key, value in metadata.items()}
        if hidden == metadata:
            return
        header["__metadata__"] = hidden
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # tensors stay aligned
        other = path.with_name(f".{path.name}")
        with other.open("wb") as copy:
            copy.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(file, copy)
    other.replace(path)
