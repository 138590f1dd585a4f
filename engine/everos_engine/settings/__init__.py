"""Frozen settings, and the names of the engine's files."""

from everos_engine.settings.listing import ENVIRONMENT_PREFIX, choices, describe, setters, table
from everos_engine.settings.load import REFUSED, load, parse_size, restricted, root_file
from everos_engine.settings.masking import MASK, MIN_SECRET_CHARACTERS, masked_url, secrets_of
from everos_engine.settings.model import (
    DescriptorMode,
    EmbedderSettings,
    LanceDBSettings,
    MemorySettings,
    NoteSettings,
    Settings,
    WatchSettings,
    setting,
)
from everos_engine.settings.paths import ROOT_SETTINGS_FILE

__all__ = [
    "ENVIRONMENT_PREFIX",
    "MASK",
    "MIN_SECRET_CHARACTERS",
    "REFUSED",
    "ROOT_SETTINGS_FILE",
    "DescriptorMode",
    "EmbedderSettings",
    "LanceDBSettings",
    "MemorySettings",
    "NoteSettings",
    "Settings",
    "WatchSettings",
    "choices",
    "describe",
    "load",
    "masked_url",
    "parse_size",
    "restricted",
    "root_file",
    "secrets_of",
    "setters",
    "setting",
    "table",
]
