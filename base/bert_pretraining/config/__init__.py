"""The configuration of a run: files and flags are resolved into one frozen `Config`."""

from bert_pretraining.config.fields import GROUPS
from bert_pretraining.config.flags import FlagParser, add_config_flags, nearest, parse_bool
from bert_pretraining.config.resolution import (
    Resolved,
    config_names,
    configs_directory,
    parse_topology,
    resolve,
    show,
    without_switches,
)
from bert_pretraining.config.settings import FIELDS, Config, base_type
from bert_pretraining.config.toml import parse_toml

__all__ = [
    "FIELDS",
    "GROUPS",
    "Config",
    "FlagParser",
    "Resolved",
    "add_config_flags",
    "base_type",
    "config_names",
    "configs_directory",
    "nearest",
    "parse_bool",
    "parse_toml",
    "parse_topology",
    "resolve",
    "show",
    "without_switches",
]
