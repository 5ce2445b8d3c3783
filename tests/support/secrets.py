"""References of all forms that contain a secret, for tests that search messages and logs for it."""

import base64
from urllib.parse import quote

from hypothesis import strategies as st

SECRET = "TOPSECRET"
# Blanks that `str.strip` removes, and invisible characters that it keeps.
BLANKS = ("", "", "", " ", "\n", "\t", "\r\n", "\xa0", "\x0b", "\u2028", "\x85", "\ufeff", "\u200b", "\u2060", "\xad")
# Quotation marks that are copied along with addresses: "https://host", <https://host>.
QUOTES = ("{}", "{}", "{}", '"{}"', "'{}'", "“{}”", "‘{}’", "`{}`", "<{}>", '"<{}>"', "' “{}”\ufeff'", '"{}', "{}>")
SCHEMES = ("http://", "https://", "HTTPS://", "hTTp:/\\", "https:////", "http:/", "http:", "//", "\\\\", "s3://")
HOSTS = (
    "h", "host/x", "host.com/x.png", "127.0.0.1:9/a", "[::1]:80/a", "huggingface.co/a/b", "civitai.com/models/1",
    "replicate.com/o/n",
)  # fmt: skip
ADDRESSES = (
    "http://h", "https://host.com/x.png", "HTTP:/\\host/x", "http://127.0.0.1:9/x", "//host/a",
    "https:////host.com/a//b", "www.h.com/x.png", "civitai.com", "civitai.com/models/1", "WWW.civitai.red/models/1",
    "https://civitai.com/api/download/models/2", "huggingface.co/a/b/resolve/main/x@2.safetensors",
    "https://hf.co/a/b", "replicate.com/owner/name", "https://huggingface.co/a/b/resolve/main/x.safetensors",
    "huggingface.co/a/b/tree/main/x", "huggingface.co/a/b/resolve/main", "https://host.com/my lora.safetensors",
    "https://replicate.com/p/abc", "https://civitai.com/pt-BR/models/1",
    'https://huggingface.co/a/b/resolve/main/my "best" lora.safetensors',
)  # fmt: skip
MODELS = (
    "local:styles/ink",
    "owner/name",
    "owner/name:0123456789abcdef",
    "urn:air:flux1:lora:civitai:1@2",
    "air:flux1:lora:civitai:1@2",
)
HEADERS = ("image/png;base64", "", ";base64", " image/png; base64", "image/png ;base64", "text/plain", ";x=y")
# Blanks and line breaks that are pasted within a secret, and belong to it.
WITHIN = " \t\n\x0b\x1c\x85\xa0\u2028\u3000"
secrets = st.text("ABCxyz019", max_size=6).map(lambda more: SECRET + more)
# Characters of generated passwords.
around = st.text("ab1/\\:?#%@;.,&=~", max_size=5)


@st.composite
def passwords(draw: st.DrawFn) -> str:
    return draw(around) + draw(secrets) + draw(around)


@st.composite
def with_blanks(draw: st.DrawFn) -> str:
    """An address with a blank within its password or its query, before the secret."""
    blank, secret = draw(st.sampled_from(WITHIN)), draw(secrets)
    login, query = f"https://u:pw1234{blank}{secret}@h.com/x.png", f"https://h.com/x.png?token=pw1234{blank}{secret}"
    return draw(st.sampled_from((login, query)))


@st.composite
def logins(draw: st.DrawFn) -> str:
    """An address with a login: a user, a password or both, one of which is the secret."""
    user = draw(st.sampled_from(("u", "me", "me@home", "first.last", "%20u")))
    login = draw(
        st.one_of(
            passwords().map(lambda password: f"{user}:{password}"),
            st.builds("{}:{}".format, secrets, around),
            secrets,
        )
    )
    # Without a scheme and a colon, a login looks like an e-mail address.
    schemes = (*SCHEMES, "") if ":" in login else SCHEMES
    return f"{draw(st.sampled_from(schemes))}{login}@{draw(st.sampled_from(HOSTS))}"


@st.composite
def queries(draw: st.DrawFn, addresses: tuple[str, ...] = ADDRESSES) -> str:
    """An address with a secret behind it, in a query, a fragment or a session."""
    secret = draw(passwords())
    # As a query of Hugging Face's own, an escaped one is the name of a file.
    starts = ("?", "?token=", "?a=b&token=", "#", "#token=", ";jsessionid=", "?a;b=", "/?x@y.z&key=", ";sig=")
    return draw(st.sampled_from(addresses)) + draw(st.sampled_from(starts)) + secret


@st.composite
def escaped(draw: st.DrawFn) -> str:
    """An address with a query that was encoded along with it."""
    addresses = ("https://host.com/x.png", "http://h/x", "www.h.com/x.png", "civitai.com/models/1", "hf.co/a/b/x.bin")
    starts = ("%3Ftoken%3D", "%3f", "%253Ftoken%253D", "%23", "%3Bsig%3D")
    return draw(st.sampled_from(addresses)) + draw(st.sampled_from(starts)) + draw(secrets)


@st.composite
def data_uris(draw: st.DrawFn) -> str:
    secret = draw(secrets)
    header = draw(st.sampled_from(HEADERS))
    packed = base64.b64encode(b"---" + secret.encode()).decode()
    content = draw(st.sampled_from((secret, quote(secret), packed, f"\n{secret}")))
    return f"{draw(st.sampled_from(('data:', 'DATA:', 'Data:')))}{header},{content}"


def references() -> st.SearchStrategy[str]:
    """References of any form, with blanks and quotation marks around them."""
    bare = st.one_of(logins(), queries(), queries(MODELS), escaped(), data_uris(), with_blanks())
    quoted = st.builds(str.format, st.sampled_from(QUOTES), bare)
    return st.builds("{}{}{}".format, st.sampled_from(BLANKS), quoted, st.sampled_from(BLANKS))


def told(shown: object) -> bool:
    """Whether a text contains the secret, in capitals or not, plain or in base64."""
    text = str(shown).casefold()
    return SECRET.casefold() in text or base64.b64encode(b"---" + SECRET.encode()).decode().casefold() in text
