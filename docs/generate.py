"""Writes docs/service-config.md from the comments of service_config.proto: ``make docs``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "weft/mesh/v1/service_config.proto"
PAGE = ROOT / "docs" / "service-config.md"

HEAD = """\
<!-- Written by docs/generate.py from {source}. -->
# The service config, key by key

{intro}

```python
mesh.insecure_channel("mesh:///weft.user.v1.UserService", options=[("grpc.service_config", json.dumps({{
    "methodConfig": [{{
        "name": [{{"service": "weft.user.v1.UserService", "method": "GetUser"}}],
        "timeout": "2s",
        "hedgingPolicy": {{"maxAttempts": 2, "hedgingDelay": "0.05s", "delayPercentile": 95}},
    }}],
}}))])
```
"""


def page() -> str:
    """The page's text."""
    file = _described()
    comments = {tuple(at.path): at.leading_comments for at in file.source_code_info.location}
    lines = []
    for index, message in enumerate(file.message_type):
        about = " ".join(comments[4, index].split())
        if index == 0:
            lines.append(HEAD.format(source=f"protos/{SOURCE}", intro=about))
        else:
            lines.append(f"\n## {message.name}\n{about}\n")
        if message.field:
            lines.append("| key | what it is | default | change it | source |\n|---|---|---|---|---|")
        lines.extend(
            f"| `{field.json_name}` | {' | '.join(_cells(comments[4, index, 2, number]))} |"
            for number, field in enumerate(message.field)
        )
    return "\n".join(lines) + "\n"


def _cells(comment: str) -> Iterator[str]:
    about, _, facts = comment.partition("\n\n")
    yield " ".join(about.split())
    said = " ".join(facts.split())
    default, _, rest = said.removeprefix("Default: ").partition(" Source: ")
    source, _, change = rest.partition(" Change: ")
    if not (default and source and change):
        raise ValueError(f"a key's comment says its Default, Source and Change, in this order: {comment!r}")
    yield from (default, change, source)


def _described() -> descriptor_pb2.FileDescriptorProto:
    buf = Path(sys.executable).with_name("buf")
    built = subprocess.run([buf, "build", "protos", "-o", "-"], cwd=ROOT, capture_output=True, check=True)
    files = descriptor_pb2.FileDescriptorSet.FromString(built.stdout).file
    return next(file for file in files if file.name == SOURCE)


if __name__ == "__main__":
    PAGE.write_text(page())
