"""Generates the stubs of protos/ into a folder: ``make generate``.

Run it with a Python that has mypy-protobuf. protoc is that of grpcio-tools in the Python given with --protoc: the
oldest supported version, because generated code runs on its generator's grpcio and protobuf or newer.

The stubs don't import buf/validate/validate.proto. protobuf has one descriptor pool for the whole process, and a second
version of that file, of its messages or of its extension numbers can't be added to it: whichever package comes second
fails to import. The rules stay in the descriptors, as options that protobuf doesn't know and protovalidate reads.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2

PROTOS = Path(__file__).resolve().parent
VENDORED = PROTOS.parent / "third_party"
VALIDATE = "buf/validate/validate.proto"


def generate(out: Path, protoc: str) -> None:
    """Write stubs, their types, and what makes ``weft`` a regular, typed package into ``out``."""
    names = sorted(path.relative_to(PROTOS).as_posix() for path in PROTOS.rglob("*.proto"))
    run = (protoc, "-m", "grpc_tools.protoc")
    with tempfile.TemporaryDirectory() as folder:
        described = Path(folder) / "described"
        source = (f"-I{PROTOS}", f"-I{VENDORED}", "--include_imports", "--include_source_info")
        subprocess.run([*run, *source, f"--descriptor_set_out={described}", *names], check=True)
        described.write_bytes(_without_validate(described.read_bytes()))
        plugins = [f"--plugin={path}" for path in Path(sys.executable).parent.glob("protoc-gen-mypy*")]
        outputs = (f"--python_out={out}", f"--grpc_python_out={out}", f"--mypy_out=quiet:{out}")
        subprocess.run(
            [*run, f"--descriptor_set_in={described}", *plugins, *outputs, f"--mypy_grpc_out=quiet:{out}", *names],
            check=True,
        )
    for package in filter(Path.is_dir, out.glob("weft/**")):
        name = package.relative_to(out).as_posix()
        (package / "__init__.py").write_text(f'"""Generated from protos/{name}."""\n')
    # A type checker reads the stubs of an installed wheel (PEP 561).
    (out / "weft" / "py.typed").touch()
    for written in PROTOS.rglob("__init__.py"):
        shutil.copy(written, out / written.relative_to(PROTOS))


def _without_validate(described: bytes) -> bytes:
    files = descriptor_pb2.FileDescriptorSet.FromString(described)
    kept = [file for file in files.file if file.name != VALIDATE]
    for file in kept:
        if VALIDATE in file.dependency:
            file.dependency.remove(VALIDATE)
    return descriptor_pb2.FileDescriptorSet(file=kept).SerializeToString()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Generates the stubs of protos/ into a folder.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--protoc", required=True, help="a Python with grpcio-tools")
    arguments = parser.parse_args()
    generate(arguments.out, arguments.protoc)
