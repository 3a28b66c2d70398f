"""
Pickles read as data: a machine that builds containers and records, and that cannot call anything.

A pickle is a program. `torch.load(weights_only=True)` runs it with a list of permitted functions, some of which
allocate as much memory as the file asks for. Here no function is ever called: what the program would call is recorded
as a `Call`, and the reader of the file decides what the record means.
"""

import re
from dataclasses import dataclass, field
from pickletools import genops
from typing import Any, BinaryIO


MAX_OPERATIONS = 300_000  # a ViT-L with its optimizer takes 50,000; these are at most 30 MB of objects
LITERALS = re.compile(r"(SHORT_)?(BIN)?(INT[12]?|BYTES8?|STRING|UNICODE8?|FLOAT)|LONG[14]?|BYTEARRAY8")
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
CLOSED = {"LIST": list, "TUPLE": tuple, "FROZENSET": frozenset}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# A tuple as a key can be nested so deeply that hashing it ends the process.
KEYS = str | int | float | bytes | None
# Names that only make tensors and plain containers: those that `torch.load(weights_only=True)` permits.
HARMLESS = re.compile(
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|(builtins|__builtin__)\.(set|bytearray|complex)"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter"
    r"|torch\.serialization\._get_layout|torch\.(cuda\.|sparse\.|cuda\.sparse\.|storage\.)?\w*(Tensor|Storage)"
    r"|torch\.(Size|device|per_(tensor|channel)_\w+|(q|b)?u?(int|float|complex|bits)\d\w*|bool|bfloat16)"
)


@dataclass(frozen=True, slots=True)
class Global:
    """A function or class by name: `module.name`."""

    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """What a pickle would call, and with what."""

    function: str
    arguments: tuple


@dataclass(frozen=True, slots=True)
class Persistent:
    """A reference to something outside the pickle: in checkpoints, the numbers of a tensor."""

    content: Any


@dataclass
class Pickle:
    """
    A pickle that was read.

    Attributes:
        value: Its object: literals, containers, `Global`, `Call` and `Persistent`.
        names: Every function and class that it names, in order.
        references: Content of every `Persistent`, in order.
    """

    value: Any = None
    names: list[str] = field(default_factory=list)
    references: list[Any] = field(default_factory=list)

    @property
    def harmful(self) -> list[str]:
        """The names other than those of tensors and plain containers."""
        return sorted({name for name in self.names if not HARMLESS.fullmatch(name)})


def read_pickle(file: BinaryIO) -> Pickle:
    """
    Read one pickle from the position of a file; what follows is not touched.

    Raises:
        ValueError, LookupError, TypeError: Not a pickle.
    """
    found, stack, marks, memo = Pickle(), [], [], {}

    def since_mark() -> list:
        begin = marks.pop()
        items = stack[begin:]
        del stack[begin:]
        return items

    def named(name: str) -> Global:
        found.names.append(name)
        return Global(name)

    for count, (operation, argument, _) in enumerate(genops(file)):
        if count > MAX_OPERATIONS:
            raise ValueError(f"its pickle has more than {MAX_OPERATIONS:,} operations")
        name = operation.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            found.value = stack.pop()
        elif name == "MARK":
            marks.append(len(stack))
        elif LITERALS.fullmatch(name):
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name in CLOSED:
            items = since_mark()
            stack.append(CLOSED[name](map(checked_key, items) if name == "FROZENSET" else items))
        elif name in TUPLES:
            items = [stack.pop() for _ in range(TUPLES[name])]
            stack.append(tuple(reversed(items)))
        elif name in ("APPEND", "APPENDS"):
            items = since_mark() if name == "APPENDS" else [stack.pop()]
            fill(stack[-1], list, lambda target, items=items: target.extend(items))
        elif name == "ADDITEMS":
            items = list(map(checked_key, since_mark()))
            fill(stack[-1], set, lambda target, items=items: target.update(items))
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else since_mark()
            if name == "DICT":
                stack.append({})
            pairs = list(zip(map(checked_key, items[::2]), items[1::2], strict=True))
            fill(stack[-1], dict, lambda target, pairs=pairs: target.update(pairs))
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument)])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else int(argument)] = stack[-1]
        elif name == "GLOBAL":
            stack.append(named(argument.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(named(f"{module}.{attribute}" if isinstance(module, str) else "an unnamed object"))
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            arguments = [stack.pop() for _ in range(2 if name == "NEWOBJ_EX" else 1)][-1]
            stack.append(call(stack.pop(), arguments))
        elif name in ("INST", "OBJ"):
            items = since_mark()
            function = named(argument.replace(" ", ".", 1)) if name == "INST" else items.pop(0)
            stack.append(call(function, tuple(items)))
        elif name == "BUILD":  # the attributes of an object, which no tensor or container needs
            stack.pop()
        elif name in ("PERSID", "BINPERSID"):
            found.references.append(argument if name == "PERSID" else stack.pop())
            stack.append(Persistent(found.references[-1]))
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            since_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            raise ValueError(f"its pickle has the unusual operation {name}")
    return found


def checked_key(key: Any) -> Any:
    if not isinstance(key, KEYS):
        raise ValueError(f"its pickle has a {type(key).__name__} as a key")
    return key


def fill(target: Any, kind: type, change: Any) -> None:
    """Change a container; the items of an object that was not made are dropped with it."""
    if isinstance(target, kind):
        change(target)
    elif not isinstance(target, Call):
        raise ValueError(f"its pickle adds items to a {type(target).__name__}")


def call(function: Any, arguments: Any) -> Any:
    """The value of a call where it is a plain container, else a record of it."""
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise ValueError("its pickle calls something without a name")
    if function.name == "collections.OrderedDict" and not arguments:
        return {}
    if function.name == "torch.Size" and len(arguments) == 1:
        return arguments[0]
    return Call(function.name, arguments)
