"""Every form that people paste, what it means, and what is no reference at all. No host is asked."""

import base64
import contextlib
import re
import string
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from settings import MINIATURE, Settings
from sources.references import (
    Civitai,
    Data,
    HuggingFace,
    Local,
    Reference,
    Replicate,
    Url,
    identity,
    parse,
    parse_picture,
    unwrapped,
)
from sources.shown import redact

VERSION = "0123456789abcdef" * 4
COMMIT = "0123456789abcdef" * 2 + "01234567"

FORMS = [
    ("owner/name", Replicate("owner", "name")),
    (" owner/name\n", Replicate("owner", "name")),
    ("Owner_1/flux-lora.v2", Replicate("Owner_1", "flux-lora.v2")),
    (f"owner/name/{VERSION}", Replicate("owner", "name", VERSION)),
    (f"owner/name:{VERSION}", Replicate("owner", "name", VERSION)),
    (f"owner/name/versions/{VERSION}", Replicate("owner", "name", VERSION)),
    ("https://replicate.com/owner/name", Replicate("owner", "name")),
    ("replicate.com/owner/name/", Replicate("owner", "name")),
    (f"https://replicate.com/owner/name/versions/{VERSION}?x=1#y", Replicate("owner", "name", VERSION)),
    (f"https://replicate.com/owner/name/versions/{VERSION}/_weights", Replicate("owner", "name", VERSION)),
    ("huggingface.co/owner/repo", HuggingFace("owner/repo")),
    ("hf.co/owner/repo", HuggingFace("owner/repo")),
    ("https://www.huggingface.co/owner/repo/", HuggingFace("owner/repo")),
    ("HTTPS://HuggingFace.co/Owner/Repo", HuggingFace("Owner/Repo")),
    ("https://huggingface.co/owner/repo/blob/main/a/b.safetensors", HuggingFace("owner/repo", file="a/b.safetensors")),
    (
        "https://huggingface.co/owner/repo/resolve/v1/b.safetensors?download=true",
        HuggingFace("owner/repo", "v1", file="b.safetensors"),
    ),
    ("https://huggingface.co/owner/repo/tree/main", HuggingFace("owner/repo")),
    (f"https://huggingface.co/owner/repo/tree/{COMMIT}/a/b", HuggingFace("owner/repo", COMMIT, "a/b")),
    (
        "https://huggingface.co/owner/repo/blob/refs%2Fpr%2F1/my%20lora.safetensors",
        HuggingFace("owner/repo", "refs/pr/1", file="my lora.safetensors"),
    ),
    (
        "https://huggingface.co/owner/repo/resolve/refs/pr/1/b.safetensors",
        HuggingFace("owner/repo", "refs/pr/1", file="b.safetensors"),
    ),
    ("huggingface.co/owner/repo/b.safetensors", HuggingFace("owner/repo", file="b.safetensors")),
    ("https://civitai.com/models/12", Civitai(12)),
    ("civitai.com/models/12/a-name", Civitai(12)),
    ("https://civitai.com/models/12/a-name?modelVersionId=34", Civitai(12, 34)),
    ("https://civitai.red/models/12", Civitai(12, host="civitai.red")),
    ("https://civitai.com/api/download/models/34", Civitai(None, 34)),
    (
        "https://civitai.com/api/download/models/34?type=Model&format=SafeTensor&token=s3cr3t",
        Civitai(None, 34, "type=Model&format=SafeTensor", token="s3cr3t"),
    ),
    ("urn:air:flux1:lora:civitai:12@34", Civitai(12, 34)),
    ("air:flux1:lora:civitai:12@34.safetensors", Civitai(12, 34)),
    ("https://example.com/a.safetensors?sig=s3cr3t", Url("https://example.com/a.safetensors?sig=s3cr3t")),
    ("https://replicate.delivery/xezq/a/trained_model.tar", Url("https://replicate.delivery/xezq/a/trained_model.tar")),
    ("https://huggingface.co.example.com/owner/repo", Url("https://huggingface.co.example.com/owner/repo")),
    ("https://example.com/civitai.com/models/12", Url("https://example.com/civitai.com/models/12")),
    ("data:application/x-tar;base64,AAEC", Data(b"\x00\x01\x02")),
    ("data:;base64,AA EC\n_-8", Data(b"\x00\x01\x02\xff\xef")),
    ("data:,a%20b", Data(b"a b")),
    ("zorp", Local("zorp")),
    ("Zorp_2.v1-b", Local("Zorp_2.v1-b")),
    ("цапля", Local("цапля")),
    ("हिन्दी", Local("हिन्दी")),
    ("cafe\u0301", Local("café")),
    ("local:zorp", Local("zorp")),
    ("LOCAL: styles/ink", Local("styles/ink")),
    ("local:my styles/in/deep ink", Local("my styles/in/deep ink")),
    ("local:styles/cafe\u0301", Local("styles/café")),
    ("https://example.com/my lora.safetensors?a=b c", Url("https://example.com/my lora.safetensors?a=b c")),
    ('https://example.com/"my"/lo\'ra', Url('https://example.com/"my"/lo\'ra')),
    (
        'https://huggingface.co/a/b/resolve/main/my "best" lora.safetensors',
        HuggingFace("a/b", file='my "best" lora.safetensors'),
    ),
    ("huggingface.co/a/b/resolve/main/my lora.safetensors", HuggingFace("a/b", file="my lora.safetensors")),
    ("https://huggingface.co/a/b?token=s3cr3t", HuggingFace("a/b", token="s3cr3t")),
    ("https://me:s3cr3t@huggingface.co/a/b", HuggingFace("a/b", token="s3cr3t")),
    ("https://s3cr3t@hf.co/a/b/tree/v1", HuggingFace("a/b", "v1", token="s3cr3t")),
    ("https://replicate.com/owner/name?token=s3cr3t", Replicate("owner", "name", token="s3cr3t")),
    (f"https://me:s3cr3t%21@replicate.com/owner/name/{VERSION}", Replicate("owner", "name", VERSION, "s3cr3t!")),
    ("https://s3cr3t@civitai.com/models/12", Civitai(12, token="s3cr3t")),
    ("https://a:b@civitai.com/api/download/models/34?token=s3cr3t", Civitai(None, 34, token="s3cr3t")),
    ("https://civitai.com/pt-BR/models/12/um-nome?modelVersionId=34", Civitai(12, 34)),
    ("https://civitai.com/zh-Hans/models/12", Civitai(12)),
    ("https://civitai.com/es-419/models/12", Civitai(12)),
    ("civitai.com/fil/api/download/models/34", Civitai(None, 34)),
    ("civitai.com/de/model-versions/34", Civitai(None, 34)),
    ("collections/flux", Replicate("collections", "flux")),
    ("p/abcdef", Replicate("p", "abcdef")),
]


@pytest.mark.parametrize(("text", "reference"), FORMS, ids=[text.strip() for text, _ in FORMS])
def test_every_form_means_what_it_says(text: str, reference: Reference) -> None:
    assert parse(text) == reference


QUOTED = [
    *(f"{first}{{}}{last}" for first, last in ('""', "''", "“”", "‘’", "``", "<>")),
    '"<{}>"',
    "\ufeff' {}\u200b '\n",
]


@pytest.mark.parametrize("around", QUOTED)
@pytest.mark.parametrize(
    "text",
    ["zorp", "local:a b", "owner/name", "civitai.com/models/1", "https://h.com/a b?c", "data:,a", "https://a@h/"],
)
def test_what_is_pasted_along_with_a_reference_is_taken_off(around: str, text: str) -> None:
    assert unwrapped(around.format(text)) == text
    assert parse(around.format(text)) == parse(text)
    if text[:5] in ("https", "data:"):
        assert parse_picture("image", around.format(text)) == parse_picture("image", text)


LONG = "9" * 5000
NONE = [
    *("", " ", '""', "a b", "zörp/a b", "-a", ".", "..", ".name", "name:a", "a+b", "a*2"),
    *("a/b/c/d/e", "owner/", "/name", "owner/.name", "a b/c", "example.com/a.safetensors"),
    *("/etc/passwd", "./a/b", "../a", "../../a/b.safetensors", "~/lora", "loras/a.safetensors", "C:\\a", "\\\\a\\b"),
    *("file:///etc/hostname", "file:a/b", "FILE:///etc", "ftp://example.com/a", "s3://a/b", "javascript:alert(1)"),
    *("http://", "http:///a", "http://[::1", "http://a b/c", "https://host:port/a", "https://exa\nmple.com/a"),
    *("huggingface.co/owner", "huggingface.co/datasets/owner/repo", "huggingface.co/owner/repo/blob/main/../x"),
    *("https://civitai.com/images/3", "civitai.com/models/name", "https://civitai.com/models/1?modelVersionId=x"),
    *("https://huggingface.co/settings/tokens", "huggingface.co/papers/2401.00001", "hf.co/posts/a/1"),
    *("https://replicate.com/explore", "urn:air:sdxl:lora:civitai:1@2", "urn:air:flux1:lora:huggingface:1", "urn:air:"),
    *(f"civitai.com/models/{LONG}", f"civitai.com/models/1?modelVersionId={LONG}", f"air:flux1:lora:civitai:{LONG}"),
    *(f"https://example.com/{'a' * 8200}", "a/" * 10_000, "//" * 10_000),
    *("zorp.safetensors", "zorp.TAR.gz", "local:zorp.zip", "local:", "local:/a", "local:a//b"),
    *("local:../a", "local:a/..", "local:a/./b", "local: ", "local:a\\b", "local:a?b", "local:a\nb", "local:a#b"),
    *("https://my host/a", 'https://ho"st/a', "https://<host>/a", "https://u:p w@host/a", "local:local:a"),
    *("https://host/a\x85b", "https://host/a\nb","https://host/a\u2028b", "https://hf.co/a/b?token=a%0Ab", "https://%C3%A9@hf.co/a/b"),
    *("https://replicate.com/collections/flux", "replicate.com/docs/get-started", "replicate.com/p/abcdef"),
    *("replicate.com/owner/name/api", "replicate.com/owner/name/versions", "civitai.com/api/models/12"),
    *("data:", "data:;base64", "data:;base64,!", "owner/name/version", f"owner/name@{VERSION}"),
]  # fmt: skip


@pytest.mark.parametrize("text", NONE, ids=lambda text: text[:60])
def test_what_is_none_gets_one_sentence_with_what_would_be(text: str) -> None:
    with pytest.raises(ValueError, match=r"\.$") as caught:
        parse(text)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "must be" in sentence or "damaged" in sentence


def test_the_accepted_forms_are_listed() -> None:
    with pytest.raises(ValueError, match="names no LoRA") as caught:
        parse("/etc/passwd")
    for form in ("owner/name", "huggingface.co/", "civitai.com/models/", "urn:air:", "http(s)", "data:", "LORAS_DIR"):
        assert form in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("zorp.tar.gz", "'zorp.tar.gz' ends in .tar.gz; a LoRA of LORAS_DIR must be named without it, as 'zorp'."),
        (
            "local:a/b.zip",
            "'local:a/b.zip' ends in .zip; a LoRA of LORAS_DIR must be named without it, as 'local:a/b'.",
        ),
        (
            "https://replicate.com/p/abcdef?x=s3cr3t",
            "'https://replicate.com/p/abcdef' is a prediction or a training of Replicate; it must be the model, as "
            "owner/name, or the address of the trained_model.tar.",
        ),
        *(
            (
                f"replicate.com/owner/name/{page}",
                f"'replicate.com/owner/name/{page}' is a page about a model of Replicate; it must be owner/name, or a "
                "version of it.",
            )
            for page in ("api", "train", "examples", "readme", "versions", "api/learn-more")
        ),
        *(
            (
                f"replicate.com/{place}/flux",
                f"'replicate.com/{place}/flux' names no model of Replicate; it must be "
                "replicate.com/owner/name[/version].",
            )
            for place in (
                "collections",
                "explore",
                "docs",
                "blog",
                "account",
                "trainings",
                "predictions",
                "deployments",
            )
        ),
        (
            "sha256:0123456789ab",
            "'sha256:0123456789ab' is how a data: URI was named that came within a request; it must be sent again.",
        ),
    ],
)
def test_what_people_paste_instead_gets_a_sentence_of_its_own(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        parse(text)


word = st.text(string.ascii_letters + string.digits + "-_", min_size=1, max_size=12)
# Hugging Face's own pages stand where owners do.
owner = word.filter(lambda name: name not in {"datasets", "spaces", "api", "models", "docs", "blog", "collections"})
repo = st.builds("{}/{}".format, owner, word)
path = st.lists(word, min_size=1, max_size=3).map("/".join)
number = st.integers(1, 10**9)
references = st.one_of(
    st.builds(Local, word.filter(lambda name: name[0] != "-") | path),
    st.builds(Replicate, word, word, st.none() | st.text("0123456789abcdef", min_size=64, max_size=64)),
    st.builds(HuggingFace, repo),
    st.builds(HuggingFace, repo, word, file=path.map("{}.safetensors".format)),
    st.builds(HuggingFace, repo, word, path),
    st.builds(Civitai, number),
    st.builds(Civitai, st.none() | number, number),
)


@given(references)
def test_a_shown_name_names_the_same_thing_again(reference: Reference) -> None:
    assert parse(reference.name) == reference


tokens = st.text(string.ascii_letters + string.digits + string.punctuation, min_size=1, max_size=20)


@given(st.one_of(st.builds(HuggingFace, repo, word, path), st.builds(Replicate, word.map("my{}".format), word)), tokens)
def test_a_token_in_an_address_is_part_of_what_it_is_and_not_of_its_name(reference: Reference, token: str) -> None:
    mine = replace(reference, token=token)
    assert parse(mine.address) == mine != reference
    assert mine.name == reference.name
    assert repr(mine) == repr(reference)
    assert identity(mine) != identity(reference)


def test_what_has_a_record_of_its_own() -> None:
    same = [
        ("zorp", "local:zorp"),
        ("https://example.com/a#b", "https://example.com/a"),
        ("hf.co/a/b", "huggingface.co/a/b/tree/main"),
    ]
    for one, other in same:
        assert identity(parse(one)) == identity(parse(other))
    other = [
        ("https://civitai.com/models/12", "https://civitai.red/models/12"),
        ("https://civitai.com/models/12", "https://civitai.com/models/12?token=a"),
        ("https://civitai.com/models/12?token=b", "https://civitai.com/models/12?token=a"),
        ("https://hf.co/a/b?token=b", "https://hf.co/a/b?token=a"),
        (f"https://hf.co/a/b/tree/{COMMIT}?token=b", f"https://hf.co/a/b/tree/{COMMIT}"),
    ]
    for one, another in other:
        assert identity(parse(one)) != identity(parse(another))
    model, version = "civitai.com/models/12", "civitai.com/models/12?modelVersionId=34"
    assert identity(parse(model, model="schnell")) != identity(parse(model, model="dev"))
    assert identity(parse(version, model="schnell")) == identity(parse(version, model="dev"))
    assert identity(Local("a/b")) == "local a/b"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("resolve/main/x.safetensors;sig=S3cretZZ", "resolve/main/x.safetensors"),
        ("resolve/main/x.safetensors%3Fsig%3DS3cretZZ", "resolve/main/x.safetensors"),
        ("resolve/main;sig=S3cretZZ/x.safetensors", "resolve/main"),
        ("tree/main/x;sig=S3cretZZ", "tree/main/x"),
        ("resolve/main/u:S3cretZZ@x.safetensors", "resolve/main/x.safetensors"),
        ("resolve/main/hf_S3cretZZS3cretZZS3cretZZ", "resolve/main/***"),
    ],
)
def test_a_reference_shows_what_its_text_shows(text: str, name: str) -> None:
    address = f"huggingface.co/a/b/{text}"
    reference = parse(address)
    assert reference.name == redact(address) == f"huggingface.co/a/b/{name}"
    assert "S3cret" not in repr(reference)
    assert parse(reference.address) == reference


@settings(max_examples=500)
@given(st.text(max_size=60) | st.text("/.:@?#%&=~\\[]huggingfacecvt0123456789 \t", max_size=60))
def test_any_text_is_a_reference_or_gets_a_sentence(text: str) -> None:
    reference, sentence = None, ""
    with contextlib.suppress(ValueError):
        reference = parse(text)
    if reference is None:
        with pytest.raises(ValueError, match=r"\.$") as caught:
            parse(text)
        sentence = str(caught.value)
    assert "\n" not in (sentence or reference.name)
    assert sentence or reference.name


@given(st.sampled_from(["/", "./", "../", "~/", "file:", "file:///", "\\\\"]), st.text(string.printable, max_size=40))
def test_a_path_is_never_a_reference(prefix: str, rest: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse(prefix + rest)


@given(word, word, path)
def test_no_name_and_no_sentence_shows_a_secret(user: str, host: str, where: str) -> None:
    secret = "s3cr3t-value"
    for text in (
        f"https://{user}:{secret}@{host}.com/{where}?token={secret}#{secret}",
        f"https://civitai.com/api/download/models/7?token={secret}",
        f"https://civitai.com/models/7?modelVersionId=8&token={secret}",
        f"https://huggingface.co/{user}/{host}?token={secret}",
        f"https://replicate.com/{user}/{host}?token={secret}",
        f"https://{user}:{secret}@huggingface.co/{user}/{host}",
        f"https://{secret}@replicate.com/{user}/{host}",
        f"https://{secret}@civitai.com/models/7",
        f"<https://{host}.com/{where}?token={secret}>",
        f"hf_{'A1b2' * 5}{secret}",
        f"local:{where}/hf_{'A1b2' * 5}{secret}",
    ):
        with contextlib.suppress(ValueError):  # some are the names of Replicate's own pages
            reference = parse(text)
            assert secret not in reference.name
            assert secret not in repr(reference)
    for text in (f"ftp://{user}:{secret}@{host}/{where}?token={secret}", f"https://civitai.com/x?token={secret}"):
        with pytest.raises(ValueError, match="must be") as caught:
            parse(text)
        assert secret not in str(caught.value)


PICTURES = [
    (" HTTP://Host/a b.png?c#d\n", Url("HTTP://Host/a b.png?c")),
    ("https://user:s3cret@[2001:db8::1]:8443/a", Url("https://user:s3cret@[2001:db8::1]:8443/a")),
    ("https://huggingface.co/owner/repo/blob/main/a.png", Url("https://huggingface.co/owner/repo/blob/main/a.png")),
    ("DATA:image/png;base64,AAEC", Data(b"\x00\x01\x02")),
    ("data:image/png; Base64 ;charset=utf-8,AAEC", Data(b"\x00\x01\x02")),
]
NO_PICTURES = [
    *(
        "/etc/hostname",
        "file:///etc/hostname",
        "FILE:/etc/hostname",
        "photo.png",
        "example.com/a.png",
        " ",
        "ftp://a/b",
    ),
    *("http://", "http:///a", "http://[", "http://a:b/", "http://a:0/", "http://a\nb/", "http://a/\0"),
]


@pytest.mark.parametrize(("text", "picture"), PICTURES)
def test_a_picture_is_a_url_or_data(text: str, picture: Url | Data) -> None:
    assert parse_picture("image", text) == picture


@pytest.mark.parametrize("text", NO_PICTURES)
def test_any_other_text_is_no_picture(text: str) -> None:
    with pytest.raises(ValueError, match=r"^mask is '.*'; it must be an http\(s\) URL or a data URI\.$"):
        parse_picture("mask", text)


def test_a_picture_that_cannot_be_read_is_named_and_its_secrets_are_not() -> None:
    for text, sentence in (
        ("http://user:s3cret@[?s3cret", "image is 'http://['; it must be an http(s) URL or a data URI."),
        (f"http://a/?s3cret{'a' * 8192}", "image has 8208 characters; it must be an http(s) URL of at most 8192, or a"),
        ("data:image/png", "The data: URI of image has no comma; it must be data:[type][;base64],content."),
        ("data:;base64,!", "The data: URI of image is damaged: what follows its comma is not base64."),
        ("data:;base64,", "The data: URI of image is empty: no data follows its comma."),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
            parse_picture("image", text)


@pytest.mark.parametrize("shift", range(4))
def test_a_long_data_uri_is_decoded_as_a_whole(shift: int) -> None:
    content = bytes(range(256)) * 3000 + b"a" * shift
    encoded = base64.b64encode(content).decode()
    assert parse(f"data:;base64,{encoded}") == Data(content)
    assert parse(f"data:;base64,{'A' * shift}{encoded[shift:]}".replace("A", "%41")) == parse(
        f"data:;base64,{'A' * shift}{encoded[shift:]}"
    )
    assert parse("data:," + "a" * shift + "".join(f"%{byte:02x}" for byte in content)) == Data(b"a" * shift + content)
    with pytest.raises(ValueError, match="not base64"):
        parse(f"data:;base64,QQ=={encoded}")


@given(st.binary(min_size=1, max_size=200))
def test_a_data_uri_is_its_bytes_however_it_is_written(content: bytes) -> None:
    encoded = base64.b64encode(content).decode()
    urlsafe = base64.urlsafe_b64encode(content).decode().rstrip("=")
    for payload in (encoded, urlsafe, encoded.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")):
        assert parse(f"data:application/octet-stream;base64,{payload}") == Data(content)
    assert parse("data:," + "".join(f"%{byte:02x}" for byte in content)) == Data(content)


def test_mirrors_are_what_they_mirror() -> None:
    mirrored = Settings(
        MINIATURE,
        hf_endpoint="https://hf-mirror.example.com",
        civitai_endpoint="http://127.0.0.1:8001",
        replicate_endpoint="http://127.0.0.1:8002",
    )
    assert parse("https://hf-mirror.example.com/owner/repo", mirrored) == HuggingFace("owner/repo")
    assert parse("http://127.0.0.1:8001/models/3", mirrored) == Civitai(3)
    assert parse("http://127.0.0.1:8002/owner/name", mirrored) == Replicate("owner", "name")
    assert parse("http://127.0.0.1:8003/owner/name", mirrored) == Url("http://127.0.0.1:8003/owner/name")
    assert parse("https://huggingface.co/owner/repo", mirrored) == HuggingFace("owner/repo")


@pytest.mark.parametrize("mirror", ["https://me:s3cr3t@mirror.example", "https://www.Mirror.example:443"])
def test_a_host_is_the_same_however_it_is_written(mirror: str) -> None:
    mirrored = Settings(MINIATURE, hf_endpoint=mirror)
    for host in ("mirror.example", "WWW.mirror.example", "me:s3cr3t@mirror.example:443"):
        token = "s3cr3t" if "@" in host else None
        assert parse(f"https://{host}/owner/repo", mirrored) == HuggingFace("owner/repo", token=token)
    assert parse("http://www.huggingface.co:80/owner/repo", mirrored) == HuggingFace("owner/repo")
    assert parse("https://CivitAI.com:443/models/3", mirrored) == Civitai(3)
    assert parse("https://replicate.com:443/owner/name", mirrored) == Replicate("owner", "name")
    assert isinstance(parse("https://huggingface.co:80/owner/repo", mirrored), Url)
    assert isinstance(parse("https://a.example/b", replace(mirrored, hf_endpoint="https://[")), Url)


@pytest.mark.parametrize("page", ["discussions/3", "commits/main", "settings", "community"])
def test_a_page_about_a_repo_is_no_folder_of_it(page: str) -> None:
    with pytest.raises(
        ValueError, match=r"is a page about a model on Hugging Face; it must be huggingface\.co/a/b, or"
    ):
        parse(f"https://huggingface.co/a/b/{page}?x=1#y")


@pytest.mark.parametrize("url", ["https://x y/a.png", 'https://"x.example"/a.png', "https://x.example/a\u2028.png"])
def test_a_picture_s_host_has_no_blank_and_no_quote(url: str) -> None:
    with pytest.raises(ValueError, match="it must be an http"):
        parse_picture("image", url)
