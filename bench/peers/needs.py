"""Prints what a wheel needs on this machine, a requirement a line, without the packages named.

    python needs.py FILE.whl torch torchvision
"""

import sys
import zipfile
from email.parser import HeaderParser

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name


def main() -> None:
    path, *without = sys.argv[1:]
    with zipfile.ZipFile(path) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(wheel.read(name).decode())
    left_out = {canonicalize_name(name) for name in without}
    for line in metadata.get_all("Requires-Dist") or []:
        need = Requirement(line)
        if canonicalize_name(need.name) in left_out:
            continue
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            need.marker = None
            print(need)


if __name__ == "__main__":
    main()
