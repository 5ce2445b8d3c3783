"""What `cog build` derives, for local runs: `.cog/openapi_schema.json` from the signature in `predict.py`.

Cog's server refuses wrong inputs by this file, and without it lets everything through. The signature is read as Cog's
tool reads it: statically, never imported, and with the same blind spots, so that a local server and the image agree:

- a default that is neither a literal nor a module-level name of one makes its input required;
- a `ge` or `le` that is not a number literal is dropped;
- what Cog's tool leaves out or garbles (a description with escapes or in several strings) is refused with a sentence.

This module knows the form of Cog's document; it does not know which inputs this project has.
"""

import ast
import json
import os
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from settings import ROOT

# The document without what belongs to one predictor: the same for every Cog model.
TEMPLATE = Path(__file__).parent / "openapi_template.json"
Literal = bool | int | float | str | list | dict | None
PRIMITIVES = {
    "bool": {"type": "boolean"},
    "float": {"type": "number"},
    "int": {"type": "integer"},
    "str": {"type": "string"},
    "Path": {"type": "string", "format": "uri"},
}


class NotLiteral(Exception):  # noqa: N818 (a fact about an expression; only some callers call it an error)
    """The expression has no value without running it."""


def inputs(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What may stand in each input by an OpenAPI document, which keeps choices in schemas of their own."""
    schemas = document["components"]["schemas"]
    return {
        name: (schemas[field["allOf"][0]["$ref"].rpartition("/")[2]] if "allOf" in field else {}) | field
        for name, field in schemas["Input"]["properties"].items()
    }


def derive(source: str, predictor: str = "Predictor") -> dict[str, Any]:
    """The OpenAPI document of a predictor.

    Args:
        source: the text of the Python file that holds it.
        predictor: the name of its class.

    Raises:
        ValueError: a sentence that names the input and says what Cog can read.
    """
    module = ast.parse(source)
    predict = _find_predict(module, predictor)
    scope = _literals_of_module(module)
    inputs: dict[str, Any] = {}
    enums: dict[str, Any] = {}
    required = []
    for order, (parameter, default) in enumerate(_parameters(predict)):
        name = parameter.arg
        primitive, nullable = _input_type(parameter)
        settings = _input_settings(name, default, scope)
        if "choices" in settings:
            kind = PRIMITIVES[primitive]["type"]
            enums[name] = {"title": name, "description": "An enumeration.", "enum": settings["choices"], "type": kind}
        inputs[name] = {**_field(name, primitive, nullable, settings), "x-order": order}
        if not nullable and "default" not in inputs[name]:
            required.append(name)
    schemas = {"Input": {"title": "Input", "type": "object", "properties": inputs}, "Output": _output(predict), **enums}
    if required:
        schemas["Input"]["required"] = required
    document = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    document["info"]["version"] = version("cog")
    document["components"]["schemas"] = schemas | document["components"]["schemas"]
    return document


def write(project: Path) -> dict[str, Any]:
    """Derive the document of `predict.py` in `project` and write it where Cog's server looks for it; returns it."""
    document = derive((project / "predict.py").read_text(encoding="utf-8"))
    text = json.dumps(document, indent=1) + "\n"
    path = project / ".cog" / "openapi_schema.json"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(exist_ok=True)
        # A server that starts at the same moment must not read half a file.
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as aside:
            aside.write(text)
        Path(aside.name).chmod(0o644)  # else its owner alone could read it
        os.replace(aside.name, path)  # noqa: PTH105 (both are names already)
    return document


def _find_predict(module: ast.Module, predictor: str) -> ast.FunctionDef:
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == predictor:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "predict":
                    return method
    raise ValueError(f"There is no class {predictor} with a method predict.")


def _literals_of_module(module: ast.Module) -> dict[str, Literal]:
    """The module-level names that are assigned a literal; an imported name is none of them."""
    scope = {}
    for node in module.body:
        match node:
            case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), value=value):
                with suppress(NotLiteral):
                    scope[name] = _literal(value)
    return scope


def _parameters(predict: ast.FunctionDef) -> list[tuple[ast.arg, ast.expr | None]]:
    """Each parameter after self, with its default."""
    args = predict.args
    if args.posonlyargs or args.vararg or args.kwonlyargs or args.kwarg:
        raise ValueError("predict takes plain parameters only: Cog knows no *, **, / or keyword-only ones.")
    defaults = [None] * (len(args.args) - len(args.defaults)) + args.defaults
    return list(zip(args.args, defaults, strict=True))[1:]


def _input_type(parameter: ast.arg) -> tuple[str, bool]:
    """The primitive's name, and whether None is allowed too."""
    match parameter.annotation:
        case ast.Name(id=name) if name in PRIMITIVES:
            return name, False
        case (
            ast.BinOp(left=ast.Name(id=name), op=ast.BitOr(), right=ast.Constant(value=None))
            | ast.Subscript(value=ast.Name(id="Optional"), slice=ast.Name(id=name))
        ) if name in PRIMITIVES:
            return name, True
    raise ValueError(f"The type of {parameter.arg} must be one of {', '.join(PRIMITIVES)}, with or without `| None`.")


def _input_settings(name: str, default: ast.expr | None, scope: dict[str, Literal]) -> dict[str, Any]:
    """What a parameter's default says: default, description, minimum, maximum and choices, where it says them."""
    match default:
        case None:
            return {}
        case ast.Call(func=ast.Name(id="Input"), args=[], keywords=keywords):
            pass
        case _:
            with suppress(NotLiteral):
                return {"default": _resolve(default, scope)}
            raise ValueError(f"The default of {name} must be a literal or Input(…) with keywords.")
    settings: dict[str, Any] = {}
    for keyword in keywords:
        # Cog's tool takes a value in parentheses for no literal; the tree shows them only by where they end.
        end = (keyword.value.end_lineno, keyword.value.end_col_offset)
        value = keyword.value if end == (keyword.end_lineno, keyword.end_col_offset) else None
        match keyword.arg:
            case "default":
                settings["default"] = None
                with suppress(NotLiteral):
                    settings["default"] = _resolve(value, scope)
            case "description":
                settings["description"] = _description(name, value, scope)
            case "ge" | "le" as bound:
                with suppress(NotLiteral):
                    if type(number := _literal(value)) in (int, float):
                        settings["minimum" if bound == "ge" else "maximum"] = number
            case "choices":
                try:
                    settings["choices"] = _choices(keyword.value, scope)
                except NotLiteral:
                    raise ValueError(
                        f"The choices of {name} must be literals of this file; they are `{ast.unparse(keyword.value)}`."
                    ) from None
            case other:
                raise ValueError(f"{name} uses {other}=, which is not derived here; Cog's own tool may know it.")
    return settings


def _field(name: str, primitive: str, nullable: bool, settings: dict[str, Any]) -> dict[str, Any]:
    if "choices" in settings:
        field = {"allOf": [{"$ref": f"#/components/schemas/{name}"}]}
    else:
        field = {"title": name.replace("_", " ").title(), **PRIMITIVES[primitive]}
    # A None on a type without None is no default: Cog takes such an input for required.
    if settings.get("default") is not None or (nullable and "default" in settings):
        field["default"] = settings["default"]
    if nullable:
        field["nullable"] = True
    return field | {key: settings[key] for key in ("description", "minimum", "maximum") if key in settings}


def _literal(node: ast.expr | None) -> Literal:
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return dict(zip(map(_literal, keys), map(_literal, values), strict=True))
    raise NotLiteral


def _resolve(node: ast.expr | None, scope: dict[str, Literal]) -> Literal:
    """The value of a literal or of a module-level name of one."""
    if isinstance(node, ast.Name) and node.id in scope:
        return scope[node.id]
    return _literal(node)


def _choices(node: ast.expr, scope: dict[str, Literal]) -> list[Literal]:
    """A list of literals, `list(D.keys())`, `list(D.values())`, or a sum of such."""
    match node:
        case ast.List() | ast.Name():
            value = _resolve(node, scope)
            if isinstance(value, list):
                return value
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _choices(left, scope) + _choices(right, scope)
        case ast.Call(
            func=ast.Name(id="list"),
            args=[ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="keys" | "values" as part), args=[])],
        ) if isinstance(scope.get(name), dict):
            return list(getattr(scope[name], part)())
    raise NotLiteral


def _description(name: str, node: ast.expr | None, scope: dict[str, Literal]) -> str:
    """A string as Cog's tool shows it; refused where the tool would show something else, or nothing."""
    match node:
        case ast.Name(id=constant) if isinstance(scope.get(constant), str):
            return scope[constant]
        case ast.Constant(value=str() as text) if node.end_col_offset - node.col_offset == len(text.encode()) + 2:
            return text  # two quotes and the text itself: no escapes, no prefix, no second string
    raise ValueError(f"The description of {name} must be one plain string literal without escapes.")


def _output(predict: ast.FunctionDef) -> dict[str, Any]:
    match predict.returns:
        case ast.Name(id=name) if name in PRIMITIVES:
            return {"title": "Output", **PRIMITIVES[name]}
        case ast.Subscript(value=ast.Name(id="list" | "List"), slice=ast.Name(id=name)) if name in PRIMITIVES:
            return {"title": "Output", "type": "array", "items": PRIMITIVES[name]}
    raise ValueError(f"predict must return one of {', '.join(PRIMITIVES)}, or a list of one.")


if __name__ == "__main__":
    try:
        write(ROOT)
    except (ValueError, SyntaxError) as error:
        sys.exit(f"predict.py: {error}")
