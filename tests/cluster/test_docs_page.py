"""The page at `/docs`, which anybody may read, and what `/` says."""

import base64
import hashlib
import json
import re
import shlex
from dataclasses import MISSING, fields
from html.parser import HTMLParser

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

from cluster.cog_api import CogApi
from cluster.docs_page import COGS, REPLICATES, render
from cluster.replicate_api import ReplicateApi
from harness.cluster import Cluster, Server
from local_cog import schema
from settings import ROOT, VERSION
from tests.cluster.small_cluster import TOKEN

OURS = schema.derive((ROOT / "predict.py").read_text())
ADDRESS = "https://example.com/flux"
HOSTILE = (
    "</code></dd></style><script src=https://evil.example/a.js></script><img src=x onerror=alert(1)>"
    "<a href='javascript:alert(1)'>`<b>`</a> &lt;!-- \" ' {address}"
)


class Page(HTMLParser):
    """A page's tags with their attributes, in order, and its text in one."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.text, self.style = [], "", ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.lasttag == "style" and not self.style:
            self.style = data
        else:
            self.text += data


def test_each_input_is_told_in_its_order_with_all_that_the_schema_says() -> None:
    text = Page(render(OURS, ADDRESS, tokens=False)).text
    names = list(OURS["components"]["schemas"]["Input"]["properties"])
    inputs = text.partition("\nInputs\n")[2]
    assert re.findall(rf"^({'|'.join(names)})(?=string|file|integer|number|boolean)", inputs, re.MULTILINE) == names
    assert "promptstringrequiredPrompt for generated image. If you include the trigger_word used" in inputs
    assert "imagefile: a URL, or a data URIoptionalInput image for" in inputs
    assert "heightinteger256 to 1440optionalHeight of" in inputs
    assert "lora_scalenumber-1 to 3default 1Determines" in inputs
    assert 'modelstringdefault "dev"Which model' in inputs
    assert 'needs 4 steps.One of "dev", "schnell"' in inputs
    assert "go_fastbooleandefault falseRun" in inputs


def test_a_bound_may_stand_alone_and_what_is_asked_for_has_all_that_is_required() -> None:
    source = """
class Predictor:
    def predict(
        self,
        steps: int = Input(ge=3),
        most: float = Input(le=0.5),
        kind: str = Input(choices=["it's", "b"]),
        file: Path = Input(description="a"),
        plain: bool = Input(description="b"),
    ) -> str: ...
"""
    text = Page(render(schema.derive(source), ADDRESS, tokens=False)).text
    assert "stepsintegerat least 3required" in text
    assert "mostnumberat most 0.5required" in text
    asked = json.loads(shlex.split(text.partition("curl ")[2].partition("\nReplicate\n")[0].replace("\\\n", ""))[-1])
    assert asked == {
        "input": {"steps": 3, "most": 0.5, "kind": "it's", "file": "https://example.com/picture.png", "plain": True}
    }


@pytest.mark.parametrize("place", ["description", "default", "choice"])
def test_what_a_project_says_of_its_inputs_stays_text(place: str) -> None:
    pages = []
    for said in ("harmless `b`", HOSTILE):
        document = json.loads(json.dumps(OURS))
        schemas = document["components"]["schemas"]
        if place == "choice":
            schemas["model"]["enum"] = [said]
        else:
            schemas["Input"]["properties"]["prompt"][place] = said
        pages.append(Page(render(document, ADDRESS, tokens=True)))
    harmless, hostile = pages
    assert hostile.tags == harmless.tags
    shown = HOSTILE.replace("`", "") if place == "description" else json.dumps(HOSTILE)
    assert shown in hostile.text


@pytest.mark.parametrize(("api", "told"), [(CogApi, COGS), (ReplicateApi, REPLICATES)])
def test_every_endpoint_is_told_and_no_other(api: type[CogApi | ReplicateApi], told: dict[str, str]) -> None:
    needed = [field.name for field in fields(api) if field.default_factory is MISSING]
    there = {
        f"{method} {re.sub(r':[a-z]+}', '}', route.path)}"
        for route in api(**dict.fromkeys(needed)).routes()
        for method in route.methods - {"HEAD", "DELETE"}
    }
    assert set(told) == there


@pytest.mark.parametrize("tokens", [True, False])
def test_a_token_is_in_the_examples_where_one_is_needed(tokens: bool) -> None:
    page = Page(render(OURS, ADDRESS, tokens=tokens))
    text = page.text
    assert (("a", {"href": "openapi.json"}) in page.tags) is not tokens  # which would ask for one
    assert text.count('-H "Authorization: Bearer $TOKEN"') == (2 if tokens else 0)
    assert ("Requests need a token" in text) is tokens
    assert f"curl {ADDRESS}/predictions \\" in text
    assert f"curl {ADDRESS}/v1/models/flux-sprites/flux-sprites/predictions \\" in text


def test_the_page_needs_no_token_tells_none_and_loads_nothing(cluster: Cluster) -> None:
    status, headers, text = Server(cluster.port, {"Host": "flux.example:81"}).request("GET", "/docs")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert TOKEN not in text
    page = Page(text)
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert headers["content-security-policy"] == (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
    )
    assert "@import" not in page.style
    assert "url(" not in page.style
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "iframe", "form", "base"})
    links = [value for _, given in page.tags for name, value in given.items() if name in ("href", "src", "style")]
    assert set(links) == {"data:,", "#ask", "#inputs", "#endpoints", "#answers", "playground/"}
    assert "curl http://flux.example:81/predictions \\" in page.text
    assert "replicate_weights" in page.text
    assert Server(cluster.port, {"Host": "a b"}).request("GET", "/docs")[0] == 400


def test_the_root_leads_a_browser_to_the_page(cluster: Cluster) -> None:
    status, headers, text = cluster.request("GET", "/", headers={"Accept": "text/html,*/*;q=0.8"})
    assert (status, headers["location"], text) == (307, "docs", "")
    status, headers, text = cluster.request("GET", "/", headers={"Accept": "*/*"})
    assert (status, headers["content-type"], json.loads(text)["version"]) == (200, "application/json", VERSION)
