"""Writing TOML: just the tables, lists and scalars that a scenario is made of."""

import json
from collections.abc import Mapping
from typing import Any


def toml_text(table: Mapping[str, Any]) -> str:
    """A plain table (see ``table_of``) as TOML text: keys first, then tables, in their order."""
    return "\n".join(_lines(table, "")).strip() + "\n"


def _lines(table: Mapping[str, Any], at: str) -> list[str]:
    lines = [f"{_key(key)} = {_value(value)}" for key, value in table.items() if not _is_table(value)]
    for key, value in table.items():
        name = f"{at}{_key(key)}"
        if isinstance(value, Mapping):
            inner = _lines(value, f"{name}.")
            header = [] if inner and inner[0] == "" else ["", f"[{name}]"]
            lines += [*header, *inner]
        elif _is_table(value):
            for each in value:
                lines += ["", f"[[{name}]]", *_lines(each, f"{name}.")]
    return lines


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
    )


def _key(key: str) -> str:
    bare = bool(key) and all(each.isascii() and (each.isalnum() or each in "-_") for each in key)
    return key if bare else _text(key)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, str):
        return _text(value)
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _text(text: str) -> str:
    """JSON's escapes are TOML's as well; DEL alone must be escaped in TOML only."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
