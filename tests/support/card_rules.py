"""What is wrong with the metadata of a card: the rules of the Hub's ``/api/validate-yaml``, as far as they are known.

The Hub does not publish its own. Here are those that its documentation and its error messages, quoted in many issues,
tell (languages, ids of models and data sets, which values are lists), and what the clients themselves refuse to read
(model-index, configurations, features). Beyond them the Hub checks licences, names of tasks and metrics, widgets and
sizes of images; it words some messages otherwise; it reads YAML 1.2, where ``language: no`` is Norwegian and not False.
That it refuses results that are no finite numbers is a guess: JSON, which its API speaks, has none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils._validators import validate_repo_id

LISTS = {"license": True, "language": True, "base_model": True, "datasets": True, "metrics": True, "tags": False}
"""Lists of strings, and whether a single string may stand for one."""
STRINGS = ("library_name", "pipeline_tag", "pretty_name", "license_name", "license_link")


def metadata(readme: str) -> Any:
    """The metadata at the top of a README.md, None where there is none."""
    block = REGEX_YAML_BLOCK.search(readme)
    return yaml.safe_load(block.group(2)) if block else None


def check_card(readme: str, kind: str) -> Iterator[str]:
    """One message for each thing that is wrong; ``kind`` is ``"model"`` or ``"dataset"``."""
    try:
        data = metadata(readme) or {}
    except yaml.YAMLError as error:
        yield f"Invalid YAML in README.md: {error}"
        return
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        yield "the metadata must be a mapping from names to values"
        return
    for name in data:
        if name in LISTS:
            yield from _check_list(name, data[name])
        if name in STRINGS and not isinstance(data[name], str):
            yield f'"{name}" must be a string'
    try:
        if kind == "model":
            for result in ModelCardData(**data).eval_results or []:
                if isinstance(result.metric_value, float) and not math.isfinite(result.metric_value):
                    yield f'"model-index": the value of {result.metric_type} must be a number'
        else:
            MetadataConfigs.from_dataset_card_data(DatasetCardData(**data))
            DatasetInfosDict.from_dataset_card_data(DatasetCardData(**data))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        yield f"the metadata cannot be read: {error!r}"


def _check_list(name: str, value: object) -> Iterator[str]:
    if isinstance(value, str) and LISTS[name]:
        items = {f'"{name}"': value}
    elif isinstance(value, list):
        items = {f'"{name}[{n}]"': item for n, item in enumerate(value)}
    else:
        yield f'"{name}" must be an array'
        return
    for where, item in items.items():
        if not isinstance(item, str):
            yield f"{where} must be a string"
        elif name == "language" and not re.fullmatch("[a-z]{2,3}|code|multilingual", item):
            yield (
                f'{where} with value "{item}" is not valid. It must be an ISO 639-1, 639-2 or 639-3 code (two/three'
                ' letters), or a special value like "code", "multilingual".'
            )
        elif name in ("base_model", "datasets") and not _is_id(item):
            page = "models" if name == "base_model" else "datasets"
            yield f'{where} with value "{item}" is not valid. Use an id from https://hf.co/{page}.'


def _is_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
