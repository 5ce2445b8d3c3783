"""A model whose weights are not fetched yet: enough is known to plan the memory that it will take."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Outline:
    """A model in diffusers layout, without its weights; its parts have the names of its folders: "transformer", …."""

    configs: Mapping[str, Mapping[str, object]]  # the config.json of each part
    weights: Mapping[str, int]  # bytes of the files with weights of each part
