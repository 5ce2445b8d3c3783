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
import re
import secrets
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from settings import ROOT

# The document without what belongs to one predictor: the same for every Cog model.
TEMPLATE = Path(__file__).parent / "openapi_template.json"
# JSON Schema's types by Python's annotations.
PRIMITIVES = {
    "bool": {"type": "boolean"},
    "float": {"type": "number"},
    "int": {"type": "integer"},
    "str": {"type": "string"},
    "Path": {"type": "string", "format": "uri"},
}
NULLABLE = {form.format(name): kind for name, kind in PRIMITIVES.items() for form in ("{} | None", "Optional[{}]")}
INPUTS = PRIMITIVES | NULLABLE
OUTPUTS = PRIMITIVES | {
    f"{of}[{name}]": {"type": "array", "items": kind} for name, kind in PRIMITIVES.items() for of in ("list", "List")
}
BOUNDS = {"ge": "minimum", "le": "maximum"}


def inputs(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What may stand in each input by an OpenAPI document, which keeps choices in schemas of their own."""
    schemas = document["components"]["schemas"]
    return {
        name: (schemas[field["allOf"][0]["$ref"].rpartition("/")[2]] if "allOf" in field else {}) | field
        for name, field in schemas["Input"]["properties"].items()
    }


def derive(source: str) -> dict[str, Any]:
    """The OpenAPI document by the text of `predict.py`; a ValueError names an input, and says what Cog can read."""
    module = ast.parse(source)
    predict = _find_predict(module)
    returned = predict.returns and ast.unparse(predict.returns)
    if returned not in OUTPUTS:
        raise ValueError(f"predict must return one of {', '.join(PRIMITIVES)}, or a list of one.")
    described: dict[str, Any] = {"title": "Input", "type": "object", "properties": {}}
    schemas = {"Input": described, "Output": {"title": "Output", **OUTPUTS[returned]}}
    scope, required = _literals_of_module(module), []
    for order, (parameter, default) in enumerate(_parameters(predict)):
        name, annotation = parameter.arg, parameter.annotation and ast.unparse(parameter.annotation)
        if annotation not in INPUTS:
            raise ValueError(f"The type of {name} must be one of {', '.join(PRIMITIVES)}, with or without `| None`.")
        kind, settings = INPUTS[annotation], _input_settings(name, default, scope)
        if annotation in NULLABLE:
            settings["nullable"] = True
        elif settings.get("default") is None:  # None is no default here: Cog takes such an input for required
            settings.pop("default", None)
            required.append(name)
        field = {"title": name.replace("_", " ").title(), **kind}
        if "enum" in settings:
            field = {"allOf": [{"$ref": f"#/components/schemas/{name}"}]}
            enum = settings.pop("enum")
            schemas[name] = {"title": name, "description": "An enumeration.", "enum": enum, "type": kind["type"]}
        described["properties"][name] = field | settings | {"x-order": order}
    if required:
        described["required"] = required
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
        aside = path.with_suffix(f".{secrets.token_hex(8)}")
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    return document


def _find_predict(module: ast.Module) -> ast.FunctionDef:
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == "Predictor":
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "predict":
                    return method
    raise ValueError("There is no class Predictor with a method predict.")


def _literals_of_module(module: ast.Module) -> dict[str, Any]:
    """The module-level names that are assigned a literal; an imported name is none of them."""
    scope = {}
    for node in module.body:
        match node:
            case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), value=value):
                if (literal := _value(value, {})) is not ...:
                    scope[name] = literal
    return scope


def _parameters(predict: ast.FunctionDef) -> list[tuple[ast.arg, ast.expr | None]]:
    """Each parameter after self, with its default."""
    args = predict.args
    if args.posonlyargs or args.vararg or args.kwonlyargs or args.kwarg:
        raise ValueError("predict takes plain parameters only: Cog knows no *, **, / or keyword-only ones.")
    defaults = [None] * (len(args.args) - len(args.defaults)) + args.defaults
    return list(zip(args.args, defaults, strict=True))[1:]


def _input_settings(name: str, default: ast.expr | None, scope: dict[str, Any]) -> dict[str, Any]:
    """What a parameter's default says, in words of JSON Schema: any of default, description, minimum, maximum, enum."""
    match default:
        case None:
            return {}
        case ast.Call(func=ast.Name(id="Input"), args=[], keywords=keywords):
            pass
        case _:
            if (value := _value(default, scope)) is ...:
                raise ValueError(f"The default of {name} must be a literal or Input(…) with keywords.")
            return {"default": value}
    settings: dict[str, Any] = {}
    for keyword in keywords:
        node = keyword.value
        # Cog's tool reads no value in parentheses; the tree shows them only by where the keyword ends.
        bare = (node.end_lineno, node.end_col_offset) == (keyword.end_lineno, keyword.end_col_offset)
        value = _value(node, scope) if bare else ...
        match keyword.arg:
            case "default":
                settings["default"] = None if value is ... else value
            case "description":
                # A plain literal is two quotes and the text itself: no escapes, no prefix, no second string.
                if not isinstance(value, str) or not (
                    isinstance(node, ast.Name) or node.end_col_offset - node.col_offset == len(value.encode()) + 2
                ):
                    raise ValueError(f"The description of {name} must be one plain string literal without escapes.")
                settings["description"] = value
            case "ge" | "le" as bound:
                if type(value) in (int, float) and not isinstance(node, ast.Name):
                    settings[BOUNDS[bound]] = value
            case "choices":
                try:
                    settings["enum"] = _choices(node, scope)
                except ValueError:
                    raise ValueError(
                        f"The choices of {name} must be literals of this file; they are `{ast.unparse(node)}`."
                    ) from None
            case other:
                raise ValueError(f"{name} uses {other}=, which is not derived here; Cog's own tool may know it.")
    return settings


def _value(node: ast.expr | None, scope: dict[str, Any]) -> Any:  # noqa: ANN401 (JSON)
    """The value of a literal that JSON has too, or of a module-level name of one; `...` for any other expression."""
    if isinstance(node, ast.Name):
        return scope.get(node.id, ...)
    try:
        value = ast.literal_eval(node)
        json.dumps(value)
    except (ValueError, TypeError):
        return ...
    return value


def _choices(node: ast.expr, scope: dict[str, Any]) -> list[Any]:
    """A list of literals, `list(D.keys())`, `list(D.values())`, or a sum of such; ValueError for anything else."""
    match node:
        case ast.BinOp(left, ast.Add(), right):
            return _choices(left, scope) + _choices(right, scope)
        case ast.List() | ast.Name():
            if isinstance(value := _value(node, scope), list | tuple):
                return [*value]
        case ast.Call():
            found = re.fullmatch(r"list\((\w+)\.(keys|values)\(\)\)", ast.unparse(node))
            if found and isinstance(value := scope.get(found[1]), dict):
                return [*getattr(value, found[2])()]
    raise ValueError


if __name__ == "__main__":
    try:
        write(ROOT)
    except (ValueError, SyntaxError) as error:
        sys.exit(f"predict.py: {error}")
