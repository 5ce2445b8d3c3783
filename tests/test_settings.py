import re
from pathlib import Path

import pytest

from settings import GIB, MINIATURE, OFFICIAL, ROOT, VERSION, Settings


def test_the_newest_version_of_the_changelog_is_this_one() -> None:
    newest, *_ = re.findall(r"^## \[?(\d\S*?)\]? - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest == VERSION


def test_the_device_chooses_the_models() -> None:
    assert Settings.from_environment(cuda=True, environ={}).models == OFFICIAL
    assert Settings.from_environment(cuda=False, environ={}).models == MINIATURE


def test_a_variable_wins_over_the_device_and_an_empty_one_does_not() -> None:
    models = Settings.from_environment(cuda=False, environ={"FLUX_DEV": "me/mine", "FLUX_SCHNELL": " "}).models
    assert (models.dev, models.schnell) == ("me/mine", MINIATURE.schnell)


def test_the_miniature_comes_with_a_library_and_another_one_wins() -> None:
    def library(cuda: bool, **environ: str) -> Path | None:
        return Settings.from_environment(cuda=cuda, environ=environ).loras_dir

    mini = ROOT / "mini" / "loras"
    assert (
        library(cuda=False) == library(cuda=False, LORAS_DIR=" ") == library(cuda=True, FLUX_DEV=MINIATURE.dev) == mini
    )
    assert library(cuda=True) is library(cuda=False, FLUX_DEV="me/mine") is None
    assert (
        library(cuda=False, LORAS_DIR="/srv/loras") == library(cuda=True, LORAS_DIR="/srv/loras") == Path("/srv/loras")
    )


@pytest.mark.parametrize("value", ["0", "-1", "many", "nan", "inf"])
def test_a_size_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=f"LORA_MAX_GB is '{re.escape(value)}'"):
        Settings.from_environment(cuda=False, environ={"LORA_MAX_GB": value})


def test_sizes_and_switches() -> None:
    settings = Settings.from_environment(cuda=False, environ={"WEIGHTS_CACHE_GB": "0.5", "FLUX_COMPILE": "0"})
    assert (settings.cache_bytes, settings.compile, settings.allow_private_hosts) == (GIB // 2, False, False)
    with pytest.raises(ValueError, match="FLUX_COMPILE is 'yes'; it must be 0 or 1"):
        Settings.from_environment(cuda=False, environ={"FLUX_COMPILE": "yes"})


@pytest.mark.parametrize(
    ("cuda", "value", "seconds"),
    [(True, None, 600), (True, "", 600), (True, "0", None), (False, None, None), (False, "2.5", 2.5)],
)
def test_a_prediction_has_a_limit_with_cuda_or_where_it_is_given(
    cuda: bool, value: str | None, seconds: float | None
) -> None:
    environ = {} if value is None else {"PREDICTION_SECONDS": value}
    assert Settings.from_environment(cuda=cuda, environ=environ).prediction_seconds == seconds


@pytest.mark.parametrize("value", ["-1", "long", "nan", "inf", "1e10"])
def test_a_limit_that_is_no_number_of_seconds_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=f"PREDICTION_SECONDS is '{value}'; it must be a number of seconds"):
        Settings.from_environment(cuda=False, environ={"PREDICTION_SECONDS": value})


def test_tokens_are_not_shown() -> None:
    environ = {"HF_TOKEN": "hf_secret", "CIVITAI_API_TOKEN": "civ_secret", "REPLICATE_API_TOKEN": "r8_secret"}
    environ |= {"HF_ENDPOINT": "https://user:a/secret@mirror/hf", "CIVITAI_ENDPOINT": "https://secret@mirror"}
    shown = str(Settings.from_environment(cuda=False, environ=environ))
    assert "secret" not in shown
    assert "HF_TOKEN=set, HF_ENDPOINT=https://mirror/hf, " in shown


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://mirror/hf?token=secret", "https://mirror/hf"),
        ("https://mirror/hf;secret#secret", "https://mirror/hf"),
        ("https://user:it's secret@mirror", "https://mirror"),
        ("https://user:a?secret@mirror/hf", "https://"),
        ("https://mirror/hf?a@secret", "https://"),
    ],
)
def test_a_mirror_is_shown_without_login_and_query(url: str, shown: str) -> None:
    text = str(Settings.from_environment(cuda=False, environ={"HF_ENDPOINT": url}))
    assert text.endswith(f", HF_ENDPOINT={shown}")
    assert "secret" not in text


@pytest.mark.parametrize("name", ["HF_ENDPOINT", "CIVITAI_ENDPOINT", "REPLICATE_ENDPOINT"])
@pytest.mark.parametrize("url", ["me:secret@mirror", "//me:secret@mirror", "https:/me:secret@mirror", "ftp://secret"])
def test_a_mirror_that_is_no_address_is_refused_and_not_shown(name: str, url: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^{name} is no address of a host; it must begin with https:// or http://\.$"
    ):
        Settings.from_environment(cuda=False, environ={name: url})


@pytest.mark.parametrize("place", ["/srv/secret/mine", "~/secret/mine", "../../secret/mine", "file:///secret/mine"])
def test_of_a_folder_elsewhere_its_name_is_shown(place: str) -> None:
    text = str(Settings.from_environment(cuda=False, environ={"FLUX_DEV": place, "LORAS_DIR": place}))
    assert text.startswith("Settings: FLUX_DEV=…/mine, ")
    assert "LORAS_DIR=…/mine, " in text
    assert "secret" not in text


def test_proxies_are_read_in_either_case_and_not_shown() -> None:
    environ = {
        "HTTPS_PROXY": "user:secret@proxy:3128",
        "http_proxy": "http://a",
        "HTTP_PROXY": "b",
        "NO_PROXY": ".inside",
    }
    settings = Settings.from_environment(cuda=False, environ=environ)
    assert settings.proxies == {"https": "http://user:secret@proxy:3128", "http": "http://a", "no": ".inside"}
    assert str(settings).endswith(", HTTPS_PROXY=set, HTTP_PROXY=set")
    assert "secret" not in str(settings)


def test_an_empty_proxy_in_lower_case_switches_off_the_other_one() -> None:
    environ = {"HTTP_PROXY": "a", "http_proxy": " ", "HTTPS_PROXY": "b", "NO_PROXY": "c", "no_proxy": ""}
    assert Settings.from_environment(cuda=False, environ=environ).proxies == {"https": "http://b"}


def test_a_proxy_that_nothing_would_go_through_is_not_looked_at() -> None:
    environ = {"ALL_PROXY": "socks5://c", "HTTP_PROXY": "a", "HTTPS_PROXY": "b"}
    assert Settings.from_environment(cuda=False, environ=environ).proxies == {"http": "http://a", "https": "http://b"}


@pytest.mark.parametrize("value", ["socks5://secret", "http://", "http://[secret", "http://secret:port"])
def test_a_proxy_that_cannot_be_used_is_refused(value: str) -> None:
    sentence = r"^ALL_PROXY is no proxy that can be used; it must be http://\[user:password@\]host:port\.$"
    with pytest.raises(ValueError, match=sentence):
        Settings.from_environment(cuda=False, environ={"ALL_PROXY": value})


@pytest.mark.parametrize(
    ("cuda", "environ", "shown"),
    [
        (
            False,
            {},
            "FLUX_DEV=mini/dev, FLUX_SCHNELL=mini/schnell, LORAS_DIR=mini/loras, WEIGHTS_CACHE_GB=50, LORA_MAX_GB=5, "
            "PREDICTION_SECONDS=0",
        ),
        (
            True,
            {},
            "FLUX_DEV=black-forest-labs/FLUX.1-dev, FLUX_SCHNELL=black-forest-labs/FLUX.1-schnell, "
            "WEIGHTS_CACHE_GB=50, LORA_MAX_GB=5, PREDICTION_SECONDS=600",
        ),
        (
            True,
            {
                "FLUX_DEV": "/srv/s3cret/flux",
                "SAFETY_CHECKER": "~/checker",
                "NSFW_CLASSIFIER": MINIATURE.nsfw_classifier,
                "LORAS_DIR": "/srv/s3cret/loras\nof mine",
                "WEIGHTS_CACHE": "/mnt/s3cret/cache",
                "WEIGHTS_CACHE_GB": "0.1",
                "FLUX_COMPILE": "0",
                "WEIGHTS_ALLOW_PRIVATE_HOSTS": "1",
            },
            "FLUX_DEV=…/flux, FLUX_SCHNELL=black-forest-labs/FLUX.1-schnell, SAFETY_CHECKER=…/checker, "
            "NSFW_CLASSIFIER=mini/nsfw_classifier, LORAS_DIR=…/loras?of mine, WEIGHTS_CACHE=…/cache, "
            "WEIGHTS_CACHE_GB=0.1, LORA_MAX_GB=5, PREDICTION_SECONDS=600, FLUX_COMPILE=0, "
            "WEIGHTS_ALLOW_PRIVATE_HOSTS=1",
        ),
    ],
)
def test_a_line_says_what_was_set_and_not_where_folders_lie(cuda: bool, environ: dict[str, str], shown: str) -> None:
    assert str(Settings.from_environment(cuda=cuda, environ=environ)) == f"Settings: {shown}"
    assert environ or len(shown) <= 150
