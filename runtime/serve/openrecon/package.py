"""The files that a Siemens OpenRecon package is built from.

The image itself needs Docker and is built by the script among them. Nothing here has been
installed on a scanner.
"""

import importlib.metadata
import json
from pathlib import Path

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.console.atomic import write_together
from qsm_deploy.runtime.methods.method import Method
from qsm_deploy.runtime.reconstructor import Maker, models_of
from qsm_deploy.runtime.serve.limits import PORT
from qsm_deploy.runtime.serve.openrecon.label import (
    LABEL_NAME,
    NAME,
    VENDOR,
    encoded_label,
    openrecon_label,
)
from qsm_deploy.runtime.serve.turns import open_taking_turns

JSON, LABEL = "OpenReconLabel.json", "label.base64"

DOCKERFILE = """\
# syntax=docker/dockerfile:1
FROM --platform=linux/amd64 python:3.11-slim
LABEL "{label_name}"="{label}"
COPY wheels /opt/wheels
RUN pip install --no-cache-dir "$(echo /opt/wheels/qsm_deploy-*.whl)[serve,openvino]" \\
    && rm -r /opt/wheels
COPY {content} /opt/
ENV HOME=/tmp
EXPOSE {port}
CMD ["/bin/sh", "/opt/start.sh"]
"""

START = """\
#!/bin/sh
mkdir -p /tmp/share
exec qsm-serve {maker} --host 0.0.0.0 --port {port} >> /tmp/share/qsm-serve.log 2>&1
"""

SCRIPT = """\
#!/bin/sh
# Build the image and zip it with its manual:
#     sh package.sh SOURCE MANUAL.pdf
# SOURCE is the folder or a wheel of qsm-deploy, of version {version}.
# The host's Docker must be able to load the image: save it with Docker Engine 24 or older.
set -eu
[ $# -eq 2 ] || {{ echo "usage: sh package.sh SOURCE MANUAL.pdf" >&2; exit 2; }}
source=$(realpath "$1")
manual=$(realpath "$2")
[ "$(head -c 5 "$manual")" = "%PDF-" ] || {{ echo "$2 is no PDF" >&2; exit 3; }}
cd "$(dirname "$0")"
python3 -m pip wheel --no-deps --wheel-dir wheels "$source"
docker build --platform linux/amd64 --tag {image} .
docker save --output {base}.tar {image}
cp "$manual" {base}.pdf
python3 -m zipfile -c {base}.zip {base}.tar {base}.pdf
echo {base}.zip
"""

README = """\
# OpenRecon package {base}

- `Dockerfile`, with the label `{label_name}`
- `{json}`: what the label says, in JSON; `{label}`: the same in base64
- `start.sh`: what the image runs, {name}
- `package.sh SOURCE MANUAL.pdf`: builds the image `{image}`, saves it,
  and zips it with the manual to `{base}.zip` (Deflate)

**The manual is yours to write.** OpenRecon takes a package only with a valid PDF named as the
archive of the image, `{base}.pdf`: intended
use, who made it, how to use it.

The regulatory fields of the JSON are empty where only the one who distributes the package can
know them. After changing it, encode it again: `base64 -w 0 {json}`, into
`{label}` and the label of the Dockerfile.

The image computes on the CPU, needs no network when it runs, listens on 0.0.0.0:{port} and logs to
`/tmp/share/qsm-serve.log`.
"""


def write_package(folder: Path, maker: Maker, *, force: bool) -> str:
    """Write the files and return their paths, a line each.

    Parameters
    ----------
    folder
        Created if need be; its parent must exist.
    maker
        The network of the package, which is copied, or the method.
    force
        Whether existing files are replaced.

    Raises
    ------
    UsageError
        If a file exists and is not to be replaced, or the network is not one for the server.
    DataError
        If the folder cannot be created.
    """
    opened = open_taking_turns(maker)  # or the package would fail at the scanner
    if isinstance(maker, Method):
        models, said = {}, f"--method {maker.name}"
    else:
        path = models_of(maker)[0]
        model = f"model{path.suffix}"
        models, said = {model: path.read_bytes()}, f"/opt/{model}"
    version = importlib.metadata.version("qsm-deploy")
    label = openrecon_label(version, opened.needs.network)
    encoded = encoded_label(label)
    base = f"OpenRecon_{VENDOR}_{NAME}_V{version}"
    words = {
        "base": base,
        "content": " ".join([*models, "start.sh"]),
        "image": f"openrecon_{VENDOR}_{NAME}:v{version}",
        "json": JSON,
        "label": encoded,
        "label_name": LABEL_NAME,
        "maker": said,
        "name": opened.name,
        "port": PORT,
        "version": version,
    }
    files = {
        "Dockerfile": DOCKERFILE.format(**words).encode(),
        JSON: (json.dumps(label, indent=2) + "\n").encode(),
        LABEL: encoded.encode(),
        "start.sh": START.format(**words).encode(),
        "package.sh": SCRIPT.format(**words).encode(),
        "README.md": README.format(**words | {"label": LABEL}).encode(),
    } | models
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create {folder}: {error.strerror}") from error
    write_together({folder / name: content for name, content in files.items()}, force=force)
    return "\n".join(str(folder / name) for name in files)
