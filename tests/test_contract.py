import ast
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from local_cog import schema
from local_cog.server import CogServer, failure
from settings import ROOT

CONTRACT = Path(__file__).parent / "contract"
SOURCE = (ROOT / "predict.py").read_text(encoding="utf-8")


def promised() -> dict[str, Any]:
    """The document that Cog's own tool derives for the inputs of the model's page."""
    return json.loads((CONTRACT / "openapi_schema.json").read_text())


def as_the_page_shows(document: dict[str, Any]) -> dict[str, Any]:
    """Input and Output with enumerations in place, without nulls and without the input that the platform fills."""
    schemas = copy.deepcopy(document["components"]["schemas"])
    properties = schemas["Input"]["properties"]
    del properties["replicate_weights"]
    for name, field in properties.items():
        field.pop("nullable", None)
        if field.get("default", ...) is None:
            del field["default"]
        if "allOf" in field:
            assert field.pop("allOf") == [{"$ref": f"#/components/schemas/{name}"}]
            field.update(schemas[name], description=field["description"])
    return {name: schemas[name] for name in ("Input", "Output")}


def test_the_schema_is_the_contract_whole() -> None:
    derived, contract = schema.derive(SOURCE), promised()
    # Cog's tool writes its own version there.
    derived["info"].pop("version")
    contract["info"].pop("version")
    assert derived == contract


def test_the_schema_is_the_model_page() -> None:
    assert as_the_page_shows(schema.derive(SOURCE)) == json.loads((CONTRACT / "page_schema.json").read_text())


def changed(value: ast.expr) -> ast.expr:
    """Another literal of the same kind."""
    match ast.literal_eval(value):
        case bool() as old:
            return ast.Constant(not old)
        case None:
            return ast.Constant(1)
        case str() as old:
            return ast.Constant(old + ".")
        case list() as old:
            return ast.Constant(old[:-1])
        case old:
            return ast.Constant(old + 1)


def mutants() -> Iterator[tuple[str, str]]:
    """Copies of predict.py, each with one thing changed in one input; and what was changed."""
    tree = ast.parse(SOURCE)
    predict = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "predict")
    parameters = predict.args.args[1:]
    for parameter, call in zip(parameters, predict.args.defaults, strict=True):
        assert isinstance(call, ast.Call)
        for keyword in call.keywords:
            old, keyword.value = keyword.value, changed(keyword.value)
            yield f"{parameter.arg}-{keyword.arg}", ast.unparse(tree)
            keyword.value = old
        for keyword in list(call.keywords):
            call.keywords.remove(keyword)
            yield f"{parameter.arg}-without-{keyword.arg}", ast.unparse(tree)
            call.keywords.append(keyword)
        old, parameter.annotation = (
            parameter.annotation,
            ast.Name("int" if ast.unparse(parameter.annotation) == "bool" else "bool"),
        )
        yield f"{parameter.arg}-type", ast.unparse(tree)
        parameter.annotation = old
        parameter.arg += "x"
        yield f"{parameter.arg[:-1]}-renamed", ast.unparse(tree)
        parameter.arg = parameter.arg[:-1]
    parameters[0], parameters[1] = parameters[1], parameters[0]
    predict.args.args[1:] = parameters
    yield "order", ast.unparse(tree)


MUTANTS = dict(mutants())


@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_change_of_an_input_breaks_the_contract(mutant: str) -> None:
    assert schema.derive(MUTANTS[mutant])["components"] != promised()["components"]


def test_an_unchanged_copy_keeps_the_contract() -> None:
    """Else the mutants would differ for another reason than their mutation."""
    assert schema.derive(ast.unparse(ast.parse(SOURCE)))["components"] == promised()["components"]


def derive(parameter: str, before: str = "") -> dict[str, Any]:
    """The schemas of a predictor with one input x."""
    source = f"{before}\nclass Predictor:\n    def predict(self, {parameter}) -> Path: ...\n"
    return schema.derive(source)["components"]["schemas"]


@pytest.mark.parametrize(
    "parameter",
    [
        "x: int",
        "x: int = Input()",
        "x: int = Input(default=None)",
        "x: int = Input(default=STEPS)",
        "x: int = Input(default=4 * 7)",
        "x: int = Input(default=(28))",
    ],
)
def test_an_input_without_a_default_that_cog_can_read_is_required(parameter: str) -> None:
    schema = derive(parameter, "from settings import STEPS")["Input"]
    assert schema["required"] == ["x"]
    assert "default" not in schema["properties"]["x"]


@pytest.mark.parametrize("kind", ["int | None", "Optional[int]"])
def test_none_makes_an_input_optional(kind: str) -> None:
    schema = derive(f"x: {kind} = Input(default=None)")["Input"]
    assert "required" not in schema
    assert schema["properties"]["x"] == {
        "title": "X",
        "type": "integer",
        "default": None,
        "nullable": True,
        "x-order": 0,
    }


def test_a_name_in_the_same_file_is_a_literal() -> None:
    schema = derive("x: int = Input(default=STEPS, description=TEXT)", "STEPS = 28\nTEXT = 'Steps'")["Input"]
    assert (schema["properties"]["x"]["default"], schema["properties"]["x"]["description"]) == (28, "Steps")


@pytest.mark.parametrize("bound", ["LOW", "2 * 8", "(16)", "-SIDE"])
def test_bounds_that_are_no_number_literals_are_dropped(bound: str) -> None:
    field = derive(f"x: int = Input(ge={bound}, le=-1)", "LOW = 16")["Input"]["properties"]["x"]
    assert "minimum" not in field
    assert field["maximum"] == -1


@pytest.mark.parametrize("choices", ["list(SIZES.keys()) + ['c']", "['a', 'b'] + NAMES", "['a', 'b', 'c']"])
def test_choices_can_be_put_together_from_literals(choices: str) -> None:
    literals = "SIZES = {'a': 1, 'b': 2}\nNAMES = ['c']"
    assert derive(f"x: str = Input(choices={choices})", literals)["x"]["enum"] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("parameter", "sentence"),
    [
        ("x: str = Input(choices=SIZES)", "choices of x must be literals"),
        ("x: str = Input(choices=[s for s in 'ab'])", "choices of x must be literals"),
        ("x: str = Input(description=f'a')", "description of x must be one plain string literal"),
        ("x: str = Input(description='a' 'b')", "description of x must be one plain string literal"),
        ("x: str = Input(description=('a'))", "description of x must be one plain string literal"),
        ("x: str = Input(description='it\\'s')", "description of x must be one plain string literal"),
        ("x: str = Input(description=TEXT)", "description of x must be one plain string literal"),
        ("x: str = Input(regex='a')", "x uses regex="),
        ("x: str = STEPS", "default of x must be a literal"),
        ("x", "type of x must be one of bool, float, int, str, Path"),
        ("x: bytes", "type of x must be one of bool, float, int, str, Path"),
        ("*x: str", "plain parameters only"),
    ],
)
def test_what_cog_cannot_read_is_refused_with_a_sentence(parameter: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        derive(parameter, "from settings import SIZES, STEPS, TEXT")


def test_the_server_serves_the_derived_schema(server: CogServer) -> None:
    assert server.schema()["components"] == promised()["components"]


@pytest.mark.parametrize(
    ("inputs", "key"),
    [
        ({"num_inference_steps": 100}, "num_inference_steps"),
        ({"model": "pro"}, "model"),
        ({"guidance_scale": "high"}, "guidance_scale"),
        ({"seed": "1"}, "seed"),
        ({"prompt": 3}, "prompt"),
    ],
)
def test_the_server_refuses_what_the_schema_forbids_before_predict(
    server: CogServer, inputs: dict[str, Any], key: str
) -> None:
    before = server.log.read_text()
    status, answer = server.request("POST", "/predictions", {"input": {"prompt": "a fox", **inputs}})
    assert status == 422
    assert failure(answer).startswith(f"{key}: ")
    assert "Starting prediction" not in server.log.read_text().removeprefix(before)


def test_the_server_asks_for_a_prompt(server: CogServer) -> None:
    assert failure(server.predict({})) == "prompt: Field required"
