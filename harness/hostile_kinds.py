"""The kinds of hostile requests to a cluster, by name in `KINDS`.

A kind is a generator of the requests of one case. `turn` takes a kind's variants one after the other from case to case,
`any` takes a random one.
"""

import gzip
import json
from collections.abc import Callable, Iterable
from urllib.parse import quote

from harness.hostile import (
    DEAF,
    EVIL,
    INNER,
    LARGE,
    MARK,
    PLACES,
    SHOWING,
    SMALL,
    TEXTS,
    Answer,
    Kind,
    Script,
    Sent,
    Stranger,
    octets,
)
from settings import MIB

KINDS: dict[str, Kind] = {}


def kind(cost: float = 1) -> Callable[[Callable[[Stranger], Script]], Callable[[Stranger], Script]]:
    """Register a kind under its function's name."""

    def register(script: Callable[[Stranger], Script]) -> Callable[[Stranger], Script]:
        name = script.__name__.strip("_")
        KINDS[name] = Kind(name, script, cost)
        return script

    return register


# The formatter would put each variant on a line of its own: a thousand lines more.
# fmt: off

FORM = "multipart/form-data; boundary=xyz"
FILE_HEAD = 'Content-Disposition: form-data; name="content"; filename="a.png"\r\nContent-Type: image/png'
FIELD_HEAD = 'Content-Disposition: form-data; name="metadata"'


def _refused(answers: list[Answer]) -> None:
    for answer in answers:
        assert answer.status >= 400, f"It was taken: {answer.status} {answer.body[:300]!r}"


def _chunks(content: bytes, size: int, extension: bytes = b"") -> Iterable[bytes]:
    for start in range(0, len(content), size):
        part = content[start : start + size]
        yield b"%x%s\r\n%s\r\n" % (len(part), extension, part)
    yield b"0\r\n\r\n"


def _form(*parts: tuple[str | bytes, bytes], end: bytes = b"--xyz--\r\n") -> bytes:
    """A form of parts, each with its header lines."""
    return b"".join(b"--xyz\r\n%s\r\n\r\n%s\r\n" % (octets(head), content) for head, content in parts) + end


# ---------------------------------------------------------------------------------------------------------------------
# Invalid JSON, and too much of it


@kind()
def not_a_number(s: Stranger) -> Script:
    """Numbers that Python's JSON parser takes, but JSON does not have."""
    _refused((yield s.place(s.any(["NaN", "Infinity", "-Infinity"]))))
    _refused((yield s.place(s.any(["[NaN]", '{"a": -Infinity}']), places=INNER[1:3])))


@kind()
def halves_of_characters(s: Stranger) -> Script:
    """Unpaired surrogates, in values and names."""
    half = f"\\u{s.dice.randrange(0xD800, 0xE000):04{s.any('xX')}}"
    _refused((yield s.place(f'"{s.any(["", "a", "hf_"])}{half}{s.any(["", "b"])}"', places=TEXTS)))


@kind()
def zero_characters(s: Stranger) -> Script:
    """U+0000, which some databases cannot store."""
    _refused((yield s.place(s.any(['"a\\u0000b"', '"\\u0000"', '"\\u0000\\u0000://\\u0000"']), places=TEXTS)))


@kind()
def twice_the_same_name(s: Stranger) -> Script:
    """Objects that parsers may read differently."""
    bodies = [
        '{"version": "v", "input": {"prompt": 1, "prompt": "a"}}',
        '{"version": "v", "input": {"prompt": "a"}, "input": {"prompt": "b"}}',
        '{"version": "v", "input": {"prompt": "a"}, "id": "a", "id": "../b"}',
        '{"version": "v", "input": {"prompt": "a", "x": {"a": 1, "\\u0061": 2}}}',
        '{"version": "v", "webhook": "http://a..b/", "webhook": null, "input": {"prompt": "a"}}',
    ]
    _refused((yield s.create(s.turn(bodies))))


@kind()
def numbers_without_end(s: Stranger) -> Script:
    """Many digits, large exponents, the limits of 64 bits."""
    digits = "9" * s.size(101, 100_000)
    long = ["1e999", "9" * 400, digits, f"0.{digits}", "-1e999", f"-{digits}", f"1e{digits}"]
    _refused((yield s.place(s.turn(long))))
    _refused((yield s.place(s.turn(["[1e999]", '{"a": -1e999}']), places=INNER[1:3])))
    yield s.place(s.any(["-0", "1E-999", "01", "1.", "+1", "0x10", "1_0"]))
    whole = s.any([str(2**63), str(2**64), str(-(2**63) - 1), "9" * 99])
    for answer in (yield s.place(whole, places=INNER[:1], door=SHOWING)):
        shown = answer.json().get("input", {}).get("strength", 0.0)
        assert isinstance(shown, float), f"A whole number beyond 64 bits is kept: {answer.body[:300]!r}"


@kind()
def deep_nesting(s: Stranger) -> Script:
    """Nested lists and objects, a few hundred deep, and deeper than any stack."""
    depth = s.turn([400, 100, 900, 100_000, 33, 2000, 3_000_000])
    left, right = s.any([("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
    value = left * depth + "1" + right * s.any([depth, depth, 0])
    _refused((yield s.place(value, places=[*INNER[1:3], *PLACES[5:8], "%"])))


@kind(cost=30)
def many_values(s: Stranger) -> Script:
    """Megabytes of small values, which take many times their bytes in memory."""
    unit = s.any(["[],", "[],", "{},", "0,", "1.5,", '"",', '{"":0},', "[[]],", "[\n],"])
    size = s.turn([96 * MIB, 2 * MIB, s.size(MIB, 24 * MIB)])
    value = "[" + (unit * (size // len(unit))).rstrip(",") + "]"
    _refused((yield s.place(value, places=s.any([INNER[1:2], PLACES[5:8], ["%"]]))))


@kind(cost=5)
def many_names(s: Stranger) -> Script:
    """An object of 100,000 members."""
    names = ",".join(f'"{number:x}":{s.any([1, 1, "{}"])}' for number in range(s.size(20_000, 300_000)))
    yield s.place("{" + names + "}", places=[*INNER[1:3], PLACES[5], PLACES[10], "%"])


@kind(cost=10)
def escapes(s: Stranger) -> Script:
    """Megabytes of escapes of two or six bytes for each letter."""
    _refused((yield s.place('"' + s.any(["\\n", "\\/"]) * 4_200_000 + '"', places=TEXTS[:2])))
    letter = s.any(["\\u0041", "\\u00e9", "\\\\", "\\ud83d\\ude00"])
    yield s.place(f'"{letter * s.size(10_000, 2 * MIB)}"', places=TEXTS[:5])


@kind(cost=15)
def long_prompts(s: Stranger) -> Script:
    """A valid text of up to 10 MB."""
    text = s.any(["a", "fox ", "é", "😀", "://", "hf_", "[", "?"])
    long = '"' + text * (s.size(MIB, 10 * MIB) // len(text.encode())) + '"'
    for answer in (yield s.place(long, places=TEXTS[:2], door=SHOWING)):
        shown = len(json.dumps(answer.json().get("input")))
        assert shown < 100_000, f"Of an input {shown} characters are shown."


@kind(cost=10)
def unknown_inputs(s: Stranger) -> Script:
    """Megabytes under names that the predictor does not have."""
    text = json.dumps("x" * s.size(100_000, 5 * MIB))
    places = [*INNER[1:3], '{"version": "v", "input": {"prompt": "a", %: 1}}']
    for answer in (yield s.place(text, places=places, door=SHOWING)):
        assert answer.json().get("input", {}).keys() <= {"prompt"}, f"It was kept: {answer.body[:300]!r}"


@kind(cost=3)
def wrong_types(s: Stranger) -> Script:
    """Inputs that the schema refuses; the refusal should not repeat long ones."""
    long = "y" * s.size(10, 2 * MIB)
    wrong = s.turn([{"prompt": [long]}, {"prompt": {long: long}}, {"prompt": "a", "steps": long}, {long: long}])
    yield s.create({"version": "v", "input": wrong})
    yield s.create({"version": "v", "input": s.any([{"prompt": "a", "steps": -1}, {"prompt": "a", "steps": 1e9}, {}])})


@kind()
def broken_json(s: Stranger) -> Script:
    """JSON that is cut, followed by more, in another language, or no object."""
    good = json.dumps(SMALL)
    cut = good[: s.dice.randrange(len(good))]
    yield s.create(s.any([cut, cut, good + "}", good * 2, good.replace('"', "'"), "//\n" + good, "[1,]", '{"input":}']))
    yield s.create(s.any(["null", "1", '"a"', "[]", "true", " ", '{"input": []}', '{"input": null}', '{"input": "a"}']))


@kind()
def encodings(s: Stranger) -> Script:
    """Invalid UTF-8, other encodings, and a byte order mark."""
    good = json.dumps(SMALL)
    odd = [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\x80"]
    inside = [json.dumps(SMALL).encode().replace(b'"a"', b'"' + some + b'"') for some in odd]
    whole = [good.encode(code) for code in ("utf-16", "utf-32", "utf-16-be", "utf-8-sig")]
    charset = s.any(["", "; charset=utf-16", "; charset=latin-1", "; charset=zlib", "; charset=", "; charset=\0"])
    _refused((yield s.create(s.any(inside + whole), kind=f"application/json{charset}")))


@kind()
def content_types(s: Stranger) -> Script:
    """No content type, a wrong one, a very long one."""
    given = [None, "", "text/plain", "application/json" * 600, "/", ";", "application/json;;;=", b"\xff\xfe", "*/*"]
    yield s.create(SMALL, kind=s.turn(given))
    yield s.create(SMALL, kind=s.any([FORM, "multipart/form-data", "application/x-www-form-urlencoded", "a/b\x7f"]))


@kind(cost=2)
def compressed_bodies(s: Stranger) -> Script:
    """A compressed body, which may be a bomb."""
    packed = gzip.compress(s.any([json.dumps(SMALL).encode(), bytes(20 * MIB)]))
    yield s.create(packed,
        f"Content-Encoding: {s.any(['gzip', 'deflate', 'br', 'gzip, gzip', 'identity', 'x' * 5000])}")


# ---------------------------------------------------------------------------------------------------------------------
# Bodies that are too large, do not end, or have a wrong length


@kind()
def lengths(s: Stranger) -> Script:
    """A content length that is too large or no number."""
    door, kind = s.door(), "Content-Type: application/json"
    length = s.turn([str(105 * MIB), "1" + "0" * 15, "9" * 5000, "-1", "+5", "5, 5", "0x5", "5 5", "", "٣", "1e3"])
    head = s.head(*door, kind, f"Content-Length: {length}")
    yield Sent([head, b'{"input": {}}'], s.any(["half", "leave", "reset"]), 5, due=0)


@kind(cost=25)
def too_large(s: Stranger) -> Script:
    """A body above the limit, with its length stated, or in chunks."""
    piece = b" " * MIB
    count = s.any([101, 110, 130])
    kind = "Content-Type: application/json"
    length, parts = f"Content-Length: {count * MIB}", [piece] * count
    if s.turn([True, False]):
        length, parts = "Transfer-Encoding: chunked", [*[b"100000\r\n%s\r\n" % piece] * count, b"0\r\n\r\n"]
    for answer in (yield Sent([s.head(*s.door(), kind, length), *parts])):
        assert answer.status == 413, f"{answer.status}: {answer.body[:300]!r}"


@kind()
def lying_lengths(s: Stranger) -> Script:
    """A body that is longer or shorter than its stated length."""
    body, kind = json.dumps(SMALL).encode(), "Content-Type: application/json"
    short = s.dice.randrange(1, len(body))
    yield Sent([s.head(*s.door(), kind, f"Content-Length: {short}"), body], patience=5)
    yield Sent([s.head(*s.door(), kind, f"Content-Length: {len(body) + short}"), body], "half", 2, due=0)


@kind(cost=4)
def slow_bodies(s: Stranger) -> Script:
    """A byte, a pause, and so on; the body does not end."""
    body = json.dumps(SMALL).encode()
    chunked = s.any([True, False])
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    head = s.head(*s.door(), "Content-Type: application/json", length)
    drop = b"1\r\n%c\r\n" if chunked else b"%c"
    trickle = [part for byte in body[: s.any([20, 40])] for part in (drop % byte, 0.05)]
    yield Sent([head, *trickle], s.any(["leave", "reset"]), due=0)


@kind()
def broken_chunks(s: Stranger) -> Script:
    """Chunks with wrong or very long sizes, extensions and trailers."""
    body = json.dumps(SMALL).encode()
    junk = b"x" * s.size(10, MIB)
    wrong = s.turn([
        [b"fffffffffffffffff\r\n", body],
        [b"zz\r\n", body, b"\r\n0\r\n\r\n"],
        [b"-5\r\n", body, b"\r\n0\r\n\r\n"],
        [b"%x;" % len(body), junk, b"\r\n%s\r\n0\r\n\r\n" % body],
        [*_chunks(body, 1, b";a=" + junk[:1000])],
        [b"%x\r\n%s\r\n0\r\nX-Trailer: " % (len(body), body), junk, b"\r\n\r\n"],
        [b"%x\n%s\n0\n\n" % (len(body), body)],
        [b"0" * len(junk), b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)],
        [*_chunks(body, 1)][:-1],
    ])
    yield Sent([s.head(*s.door(), "Content-Type: application/json", "Transfer-Encoding: chunked"), *wrong], "half", 5,
        due=0)


@kind(cost=20)
def small_chunks(s: Stranger) -> Script:
    """Bodies of half a megabyte, in chunks of a byte."""
    head = s.head(*s.door(), "Content-Type: application/json", "Transfer-Encoding: chunked")
    chunks = b"1\r\n \r\n" * 80_000
    _refused((yield [Sent([head, chunks, b"0\r\n\r\n"], "half", 10, due=0) for _ in range(40)]))


@kind()
def length_and_chunks(s: Stranger) -> Script:
    """Two lengths of one body: a proxy may read it as two requests."""
    body = json.dumps(SMALL).encode()
    inner = s.head("GET", "/v1/account")
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    both = s.turn([[f"Content-Length: {len(chunked + inner)}", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", "Content-Length: 4"], [f"Content-Length: {len(body)}", "Content-Length: 4"],
        ["Transfer-Encoding: xchunked"], ["Transfer-Encoding: chunked, identity"], ["Transfer-Encoding : chunked"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: identity"], ["Transfer-Encoding:\x0bchunked"]])
    yield Sent([s.head(*s.door(), "Content-Type: application/json", *both), chunked + inner], "half", 5, due=0)


# ---------------------------------------------------------------------------------------------------------------------
# Texts that look like something else


@kind()
def prompts_like_urls(s: Stranger) -> Script:
    """Prompts that make a URL parser raise an error."""
    odd = ["//[a://b", "http://[x", "http://]", "a://[", "http://[::1", "https://[v1.x]/", "x://[fe80::1%25]:p",
        "//[://"]
    odd += ["http://\u2100/", "http://a\u2048b://", "://", "http://a:99999999/", "http://a:b:c/",
        "http://[1.2.3.4]/?a=b"]
    text = s.turn(odd) + s.any(["", " a fox", "/x", "\t"])
    yield s.place(json.dumps(text), places=TEXTS[:2])
    yield s.create({"version": "v", "input": {"prompt": "a", s.any(["replicate_weights", "unknown"]): s.any(odd)}})


@kind()
def urls_with_secrets(s: Stranger) -> Script:
    """References with passwords, tokens and signatures."""
    mark = f"{MARK}{s.dice.randrange(10**9)}"
    url = s.turn([f"https://user:{mark}@127.0.0.1:9/a.safetensors",
        f"https://127.0.0.1:9/a.safetensors?X-Amz-Signature={mark}", f"HTTPS://{mark}@127.0.0.1:9/a",
        f"https://127.0.0.1:9/a#access_token={mark}", f"http://[x/?token={mark}", f"http://u:{mark}@[x/",
        f"//u:{mark}@127.0.0.1:9://b", f"https://127.0.0.1:9/a;token?a=b&c={mark}", f"hf_{mark.replace('-', '')}"])
    where = s.any(["prompt", "replicate_weights", "unknown"])
    yield s.create({"version": "v", "input": {"prompt": "a", where: [url] if where == "unknown" else url}})
    yield s.request("POST", "/v1/predictions", json.dumps({"version": "v", "input": {"prompt": url}}).encode(),
        "Prefer: wait=5")


@kind(cost=8)
def many_urls(s: Stranger) -> Script:
    """Megabytes of URLs, which the server searches for secrets."""
    url = s.any(["http://a:b@c/?d ", "a://b?c", "http://[x ", "x://", "?://@", "http://a@"])
    long = url * (s.size(10_000, MIB) // len(url))
    several = [f"http://u{number}:p@h/?q{number}" for number in range(s.size(100, 10_000))]
    prompt, more = s.turn([(long, []), ("a", several), (" ".join(several), several)])
    yield s.create({"version": "v", "input": {"prompt": prompt, "unknown": more}})


@kind(cost=4)
def texts_like_tokens(s: Stranger) -> Script:
    """Texts that are slow to match with a pattern for tokens."""
    token = s.any(["hf_", "sk-", "hf-hf_", "api_" + "a" * 15 + " ", "civitai_" * 2, "r8_" + "-_" * 40])
    yield s.place(json.dumps(token * s.size(1000, 100_000)), places=TEXTS[:3])


@kind(cost=3)
def data_uris(s: Stranger) -> Script:
    """Data URIs that are broken, large, or empty."""
    content = "QUJD" * s.size(1, 500_000)
    uri = s.turn(["data:image/png;base64,!!!!", "data:,", "data:", "data:image/png;base64",
        f"data:image/png;base64,{content}", f"data:{'x' * 10_000}/y;base64,QUJD",
        "data:image/png;charset=zlib;base64,QUJD", "data:image/png,%ff%00%zz", f"DATA:text/html;base64,{content[:-1]}",
        "data:../../x;base64,QUJD", "data:image/png;base64,\u00e9\u20ac"])
    yield s.create({"version": "v", "input": {"prompt": s.any(["a", "data:text/plain;base64,QUJD"]), "image": uri}})


@kind(cost=2)
def images_elsewhere(s: Stranger) -> Script:
    """Input URLs that Cog cannot fetch."""
    places = ["http://127.0.0.1:9/a.png", "file:///etc/passwd", "ftp://127.0.0.1:9/a", "gopher://x", "http://[x", "//",
        "a b"]
    places += [f"{s.scene.receivers}/404", "https://127.0.0.1:9/", "/etc/passwd", "http://",
        f"http://u:{MARK}@127.0.0.1:9/?{MARK}"]
    yield s.create({"version": "v", "input": {"prompt": "a", "image": s.turn(places)}})


# ---------------------------------------------------------------------------------------------------------------------
# Ids


def _by_id(s: Stranger, name: str) -> Script:
    """An id in the path and in the body."""
    path = quote(name, safe="")
    for sent in (
        s.create({"input": {"prompt": "a"}}, door=("PUT", f"/predictions/{path}")),
        s.create({"input": {"prompt": "a"}, "id": name}, door=("POST", "/predictions")),
        s.request("POST", f"/predictions/{path}/cancel"),
        s.get(f"/v1/predictions/{path}"),
    ):
        _refused((yield sent))


@kind()
def long_ids(s: Stranger) -> Script:
    """Ids longer than a file's name may be."""
    length = s.turn([256, 255, 129, 300, s.size(200, 60_000)])
    yield from _by_id(s, s.any(["x", "-", "a.", "é", "x/"]) * length)


@kind()
def ids_like_paths(s: Stranger) -> Script:
    """Ids that look like paths, encoded once and twice."""
    name = s.turn(["..", "../../x", ".", "../x", "/etc/x", "a/../b", "..\\x", "a//b", "./a", "a/", "%2e%2e"])
    dots = [name.replace(".", "%2e"), name.replace(".", "%252e")]
    written = s.any([quote(name, safe=""), quote(quote(name, safe=""), safe=""), name, *dots])
    for sent in (
        s.create({"input": {"prompt": "a"}}, door=("PUT", f"/predictions/{written}")),
        s.create({"input": {"prompt": "a"}, "id": name}, door=("POST", "/predictions")),
        s.request("POST", f"/predictions/{written}/cancel"),
        s.create({"input": {"prompt": "a"}}, door=("PUT", f"/predictions/{s.name()}%2561")),  # an a, decoded twice
    ):
        _refused((yield sent))


@kind()
def ids_that_control(s: Stranger) -> Script:
    """Ids with line ends, escapes, and invisible characters."""
    odd = s.turn(["\n", "\r\nX: y", "\t", "\x1b[2J", "\x7f", "\u2028", "\u202e", "\u200b", "\x85", " ", "\x01", "\0"])
    yield from _by_id(s, s.any([f"a{odd}b{s.name()}", f"{odd}{s.name()}", odd, f"{s.name()}{odd}"]))


@kind()
def ids_of_other_letters(s: Stranger) -> Script:
    """Ids with characters beyond ASCII, or special in a URL or a shell."""
    yield from _by_id(s, s.any("é😀ßİ٣\uff0f\ufe0f%?#&;'\"$`|<>{}") * s.size(1, 60) + s.any(["", s.name()]))
    yield s.get("/v1/predictions/%ff%fe")
    _refused((yield s.create(SMALL, door=("PUT", "/predictions/" + s.any(["%ff", "%", "%zz", "%u0041"])))))


@kind()
def ids_of_other_types(s: Stranger) -> Script:
    """Empty ids, and ids of other JSON types."""
    yield s.place(s.turn(['""', "0", "[]", "{}", "true", "null", "1e999", '[["a"]]']), places=PLACES[8:9])
    yield s.create(SMALL, door=("PUT", s.any(["/predictions/", "/predictions//", "/predictions/%20"])))


@kind(cost=6)
def one_id_for_many(s: Stranger) -> Script:
    """Many clients request a prediction of the same id at once."""
    name = s.name()
    door = s.any([("PUT", f"/predictions/{name}"), ("POST", "/predictions")])
    yield [s.create({"input": {"prompt": s.any(["a", "b"])}, "id": name}, door=door) for _ in range(12)]


@kind()
def ids_of_others(s: Stranger) -> Script:
    """Another client's prediction, requested again and cancelled after its end."""
    if s.scene.known:
        name = s.any(s.scene.known)["id"]
        yield s.create({"input": {"prompt": "stolen"}}, door=("PUT", f"/predictions/{name}"))
        yield s.create({"input": {"prompt": "stolen"}, "id": name}, door=("POST", "/predictions"))
        yield s.request("POST", f"/v1/predictions/{name}/cancel")


# ---------------------------------------------------------------------------------------------------------------------
# Webhooks


@kind()
def webhook_hosts(s: Stranger) -> Script:
    """Webhooks with invalid host names."""
    none = ["a..b", "%E2%82%AC:p@h", "[x", "a:99999", "x" * 64 + ".y", "a:b", "\u2025", "a b", "a:-1", "[1.2.3.4]"]
    none += ["a\\b", "\u00ad", ".", "..", "@", ":", ":80", "u:p@", "a" * 300, "0x7f.1:99999999999", "\uff0e"]
    none += ["\u20ac:p@h", "xn--\u20ac", "a:80:90", "a.\u3002b", "%", "[]", "[", "a]"]
    scheme, end = s.any(["http", "https"]), s.any(["/", "", "?y=z", "#"])
    _refused((yield s.create({**SMALL, "webhook": f"{scheme}://{s.turn(none)}{end}"})))
    odd = ["[::1%25lo]", "xn--a", "%00", "-", "*", "%E2%82%AC", "a%2fb", "a,b", "[::g]"]
    yield s.create({**SMALL, "webhook": f"{scheme}://{s.any(odd)}{DEAF}{end}"})


@kind()
def webhook_schemes(s: Stranger) -> Script:
    """Webhooks that are no HTTP URLs."""
    odd = ["ftp://127.0.0.1:9/", "file:///etc/passwd", "javascript:alert(1)", "data:,", "ws://127.0.0.1:9/",
        "unix:///tmp/x", "//x"]
    odd += ["/", "", " ", "http:", "http:/", "http://", "http:///x", "https:x", "HTTP//x", "http+unix://x",
        "\thttp://x", "http://x y/", "a"]
    odd += ["http://x/\r\nX: y", "http://x/\n", "http://x/\x00", "http://127.0.0.1:9\\@x/", "http:\\\\x", "http://?",
        "http://#"]
    _refused((yield s.create({**SMALL, "webhook": s.turn(odd)})))
    yield s.create({**SMALL, "webhook_completed": s.any(odd)})


@kind(cost=3)
def long_webhooks(s: Stranger) -> Script:
    """A webhook of a megabyte."""
    long = s.any(["x", "%41", "é", "/", "?", "a.", "a:"]) * s.size(10_000, MIB // 4)
    start = s.turn([f"http://127.0.0.1:9{DEAF}/", "http://", f"http://127.0.0.1:9{DEAF}?"])
    _refused((yield s.create({**SMALL, "webhook": start + long})))


@kind()
def webhook_types(s: Stranger) -> Script:
    """Webhooks of other JSON types."""
    odd = ["1", "[]", "{}", "true", '["http://a/"]', '{"url": "http://a/"}', "1e400", '""']
    _refused((yield s.place(s.turn(odd), places=PLACES[6:7])))


@kind(cost=2)
def webhook_receivers(s: Stranger) -> Script:
    """Receivers of webhooks that hang, close, fail, redirect, or send endless answers."""
    way = s.turn(["1xx", "hang", "close", "500", "redirect", "endless", "junk", "429", "slow", "302-self", "head"])
    filters = s.any([{}, {"webhook_events_filter": ["completed"]}, {"webhook_events_filter": ["start"]}])
    yield s.create({**SMALL, "webhook": f"{s.scene.receivers}{DEAF}/{way}", **filters})
    yield s.create({**SMALL, "webhook": f"http://{MARK}:{MARK}@127.0.0.1:9{DEAF}?{MARK}"})


@kind()
def webhook_filters(s: Stranger) -> Script:
    """Filters of other JSON types, and of 100,000 events."""
    odd = s.turn(["1", '"start"', "{}", "[1]", "[[]]", "[{}]", "[null]", '["Start"]', '["start", ["completed"]]',
        "null", "[]", "true"])
    long = "[" + ",".join(['"completed"'] * s.size(10, 100_000)) + "]"
    yield s.place(s.any([odd, odd, odd, long]), places=[PLACES[7].replace("[%]", "%")])


# ---------------------------------------------------------------------------------------------------------------------
# Headers


@kind()
def prefer(s: Stranger) -> Script:
    """A Prefer header with an invalid time to wait."""
    waits = ["wait=" + "9" * 5000, "wait=-1", "wait=0", "wait=1.5", "wait=", "wait=\xb2", "wait=wait=1",
        "wait=1, wait=2", "wait=0x1"]
    waits += [b"wait=\xd9\xa3", b"\xff", "wait" * 5000, "respond-async, wait=1", "WAIT=1", "wait =1", 'wait="1"',
        "wait=1e9", "wait=00001"]
    yield s.request("POST", "/v1/predictions", json.dumps(SMALL).encode(), b"Prefer: " + octets(s.turn(waits)))
    header = b"Prefer: " + octets(s.any(waits))
    yield s.request("POST", "/predictions", json.dumps(SMALL).encode(), "Content-Type: application/json", header)


@kind()
def forwarded(s: Stranger) -> Script:
    """Headers by which a proxy states the public address; there is no proxy here."""
    names = ["X-Forwarded-Host", "X-Forwarded-Server", "X-Original-Host", "X-Host", "Forwarded"]
    value = s.any([EVIL, f"{EVIL}:80", f"user@{EVIL}", f"{EVIL}/#", f"{EVIL}, b", "\xe9", '"', "x" * 5000,
        f"host={EVIL}"])
    scheme = s.any(["https", "javascript", f"https://{EVIL}/?", "a" * 5000, "", "gopher"])
    headers = [f"{s.turn(names)}: {value}", f"X-Forwarded-Proto: {scheme}", "X-Forwarded-For: 127.0.0.1",
        f"X-Forwarded-Prefix: //{EVIL}"]
    form = _form((FILE_HEAD, b"x"))
    for sent in (
        s.create(SMALL, *headers, door=("POST", "/v1/predictions")),
        s.get(s.any(["/v1/predictions", "/v1/files", "/v1/models/a/b"]), *headers),
        s.request("POST", "/v1/files", form, f"Content-Type: {FORM}", *headers),
    ):
        for answer in (yield sent):
            ignored = answer.status in (200, 201, 202, 503) and EVIL.encode() not in answer.body
            assert ignored, f"A proxy that is none was believed: {answer.status} {answer.body[:500]!r}"


@kind()
def hosts(s: Stranger) -> Script:
    """An invalid Host, none, or two."""
    odd = [None, "", EVIL, f"{s.scene.host}@{EVIL}", f"{EVIL}:0", f"{EVIL}/x", "[", "[::1", b"\xff", "a b",
        "x" * 60_000, "'\"<>", "http://x", f"{EVIL}#"]
    host = s.turn(odd)
    second = s.any([[], [f"Host: {EVIL}"]])
    together = [*([] if host is None else [host]), *([EVIL] if second else [])]
    answers = yield s.create(SMALL, *second, door=SHOWING, host=host)
    for answer in answers:
        if name := answer.json().get("id"):
            for seen in (yield s.get(f"/v1/predictions/{name}")):
                assert EVIL.encode() not in seen.body, f"Another's Host is shown: {seen.body[:500]!r}"
    answers += yield s.get(s.any(["/v1/predictions", "/v1/models/a/b"]), *second, host=host)
    if together not in ([], [""], [EVIL]):
        _refused(answers)
    yield s.get(s.any(["/", "/openapi.json", "/v1/account"]), *second, host=host)


@kind()
def authorization(s: Stranger) -> Script:
    """Invalid tokens, and tokens of invalid characters."""
    odd = ["", "Bearer", "Bearer ", b"Bearer \xe9\xff", "Basic dTpw", "Bearer " + "x" * 60_000, "x" * 60_000, b"\xff",
        "Bearer \t", "Bearer null"]
    odd += [f"Bearer {s.scene.token}x", f"bearer  {s.scene.token}", f"Bearer {s.scene.token} x",
        f"Bearer,{s.scene.token}", b"Bearer \xe2\x82\xac"]
    yield s.create(SMALL, token=s.turn(odd))
    yield s.get("/v1/predictions", f"Authorization: Bearer {s.any(['a', ''])}", token=s.any(odd))


@kind(cost=2)
def many_headers(s: Stranger) -> Script:
    """Thousands of headers."""
    count = s.turn([20_000, s.size(100, 20_000)])
    name = s.any(["X-{}", "Cookie", "Prefer", "Content-Type", "X-Forwarded-Host", "Accept"])
    answers = yield s.create(SMALL, *(f"{name.format(number)}: {number}" for number in range(count)))
    if count > 10_000:
        _refused(answers)


@kind(cost=2)
def long_headers(s: Stranger) -> Script:
    """A header of up to 2 MB, which may not end."""
    start = s.head("GET", "/v1/predictions").removesuffix(b"\r\n") + s.any([b"X-Long: ", b"Cookie: ", b""])
    long = s.any([b"x", b" ", b"\t", b"\xff"]) * s.size(70_000, 2 * MIB)
    _refused((yield s.turn([Sent([start, long, b"\r\n\r\n"], "half"), Sent([start, long, 0.5], "leave", due=0)])))


@kind()
def broken_headers(s: Stranger) -> Script:
    """Invalid header lines."""
    line = s.turn(["X", ": x", "X : y", " X: y", "X: a\r\n b", b"X: a\0b", b"X\0: a", "X: a\rb", "X: a\nY: b",
        b"\xff: a", "X(): a", b"X: \x01\x08", "", "X:"])
    yield Sent(s.request("POST", "/v1/predictions", json.dumps(SMALL).encode(), line).content, "half", 5, due=0)


@kind()
def accepts(s: Stranger) -> Script:
    """Odd Accept, Accept-Encoding, Range and If-None-Match headers."""
    accept = s.turn(["text/event-stream", "text/event-stream;q=0", "*/*;q=x", "x" * 10_000, "", "application/xml",
        "image/*, text/event-stream"])
    yield s.create(SMALL, f"Accept: {accept}", "Accept-Encoding: br, gzip", f"Accept-Language: {accept}")
    yield s.get("/v1/predictions", f"Range: bytes={s.any(['0-', '-1', '5-2', '0-0,' * 500, '9' * 400])}",
        "If-None-Match: *")


@kind()
def expectations(s: Stranger) -> Script:
    """Expect headers, with and without the body that follows."""
    body, kind = json.dumps(SMALL).encode(), "Content-Type: application/json"
    head = s.head(*s.door(), kind, f"Content-Length: {len(body)}",
        f"Expect: {s.turn(['100-continue', '100-CONTINUE', '200-ok', '', 'x' * 5000])}")
    yield s.turn([Sent([head, 0.1, body]), Sent([head, 0.2], "leave", due=0), Sent([head, body])])


# ---------------------------------------------------------------------------------------------------------------------
# Request lines, other protocols, and connections


@kind()
def long_targets(s: Stranger) -> Script:
    """A very long request line."""
    start = s.any(["/", "/v1/predictions/", "/v1/predictions?cursor=", "/files/a/", "/v1/models/a/"])
    more = s.any(["x", "%41", "/", "a/", "&a"]) * s.size(5_000, MIB // 3)
    yield Sent([s.head(s.any(["GET", "PUT", "DELETE"]), start + more)], "half")


@kind()
def methods(s: Stranger) -> Script:
    """Unknown methods, and methods that a path does not have."""
    method = s.turn(["BREW", "get", "TRACE", "CONNECT", "OPTIONS", "PATCH", "HEAD", "PROPFIND", "X" * 10_000, "GE\tT",
        "PRI", "M-SEARCH", "DELETE", "QUERY"])
    path = s.any(["/", "*", "/predictions", "/v1/predictions", "/v1/files/x", "/-/healthz", "/health-check",
        "/files/a/b", "example.com:80"])
    yield Sent([s.head(method, path, "Content-Length: 0")], "half", 5, due=0)


@kind()
def targets(s: Stranger) -> Script:
    """Request targets in rare and invalid forms."""
    odd = [f"http://{EVIL}/v1/predictions", "http://", f"//{EVIL}//v1/predictions", "*", "v1/predictions", "", "?", "#",
        "/v1/predictions#x", "/a b"]
    odd += [b"/\xff\xfe", "/é", "/v1//predictions", "/v1/./predictions", "/v1/../v1/predictions", "/%2e%2e/",
        "/v1%2fpredictions", "/\\", "http://[x/", "/;a", "http://a:b@c:99999/"]
    yield Sent([s.head(s.any(["GET", "POST", "PUT"]), s.turn(odd), "Content-Length: 0")], "half", 5, due=0)


@kind()
def versions_of_http(s: Stranger) -> Script:
    """Older, newer and invalid versions of HTTP, and none."""
    version = s.turn(["HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/9.99", "http/1.1", "HTTP/1.1.1", "HTTP/1", "",
        "ICY/1.0", "HTTP/11", "HTTP/" + "1" * 5000])
    yield Sent([s.head("GET", "/v1/predictions", version=version, host=s.any([None, s.scene.host]))], "half", 5, due=0)
    yield Sent([b"GET /\r\n\r\n"], "half", 5, due=0)


@kind()
def other_protocols(s: Stranger) -> Script:
    """The first bytes of other protocols."""
    hello = bytes.fromhex("16030100c4010000c00303") + s.dice.randbytes(190)
    said = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0", hello, b"SSH-2.0-x\r\n", b"EHLO x\r\n",
        b"*1\r\n$4\r\nPING\r\n", b"\0" * 1000, b"\r\n" * 5000]
    said += [s.dice.randbytes(s.size(1, 100_000)), b"\x05\x01\x00", b"{}", b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" +
        s.head("GET", "/")]
    yield Sent([s.turn(said)], "half", 3, due=0)


@kind()
def upgrades(s: Stranger) -> Script:
    """Upgrades to other protocols."""
    to = s.turn(["websocket", "h2c", "TLS/1.0", "websocket, h2c", "x" * 5000])
    key = "Sec-WebSocket-Key: " + s.any(["dGhlIHNhbXBsZSBub25jZQ==", "", "\xff", "x" * 1000])
    headers = [f"Upgrade: {to}", f"Connection: Upgrade{s.any(['', ', HTTP2-Settings', ', close'])}", key,
        "Sec-WebSocket-Version: 13", "HTTP2-Settings: AAMAAABk"]
    yield Sent([s.head("GET", s.any(["/", "/predictions", "/v1/predictions"]), *headers, close=False)], "half", 5,
        due=0)


@kind(cost=6)
def pipelines(s: Stranger) -> Script:
    """A hundred requests in one connection, without waiting for answers."""
    body = json.dumps(SMALL).encode()
    post = s.head("POST", "/v1/predictions", f"Content-Length: {len(body)}", close=False) + body
    looks = [s.head("GET", path, close=False) for path in ("/v1/predictions", "/", "/nothing")]
    many = [s.any([*looks, post]) for _ in range(99)]
    yield Sent([b"".join([*many, s.head("GET", "/")])], s.turn(["read", "leave", "reset"]), due=100)


@kind(cost=10)
def silent_connections(s: Stranger) -> Script:
    """Dozens of connections that send nothing, or a byte now and then."""
    said = s.turn([[], [b"G"], [b"GET / HTTP/1.1\r\nX: "], [b"GET / HTTP/1.1\r\nHost: a\r\n"]])
    slowly = [part for _ in range(6) for part in (0.3, s.any([b"x", b"\r", b""]))]
    yield [Sent([*said, *slowly], s.any(["leave", "reset"]), due=0) for _ in range(40)]


@kind(cost=2)
def resets(s: Stranger) -> Script:
    """The connection breaks somewhere in a request."""
    request = b"".join(s.create(SMALL).content)
    yield Sent([request[: s.dice.randrange(len(request))], s.any([0.0, 0.05])], "reset", due=0)
    yield Sent([request, s.any([0.0, 0.01, 0.03])], s.any(["leave", "reset"]), due=0)
    yield Sent([request], "half", due=0, patience=10)


@kind(cost=6)
def storms(s: Stranger) -> Script:
    """Many connections at once."""
    yield [s.get(s.any(["/", "/v1/predictions", "/v1/account", "/nothing", "/openapi.json"])) for _ in range(40)]


@kind(cost=4)
def create_and_leave(s: Stranger) -> Script:
    """Request predictions, and close before the answer."""
    yield [s.create(SMALL, ending=s.any(["leave", "reset"])) for _ in range(8)]


@kind(cost=6)
def slow_readers(s: Stranger) -> Script:
    """Send requests, and read no answer."""
    paths = ["/openapi.json", "/v1/predictions", "/v1/models/a/b"]
    asked = [s.head("GET", s.any(paths), close=False) for _ in range(s.any([1, 30]))]
    yield [Sent(asked, "stall", 3, due=0) for _ in range(4)]


@kind(cost=30)
def large_answers(s: Stranger) -> Script:
    """Request the same tens of megabytes dozens of times, and read nothing."""
    body = json.dumps({"input": {"prompt": LARGE * 10_000}}).encode()
    asked = s.request("PUT", f"/predictions/{s.name()}", body, "Content-Type: application/json")
    if [answer.status for answer in (yield asked)] == [200]:
        yield [Sent(asked.content, "stall", 3, due=0) for _ in range(80)]


# ---------------------------------------------------------------------------------------------------------------------
# Forms and files


@kind(cost=40)
def large_forms(s: Stranger) -> Script:
    """A file or a field above every limit."""
    megabytes = 600 if s.scene.large else 250
    head = octets(s.turn([FILE_HEAD, FIELD_HEAD, FILE_HEAD.replace("content", "other")]))
    start, piece, end = b"--xyz\r\n%s\r\n\r\n" % head, b"x" * MIB, b"\r\n--xyz--\r\n"
    length = f"Content-Length: {len(start) + megabytes * MIB + len(end)}"
    if s.any([True, False]):
        length = "Transfer-Encoding: chunked"
        start, piece, end = (b"%x\r\n%s\r\n" % (len(part), part) for part in (start, piece, end))
        end += b"0\r\n\r\n"
    form = [start, *[piece] * megabytes, end]
    yield Sent([s.head("POST", "/v1/files", f"Content-Type: {FORM}", length), *form], due=0)


def _upload(s: Stranger, form: bytes, kind: str | bytes = FORM) -> Sent:
    return s.request("POST", "/v1/files", form, b"Content-Type: " + octets(kind))


@kind(cost=4)
def many_parts(s: Stranger) -> Script:
    """A form of 100,000 parts."""
    count = s.size(500, 100_000)
    head = s.turn([FIELD_HEAD, FILE_HEAD, 'Content-Disposition: form-data; name="{}"',
        'Content-Disposition: form-data; name="{}"; filename="{}"'])
    parts = ((head.replace("{}", str(number)), b"") for number in range(count))
    _refused((yield _upload(s, _form(*parts, (FILE_HEAD, b"x")))))


@kind()
def broken_forms(s: Stranger) -> Script:
    """Forms with a missing or very long boundary, or without an end."""
    good = _form((FILE_HEAD, b"x"))
    long = "b" * s.size(71, 60_000)
    forms = [good, good[:-5], b"", b"--xyz", good * 2, _form((FILE_HEAD, b"x"), end=b""), b"\r\n" + good]
    forms += [good.replace(b"\r\n", b"\n"), b"x" * 1000]
    odd = [b"", b"; boundary=", b"; boundary=" + long.encode(), b"; boundary=\xff", b'; boundary="']
    odd += [b"; boundary=a; boundary=b"]
    kinds = [FORM, "multipart/mixed; boundary=xyz", *(b"multipart/form-data" + some for some in odd)]
    yield _upload(s, s.any(forms), s.turn(kinds))
    boundary = long.encode()
    yield _upload(s, good.replace(b"xyz", boundary), b"multipart/form-data; boundary=" + boundary)


@kind(cost=3)
def part_headers(s: Stranger) -> Script:
    """Parts with very long, invalid or no headers."""
    long = "x" * s.size(1000, 2 * MIB)
    head = s.turn([f"{FILE_HEAD}\r\nX: {long}", f"{FILE_HEAD}\r\n{long}: a", "X: y\r\n" * 20_000 + FILE_HEAD, long, "",
        ":", "Content-Disposition: form-data", "Content-Disposition: form-data; name", FILE_HEAD.replace("form-data",
        "x"), FILE_HEAD + "\r\nContent-Transfer-Encoding: base64", FILE_HEAD + "\r\n folded"])
    yield _upload(s, _form((head, b"x")))


@kind()
def file_names(s: Stranger) -> Script:
    """File names that are paths, invalid text, or very long."""
    name = s.turn(["../../x", "a\0b", b"\xff\xfe", b"\xed\xa0\x80", "x" * 100_000, 'a"b', "a\\", "", "/etc/passwd",
        "a\rb", "é\u202e", ".", "%00", "con", b"\xf0\x9f\x98\x80", "a\x1b[2J"])
    head = FILE_HEAD.encode().replace(b"a.png", octets(name))
    odd = s.any([b"image/png", b"text/html", b"x" * 10_000, b"\xff", b"a/b\0", b"", b"text/html; charset=zlib"])
    yield _upload(s, _form((head.replace(b"image/png", odd), b"x")))
    extended = FILE_HEAD.replace('filename="a.png"', "filename*=" + s.any(["utf-8''%ff%00", "utf-8''..%2fx", "zlib''x",
        "'", "utf-8''", "UTF-8'en'%E2%82%AC%u"]))
    for answer in (yield _upload(s, _form((extended, b"x")))):
        if url := answer.json().get("urls", {}).get("get"):
            yield s.get("/" + url.split("/", 3)[-1])
    yield s.get("/v1/files")


@kind()
def form_charsets(s: Stranger) -> Script:
    """Charsets that are unknown, or do not decode text."""
    charset = s.turn(["zlib", "rot13", "idna", "undefined", "utf-16", "hex", "unknown", "base64", "punycode", "mbcs",
        "x" * 1000, "\0", "utf-7", "unicode_escape", "bz2"])
    form = _form(('Content-Disposition: form-data; name="_charset_"', charset.encode()), (FIELD_HEAD, b'{"a": "\xe9"}'),
        (FILE_HEAD, b"x"))
    yield _upload(s, form, f"{FORM}; charset={charset}")
    yield _upload(s, _form((FIELD_HEAD + f"\r\nContent-Type: text/plain; charset={charset}", b"{}"), (FILE_HEAD, b"x")))


@kind()
def form_metadata(s: Stranger) -> Script:
    """Hostile JSON in the metadata of a file."""
    told = s.turn(["NaN", '{"a": Infinity}', "[" * 400 + "]" * 400, '{"a": 1, "a": 2}', '"\\ud800"', '"\\u0000"',
        "9" * 5000, "{", "null", "1e999", '"a"', b"\xff", "[" * 100_000, "", b"\xef\xbb\xbf{}", "[" + "[]," * 200_000 +
        "1]"])
    as_file = FIELD_HEAD + '; filename="m"\r\nContent-Type: application/json'
    answers = yield _upload(s, _form((s.any([FIELD_HEAD, FIELD_HEAD, as_file]), octets(told)), (FILE_HEAD, b"x")))
    twice = _form((FIELD_HEAD, b"{}"), (FIELD_HEAD, octets(told)), (FILE_HEAD, b"x"), (FILE_HEAD, b"y"))
    answers += yield _upload(s, twice)
    if told:
        _refused(answers)
    yield s.get("/v1/files")


@kind(cost=2)
def uploads_that_go(s: Stranger) -> Script:
    """A file that is deleted before the prediction that names it."""
    answers = yield _upload(s, _form((FILE_HEAD, b"x")))
    url = next((answer.json().get("urls", {}).get("get", "") for answer in answers), "")
    url = url or f"http://{s.scene.host}/v1/files/nothing"
    body = {"version": "v", "input": {"prompt": "a", "image": url}}
    delete = s.request("DELETE", "/" + url.split("/", 3)[-1])
    if s.turn([True, False]):
        yield delete
        yield s.create(body, door=SHOWING)
    else:
        yield [s.create(body), delete, delete, s.create(body)]
    other = f"http://127.0.0.1:9/v1/files/{s.any(['x', '-', 'a' * 5000])}"
    yield s.create({"version": "v", "input": {"prompt": other, "unknown": url}})


@kind(cost=40)
def uploads_named_often(s: Stranger) -> Script:
    """A large file in several inputs of several predictions, together above every limit."""
    megabytes = 60 if s.scene.large else 30
    answers = yield _upload(s, _form((FILE_HEAD, b"x" * megabytes * MIB)))
    for url in [answer.json().get("urls", {}).get("get") for answer in answers if answer.status == 201]:
        body = {"version": "v", "input": dict.fromkeys(("prompt", "image", "replicate_weights"), url)}
        yield [s.create(body, door=SHOWING) for _ in range(12)]


@kind()
def file_ids(s: Stranger) -> Script:
    """Ids of files that cannot exist."""
    odd = s.turn(["é", "%00", "..", "%2e%2e", "..%2fx", "%ff", "x" * 5000, "-", "%0a", "a%0ab", "٣", "%", "%25", "\x7f",
        "%e2%80%ae", "*", "~"])
    for path in (f"/files/{odd}/a.webp", f"/files/a/{odd}", f"/v1/files/{odd}"):
        yield s.get(path)
    yield s.request("DELETE", f"/v1/files/{odd}")


@kind()
def stream_keys(s: Stranger) -> Script:
    """Stream keys that are not ASCII or too long, for known predictions."""
    name = s.any(s.scene.known)["id"] if s.scene.known else "x"
    odd = s.turn(["%C3%A9", "é", "%ff", "%00", "x" * 5000, "..", "%0a", "😀", "%F0%9F%98%80", "0" * 32,
        "%E2%82%AC" * 32])
    yield s.get(f"/v1/files/{name}/stream/{odd}", token=s.any([None, f"Bearer {s.scene.token}"]))
    yield s.get(f"/v1/files/{s.any(['%ff', '..', 'x', 'é'])}/stream/{odd}")


@kind(cost=2)
def streams_left(s: Stranger) -> Script:
    """A stream whose client disconnects."""
    for answer in (yield s.create(SMALL, door=SHOWING)):
        if url := answer.json().get("urls", {}).get("stream"):
            yield s.get("/" + url.split("/", 3)[-1], ending=s.any(["leave", "reset", "read"]))


# ---------------------------------------------------------------------------------------------------------------------
# Names, paths and pages


@kind()
def cursors(s: Stranger) -> Script:
    """Invalid cursors of pages."""
    odd = ["n~~", "p~a~b", "n~%00~a", "n~%ff~%ff", "x", "~", "n~" + "9" * 5000 + "~a", "n~2026~" + "a" * 5000, "%00",
        "n~2999-01-01~%F0%9F%98%80", "p~~%27%22--", "n~\xe9~b"]
    _refused((yield s.get(f"/v1/predictions?cursor={s.turn(odd)}")))
    queries = ["cursor", "cursor=", "cursor=a&cursor=b", "cursor[]=x", "cursor=p~0~a~b~c", "&" * 5000, "=" * 5000,
        "a=b&" * 5000, "%ff=%ff"]
    yield s.get(f"/v1/predictions?{s.any(queries)}")


@kind()
def names(s: Stranger) -> Script:
    """Versions, models and owners that are very long or invalid."""
    odd = s.turn(["x" * 5000, "é", "..", "a/b/c", ":", "a:", ":a", "a/b:", "a:b:c", "/", " ", "😀" * 500, "a\nb",
        "a\0b", "%00", "<script>", "{}", "{owner}"])
    version = s.any([odd, odd, 1, [], {}, None, True, "y" * MIB])
    _refused((yield s.create({**SMALL, "version": version}, door=SHOWING)))
    part = quote(odd, safe="")
    for sent in (
        s.create(SMALL, door=("POST", f"/v1/{s.any(['models', 'deployments'])}/{part}/{part}/predictions")),
        s.get(f"/v1/models/{part}/{part}/versions/{part}"),
        s.get(f"/v1/deployments/{part}/{part}"),
    ):
        _refused((yield sent))


@kind()
def unknown_paths(s: Stranger) -> Script:
    """Paths that other servers have."""
    odd = ["/v1/%00", "/v1/%ff", "/v1/", "/v1", "/v1/predictions/", "/metrics", "/-/routes", "/shutdown", "/docs",
        "/api/jobs/", "/.env", "/predictions/a/b/c"]
    odd += ["/v1/predictions/%ff/cancel", "/v1/files/", "/trainings", "/v1/collections", "/files/a/b/c", "/favicon.ico",
        "/v1/hardware", "/-/healthz/", "/%2e%2e/%2e%2e/etc/passwd"]
    yield s.request(s.any(["GET", "POST", "PUT", "DELETE"]), s.turn(odd))


@kind(cost=3)
def cancels(s: Stranger) -> Script:
    """Cancel a prediction many times, and unknown ones."""
    name = s.name()
    start = s.create({"input": {"prompt": "a"}}, "Prefer: respond-async", door=("PUT", f"/predictions/{name}"))
    storm = [s.request("POST", f"/predictions/{name}/cancel") for _ in range(8)]
    yield [start, *storm]
    odd = s.turn(["é", "%00", "%ff", "..", "x" * 5000, "%2f", "%0a", " "])
    yield s.request("POST", f"{s.any(['/predictions', '/v1/predictions'])}/{odd.replace(' ', '%20')}/cancel",
        json.dumps([{}] * 100).encode())


@kind()
def without_a_token(s: Stranger) -> Script:
    """Requests without a token; each must be answered with 401."""
    paths = ["/v1/predictions", "/v1/webhooks/default/secret", "/v1/files", "/openapi.json"]
    body = s.any(["[" * 100_000, "x" * MIB, json.dumps(SMALL)])
    for sent in (s.create(body, token=None), s.get(s.any(paths), token=None)):
        for answer in (yield sent):
            assert answer.status == 401, f"{answer.status}: {answer.body[:500]!r}"
