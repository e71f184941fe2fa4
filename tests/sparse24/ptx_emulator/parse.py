"""From the text of a kernel to its statements, with labels and registers that are unique."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .errors import EmulatorError


@dataclass
class Program:
    name: str
    threads: int
    cluster: int
    parameters: list[tuple[str, str]]  # (type or "tensor map", name)
    statements: list[str] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)  # of brx.idx
    register_types: dict[str, str] = field(default_factory=dict)
    register_names: list[str] = field(default_factory=list)


_STATEMENT = re.compile(r"\s*(?:([$%\w]+)\s*:(?!:)|([{}])|((?:[^;{}\"]|\{[^{};]*\}|\"[^\"]*\")+);)")
_NAME = re.compile(r"[$%]?[A-Za-z_$][\w$]*")


def parse(ptx: str) -> Program:
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.S)
    text = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", text, flags=re.M)
    program, position = _head(text)
    scopes, counter = [{}], 0

    def resolve(match: re.Match[str]) -> str:
        return next((scope[match[0]] for scope in reversed(scopes) if match[0] in scope), match[0])

    while scopes:
        match = _STATEMENT.match(text, position)
        if match is None:
            raise EmulatorError(f"cannot parse: {text[position : position + 80]!r}")
        position = match.end()
        label, brace, statement = match.groups()
        if brace == "{":
            counter += 1
            scopes.append({})
            # labels are local to their block, and may be used before they stand there
            for name in re.findall(r"(?:^|[;{}])\s*(\w+):(?!:)", _block(text, position), flags=re.M):
                scopes[-1][name] = f"{name}#{counter}"
        elif brace == "}":
            scopes.pop()
        elif label:
            program.labels[scopes[-1].get(label, label)] = len(program.statements)
        elif statement.lstrip().startswith(".reg"):
            for name, kind in _registers(statement):
                unique = f"{name}#{counter}" if len(scopes) > 1 else name
                scopes[-1][name] = unique
                program.register_types[unique] = kind
        elif statement.lstrip().startswith(".pragma"):
            continue
        elif statement.lstrip().startswith(".branchtargets"):
            last = next(reversed(program.labels))
            program.tables[last] = [name.strip() for name in statement.split(None, 1)[1].split(",")]
        elif statement.lstrip().startswith("."):
            raise EmulatorError(f"directive not supported: {statement.strip()}")
        else:
            program.statements.append(_NAME.sub(resolve, " ".join(statement.split())))
    program.statements.append("ret")  # what follows the last statement
    program.register_names = list(program.register_types)
    return program


def _head(text: str) -> tuple[Program, int]:
    """What stands before the body, and where the body starts."""
    head = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", text, flags=re.S)
    if head is None:
        raise EmulatorError("no .entry in the PTX")
    threads = re.search(r"\.reqntid\s+(\d+)", head[3])
    cluster = re.search(r"\.reqnctapercluster\s+(\d+)", head[3])
    parameters = []
    for declaration in filter(str.strip, head[2].split(",")):
        kind, name = re.search(r"\.([ubfs]\d+)\b.*?([\w$]+)(?:\[\d+\])?\s*$", declaration, flags=re.S).groups()
        parameters.append(("tensor map" if "[" in declaration else kind, name))
    program = Program(head[1], int(threads[1]) if threads else 32, int(cluster[1]) if cluster else 1, parameters)
    return program, head.end()


def _registers(statement: str) -> list[tuple[str, str]]:
    """Name and type of each that a `.reg` declares."""
    _, kind, names = statement.split(None, 2)
    found = []
    for name in re.split(r"\s*,\s*", names.strip()):
        many = re.match(r"([%\w]+?)<(\d+)>", name)
        found += [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
    return [(name, kind.lstrip(".")) for name in found]


def _block(text: str, start: int) -> str:
    """From `start` up to the brace that closes what was opened before it."""
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : start + brace.start()]
    raise EmulatorError("a brace is not closed")


def split(operands: str) -> list[str]:
    """Split at the commas outside of brackets and braces."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(operands):
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            parts.append(operands[start:i].strip())
            start = i + 1
    last = operands[start:].strip()
    return [*parts, last] if last else parts
