"""Every environment variable that the predictor reads, its default and its reason; the cluster's: cluster/settings.py.

COG_WEIGHTS, the main LoRA of requests that name none, is not here: Cog hands it to `Predictor.setup` as `weights`.
This module knows names and defaults; it opens no file and imports no torch.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from service.lines import printable

# CHANGELOG.md says what each version has, and pictures say which one drew them.
VERSION = "0.9.0"
ROOT = Path(__file__).parent
MIB, GIB = 1024**2, 1024**3
# The longest that hosts may take for all pictures of a request, which have a few megabytes: seconds are enough.
PICTURE_SECONDS = 120
# The most gigabytes or seconds: a larger number is a mistake, and no clock or file can express it.
MANY = 10**6
# Shown when a server starts, even at their defaults.
ALWAYS_SHOWN = {"FLUX_DEV", "FLUX_SCHNELL", "WEIGHTS_CACHE_GB", "LORA_MAX_GB", "PREDICTION_SECONDS"}


@dataclass(frozen=True)
class Models:
    """Where the weights of each part come from: a directory or a Hugging Face repo, in diffusers layout."""

    dev: str
    schnell: str
    safety_checker: str
    nsfw_classifier: str


OFFICIAL = Models(
    dev="black-forest-labs/FLUX.1-dev",
    schnell="black-forest-labs/FLUX.1-schnell",
    safety_checker="CompVis/stable-diffusion-safety-checker",
    nsfw_classifier="Falconsai/nsfw_image_detection",
)
MODEL_VARIABLES = {
    "dev": "FLUX_DEV",
    "schnell": "FLUX_SCHNELL",
    "safety_checker": "SAFETY_CHECKER",
    "nsfw_classifier": "NSFW_CLASSIFIER",
}
MINIATURE = Models(**{part: str(ROOT / "mini" / part) for part in MODEL_VARIABLES})


@dataclass(frozen=True)
class Settings:
    """The environment, read once. The comment above each field gives its variable and its reason."""

    # FLUX_DEV, FLUX_SCHNELL, SAFETY_CHECKER, NSFW_CLASSIFIER: the official repos on a CUDA machine, elsewhere the
    # miniature, so that the same command works on a laptop. HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE (where repos lie,
    # whether Hugging Face may be asked) are read by its own library.
    models: Models
    # LORAS_DIR: a folder of LoRAs that requests may name; the miniature comes with its own. None: there is none.
    loras_dir: Path | None = None
    # WEIGHTS_CACHE: LoRA files on disk, and compile caches in its folder `compile`.
    cache_dir: Path = Path("weights-cache")
    # WEIGHTS_CACHE_GB: what the LoRA files together may take; compile caches are not counted.
    cache_bytes: int = 50 * GIB
    # LORA_MAX_GB: the largest LoRA accepted, packed or unpacked: a stranger names the file, the disk is ours.
    lora_max_bytes: int = 5 * GIB
    # FLUX_COMPILE: None means "where CUDA is"; compiling on a CPU takes minutes and gains little.
    compile: bool | None = None
    # PREDICTION_SECONDS: how long work on the device may take before its process is ended, and a LoRA to arrive; None:
    # any time. A GPU that hangs would otherwise keep its server busy for ever.
    prediction_seconds: float | None = None
    # WEIGHTS_ALLOW_PRIVATE_HOSTS=1: URLs of LoRAs and pictures may name private and loopback addresses (intranets).
    allow_private_hosts: bool = False
    # HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, by scheme, and NO_PROXY; in lower case too, which wins, and empty switches
    # off. A company's proxy decides itself what may be reached: private addresses behind it are not refused here.
    proxies: Mapping[str, str] = field(default_factory=dict)
    # HF_TOKEN, HF_ENDPOINT: private and gated repos; a mirror.
    hf_token: str | None = None
    hf_endpoint: str = "https://huggingface.co"
    # CIVITAI_API_TOKEN, CIVITAI_ENDPOINT: every file of CivitAI needs a token; a mirror.
    civitai_token: str | None = None
    civitai_endpoint: str = "https://civitai.com"
    # REPLICATE_API_TOKEN, REPLICATE_ENDPOINT: weights of private models; a mirror.
    replicate_token: str | None = None
    replicate_endpoint: str = "https://replicate.com"

    @classmethod
    def from_environment(cls, *, cuda: bool, environ: Mapping[str, str] = os.environ) -> "Settings":
        """The settings by the variables, of which empty ones count as unset; `cuda` chooses the default models."""
        default = OFFICIAL if cuda else MINIATURE

        def text(name: str, fallback: str | None = None) -> str | None:
            return environ.get(name, "").strip() or fallback

        def size(name: str, fallback: int) -> int:
            value = text(name, str(fallback / GIB))
            gib = number(value)
            if not gib > 0:
                wanted = f"a number of gigabytes above 0 and up to {MANY}, such as 5"
                raise ValueError(f"{name} is {value!r}; it must be {wanted}.")
            return int(gib * GIB)

        def endpoint(name: str, fallback: str) -> str:
            url = text(name, fallback).rstrip("/")
            if not re.match("https?://[^/?#]", url, re.IGNORECASE):  # it is not shown: it may have a login
                raise ValueError(f"{name} is no address of a host; it must begin with https:// or http://.")
            return url

        models = Models(**{part: text(name, getattr(default, part)) for part, name in MODEL_VARIABLES.items()})
        loras_dir = text("LORAS_DIR", str(ROOT / "mini" / "loras") if models.dev == MINIATURE.dev else None)
        return cls(
            models=models,
            loras_dir=Path(loras_dir) if loras_dir else None,
            cache_dir=Path(text("WEIGHTS_CACHE", str(cls.cache_dir))),
            cache_bytes=size("WEIGHTS_CACHE_GB", cls.cache_bytes),
            lora_max_bytes=size("LORA_MAX_GB", cls.lora_max_bytes),
            compile=switch("FLUX_COMPILE", environ),
            prediction_seconds=prediction_seconds(cuda=cuda, environ=environ),
            allow_private_hosts=bool(switch("WEIGHTS_ALLOW_PRIVATE_HOSTS", environ)),
            proxies=_proxies(environ),
            hf_token=text("HF_TOKEN"),
            hf_endpoint=endpoint("HF_ENDPOINT", cls.hf_endpoint),
            civitai_token=text("CIVITAI_API_TOKEN"),
            civitai_endpoint=endpoint("CIVITAI_ENDPOINT", cls.civitai_endpoint),
            replicate_token=text("REPLICATE_API_TOKEN"),
            replicate_endpoint=endpoint("REPLICATE_ENDPOINT", cls.replicate_endpoint),
        )

    def __repr__(self) -> str:
        """One line of variables as operators set them: models, limits, and whatever is not at its default.

        It is printed when the server starts, and Cog shows that to any client that asks for its health: so without
        tokens, proxies (some hold a password), mirrors' logins and queries, and paths of this machine.
        """
        models = MINIATURE if self.models.dev == MINIATURE.dev else OFFICIAL
        usual = Settings(models)._variables()
        shown = [
            f"{name}={value}"
            for name, value in self._variables().items()
            if value and (name in ALWAYS_SHOWN or value != usual.get(name))
        ]
        return printable(f"Settings: {', '.join(shown)}")

    def _variables(self) -> dict[str, str]:
        """The variables that would give the same settings, without NO_PROXY, which Cog's server always has."""
        return {
            **{name: _place(getattr(self.models, part)) for part, name in MODEL_VARIABLES.items()},
            "LORAS_DIR": _place(self.loras_dir or ""),
            "WEIGHTS_CACHE": _place(self.cache_dir),
            "WEIGHTS_CACHE_GB": f"{self.cache_bytes / GIB:.6g}",
            "LORA_MAX_GB": f"{self.lora_max_bytes / GIB:.6g}",
            "PREDICTION_SECONDS": f"{self.prediction_seconds or 0:.6g}",
            "FLUX_COMPILE": "" if self.compile is None else f"{self.compile:d}",
            "WEIGHTS_ALLOW_PRIVATE_HOSTS": f"{self.allow_private_hosts:d}",
            **{f"{scheme.upper()}_PROXY": "set" for scheme in self.proxies if scheme != "no"},
            "HF_TOKEN": "set" if self.hf_token else "",
            "HF_ENDPOINT": _without_secrets(self.hf_endpoint),
            "CIVITAI_API_TOKEN": "set" if self.civitai_token else "",
            "CIVITAI_ENDPOINT": _without_secrets(self.civitai_endpoint),
            "REPLICATE_API_TOKEN": "set" if self.replicate_token else "",
            "REPLICATE_ENDPOINT": _without_secrets(self.replicate_endpoint),
        }


def _place(named: str | Path) -> str:
    """A folder within the project by its path there, another one by its name alone; the name of a repo as it is."""
    return folder_shown(_without_secrets(str(named)).removeprefix(f"{ROOT}{os.sep}"))


def folder_shown(named: str) -> str:
    """The name alone of what may be a folder elsewhere on this machine, since errors and logs go to strangers."""
    elsewhere = re.match(r"[/~.]|file:", named, re.IGNORECASE) or ".." in Path(named).parts
    return f"…/{Path(named).name}" if elsewhere else named


def _without_secrets(url: str) -> str:
    """A mirror's address without login and query; the scheme alone, if a login may have a query's signs in it."""
    # Stricter than sources/shown.py, which settings may not import.
    return re.sub(r"://(?:.*[?#;].*@.*|(?:.*@)?([^?#;]*).*)", r"://\1", url, flags=re.DOTALL)


def _proxies(environ: Mapping[str, str]) -> dict[str, str]:
    """The operator's proxies by scheme, and under "no" the hosts reached without one; errors do not show an address."""
    proxies = {}
    for scheme in ("https", "http", "all", "no"):
        # As in the standard library, what is in lower case wins, and switches off where it is empty.
        variable = f"{scheme}_proxy" if f"{scheme}_proxy" in environ else f"{scheme}_proxy".upper()
        value = environ.get(variable, "").strip()
        if not value or (scheme == "all" and {"https", "http"} <= proxies.keys()):  # which nothing would go through
            continue
        if scheme != "no":
            value = value if "://" in value else f"http://{value}"
            if not names_host(value):
                wanted = "http://[user:password@]host:port"
                raise ValueError(f"{variable} is no proxy that can be used; it must be {wanted}.")
        proxies[scheme] = value
    return proxies


def names_host(url: str) -> bool:
    """Whether a URL says by http or https which host is to be asked."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def prediction_seconds(*, cuda: bool, environ: Mapping[str, str] = os.environ) -> float | None:
    """PREDICTION_SECONDS: 600 on a CUDA machine unless given; None where it is 0, and on a CPU unless given."""
    value = environ.get("PREDICTION_SECONDS", "").strip() or ("600" if cuda else "0")
    seconds = number(value)
    if math.isnan(seconds):
        raise ValueError(
            f"PREDICTION_SECONDS is {value!r}; it must be a number of seconds up to {MANY}, such as 600; 0 is no limit."
        )
    return seconds or None


def switch(name: str, environ: Mapping[str, str]) -> bool | None:
    """Whether a variable is 1 rather than 0; None where it is unset or empty."""
    value = environ.get(name, "").strip()
    if value not in ("", "0", "1"):
        raise ValueError(f"{name} is {value!r}; it must be 0 or 1.")
    return value == "1" if value else None


def number(text: str) -> float:
    """The number from 0 to MANY that a text says; nan, which is not above 0 either, where it says none."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if 0 <= value <= MANY else math.nan
