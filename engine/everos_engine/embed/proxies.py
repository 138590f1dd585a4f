"""Find the proxy and the certificates that the environment names for one address. Other variables are not read."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from everos_engine.errors import Exhausted, SettingsError, exhausted

SOCKS = {"socks": "socks5", "socks5": "socks5", "socks5h": "socks5h"}
"""Desktops write ``socks://`` for version 5."""
EXAMPLE = "write it like http://host:port or socks5://host:port, or unset it"


@dataclass(frozen=True, slots=True)
class Proxy:
    """The address of a proxy with its scheme, and the variable that names it."""

    url: str
    variable: str


def proxy_for(scheme: str, host: str, port: int | None, environment: Mapping[str, str]) -> Proxy | None:
    """Return the proxy for an address, or None if it is asked without one.

    Lower-case variables come before upper-case ones, as in curl. Raises SettingsError with the variable's name if it
    cannot be used.
    """
    if _is_excepted(host, port, _value("no_proxy", environment)[1]):
        return None
    for name in (f"{scheme}_proxy", "all_proxy"):
        variable, value = _value(name, environment)
        if value:
            return Proxy(_usable(variable, value), variable)
    return None


def certificates(environment: Mapping[str, str], *, needed: bool) -> ssl.SSLContext | None:
    """Return the certificates to check with, or None for those of the HTTP library.

    If none are ``needed`` the context trusts no server, which costs nothing to make. Raises SettingsError with the
    variable's name if ``SSL_CERT_FILE`` or ``SSL_CERT_DIR`` cannot be used.
    """
    if not needed:
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    file, directory = environment.get("SSL_CERT_FILE"), environment.get("SSL_CERT_DIR")
    variable = f"SSL_CERT_FILE={file}" if file else f"SSL_CERT_DIR={directory}"
    try:
        if file:
            return ssl.create_default_context(cafile=file)
        if directory:
            os.listdir(directory)  # else a directory that is not there is found out with the first call only
            return ssl.create_default_context(capath=directory)
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        if exhausted(error):
            raise Exhausted(f"no file descriptor is left to read certificates with: {error}") from error
        raise SettingsError(
            f"{variable} cannot be used ({_reason(error)}): name certificates in PEM form, or unset it"
        ) from error
    return None


def _value(name: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """Return the variable that counts, and its value. In a CGI script HTTP_PROXY is what a client sent."""
    if name in environment:
        return name, environment[name].strip()
    upper = name.upper()
    if upper == "HTTP_PROXY" and "REQUEST_METHOD" in environment:
        return upper, ""
    return upper, environment.get(upper, "").strip()


def _usable(variable: str, value: str) -> str:
    """Return a proxy's URL that can be used. Raises SettingsError."""
    try:
        parsed = urlsplit(value if "://" in value else f"http://{value}")
        scheme, port = SOCKS.get(parsed.scheme, parsed.scheme), parsed.port
    except ValueError as error:
        raise SettingsError(
            f"{variable} is not a proxy's address ({type(error).__name__}): {EXAMPLE}"
        ) from None  # the error may quote a password
    shown = _shown(parsed)
    if scheme not in {"http", "https", *SOCKS.values()} or not parsed.hostname or not value.isprintable():
        raise SettingsError(f"{variable}={shown} is not a proxy that can be used: {EXAMPLE}")
    if scheme in SOCKS.values() and importlib.util.find_spec("socksio") is None:
        raise SettingsError(
            f"{variable}={shown} is a SOCKS proxy: install everos-engine[socks], unset the variable, or name the "
            "service's host in NO_PROXY"
        )
    if port is None and scheme in SOCKS.values():
        parsed = parsed._replace(netloc=f"{parsed.netloc}:1080")
    return parsed._replace(scheme=scheme, path="", query="", fragment="").geturl()


def _shown(parsed: SplitResult) -> str:
    """Return the address without user and password."""
    address = f"{parsed.scheme}://{parsed.netloc.rpartition('@')[2]}"[:80]
    return address if address.isprintable() else repr(address)


def _is_excepted(host: str, port: int | None, exceptions: str) -> bool:
    """Return whether ``NO_PROXY`` names the host: by name or suffix, address, network, or ``*``.

    An entry may end with a port.
    """
    name = host.lower().rstrip(".").strip("[]")
    return any(_matches(entry.strip().lower(), name, port) for entry in exceptions.split(",") if entry.strip())


def _matches(entry: str, name: str, port: int | None) -> bool:
    if entry == "*":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        address = None
    try:
        network = ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        pass
    else:
        return address is not None and address in network
    host, colon, of_port = entry.rpartition(":")
    if colon and of_port.isdigit():
        if port != int(of_port):
            return False
        entry = host.strip("[]")
    suffix = entry.removeprefix("*").lstrip(".")
    return bool(suffix) and (name == suffix or name.endswith(f".{suffix}"))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:120] or type(error).__name__
