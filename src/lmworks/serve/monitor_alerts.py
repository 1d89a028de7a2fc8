"""Alerts to an address nearby: JSON by POST, to this machine or a private network and nowhere else.

The name is resolved once, when the server starts, and every address that it stands for must be in ALLOWED; alerts then
go to that address whatever the name says later, and no redirect is followed.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import socket
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lmworks.base.errors import InputError

ALLOWED = tuple(
    map(ipaddress.ip_network, ("127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"))
)
SECONDS = 5.0


@dataclass(frozen=True)
class Target:
    """Where alerts go: an address that was looked at, and the name to call it by."""

    address: str
    port: int
    host: str
    path: str
    secure: bool


def read_target(url: str) -> Target:
    """Return where a URL leads; raise InputError for anything but http(s) to a loopback or private address."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InputError("this is no URL", found=url) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise InputError(
            "alerts go to a plain http or https address", found=url, expected="http://127.0.0.1:9000/alerts"
        )
    try:
        found = socket.getaddrinfo(
            parts.hostname, port or (443 if parts.scheme == "https" else 80), type=socket.SOCK_STREAM
        )
    except (OSError, UnicodeError):
        raise InputError("there is no such address for alerts", found=url) from None
    addresses = [str(one[4][0]) for one in found]
    for address in addresses:
        place = ipaddress.ip_address(address.partition("%")[0])
        if not any(place in network for network in ALLOWED):
            raise InputError("alerts stay on this machine or in a private network",
                             found=f"{parts.hostname} is {address}",
                             expected=", ".join(map(str, ALLOWED)), fix="send them to a relay here")  # fmt: skip
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(addresses[0], int(found[0][4][1]), parts.netloc, path, parts.scheme == "https")


def send(target: Target, value: dict[str, Any]) -> str:
    """POST a value; return what went wrong, or nothing."""
    line: http.client.HTTPConnection = http.client.HTTPConnection(target.address, target.port, timeout=SECONDS)
    try:
        if target.secure:
            plain = socket.create_connection((target.address, target.port), SECONDS)
            host = urlsplit(f"//{target.host}").hostname
            line.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
        headers = {"Host": target.host, "Content-Type": "application/json"}
        line.request("POST", target.path, json.dumps(value), headers)
        status = line.getresponse().status
        return "" if 200 <= status < 300 else f"the receiver answered {status}"
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        line.close()
