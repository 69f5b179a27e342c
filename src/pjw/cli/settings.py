"""The server and the certificates of a command: its options, before all that `pjw.client.config` reads."""

import argparse

from pjw.client import config, expiry
from pjw.client.settings import ClientSettings


def find_settings(arguments: argparse.Namespace) -> ClientSettings:
    """Gather the settings. Raises ConfigError that says which is missing and how to give it."""
    # pjw warns in its own way (cli/expiry.py)
    expiry.log.disabled = True
    options = {key: getattr(arguments, key) for key in config.KEYS}
    return config.find_settings(getattr(arguments, "context", None), options)


def options_of(arguments: argparse.Namespace) -> list[str]:
    """Return the same options again, for another pjw that is to find the same settings."""
    given = {key: getattr(arguments, key, None) for key in ("context", *config.KEYS)}
    return [f"--{key.replace('_', '-')}={value}" for key, value in given.items() if value is not None]
