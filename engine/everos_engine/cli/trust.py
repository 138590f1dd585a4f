"""``everos-engine trust``: trust a memory root's own settings file, show the trust, or take it back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from everos_engine import trust
from everos_engine.diagnose.wording import shown
from everos_engine.settings import ROOT_SETTINGS_FILE, load, root_file


def give(flags: Mapping[str, object]) -> int:
    """Trust the file as it is now, and print what that allows."""
    root, content, asked = root_file(flags)
    file = shown(str(root / ROOT_SETTINGS_FILE))
    if not asked:
        print(f"{file}: there is nothing in it that needs trust")
        return 0
    trust.remember(root, content, os.environ)
    _print_values(asked)
    print(f"{file}: trusted until it changes")
    load(flags)  # says now what a command would say
    return 0


def show(flags: Mapping[str, object]) -> int:
    """Print what needs trust and whether it has it. Returns 1 if it has not."""
    root, content, asked = root_file(flags)
    file = shown(str(root / ROOT_SETTINGS_FILE))
    if not asked:
        print(f"{file}: there is nothing in it that needs trust")
        return 0
    _print_values(asked)
    trusted = trust.is_trusted(root, content, os.environ)
    changed = "it has changed since it was trusted" if trust.trusted_digest(root, os.environ) else "not trusted"
    print(f"{file}: {'trusted' if trusted else changed}")
    return 0 if trusted else 1


def remove(flags: Mapping[str, object]) -> int:
    """Stop trusting the file of this root."""
    root, _, _ = root_file(flags)
    had = trust.forget(root, os.environ)
    print(f"{shown(str(root / ROOT_SETTINGS_FILE))}: {'not trusted any more' if had else 'it was not trusted'}")
    return 0


def _print_values(asked: Mapping[str, object]) -> None:
    for name, value in asked.items():
        print(f"{name} = {json.dumps(value if isinstance(value, (int, float, str)) else str(value))}")
