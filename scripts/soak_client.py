"""HTTP of `soak.py`, and what it raises when an answer is not as it must be."""

import collections
import http.client
import json
import re
import urllib.parse
from contextlib import closing


class Bad(Exception):
    """An answer that is not as it must be."""


def check(condition, what):
    if not condition:
        raise Bad(what)


class Client:
    """HTTP to one server."""

    def __init__(self, url, key, timeout):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise SystemExit(f"--url must be like http://127.0.0.1:8000, got {url}")
        self.address = (parts.hostname, parts.port or 80)
        self.headers = {"Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        self.timeout = timeout

    def open(self, method, path, body=None, request_id=None):
        """Sends a request; the caller closes the connection."""
        connection = http.client.HTTPConnection(*self.address, timeout=self.timeout)
        headers = {**self.headers, **({"X-Request-Id": request_id} if request_id else {})}
        try:
            connection.request(method, path, body, headers)
            return connection, connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def ask(self, method, path, body=None, request_id=None):
        """Status and text of an answer."""
        connection, answer = self.open(method, path, body, request_id)
        with closing(connection):
            return answer.status, answer.read().decode("utf-8")

    def ok(self, method, path, body=None):
        status, text = self.ask(method, path, None if body is None else json.dumps(body))
        check(status == 200, f"{method} {path}: {status} {text[:300]}")
        return text

    def metrics(self):
        """Sums of samples by name, over their labels."""
        sums = collections.Counter()
        for line in self.ok("GET", "/metrics").splitlines():
            if line and not line.startswith("#"):
                name, value = re.match(r"([^\s{]+)(?:\{.*\})? (\S+)", line).groups()
                sums[name] += float(value)
        return sums
