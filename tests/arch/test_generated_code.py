"""spire_hw/_pb is what proto/ says, as far as that can be told without the generator."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTO = ROOT / "proto" / "spire_hw" / "_pb"
OUT = ROOT / "spire_hw" / "_pb"
FILES = sorted(path.stem for path in PROTO.glob("*.proto"))


def test_every_proto_file_has_its_module_and_every_module_its_proto_file() -> None:
    assert sorted(p.stem.removesuffix("_pb2") for p in OUT.glob("*_pb2.py")) == FILES
    assert sorted(p.stem.removesuffix("_pb2") for p in OUT.glob("*_pb2.pyi")) == FILES


@pytest.mark.parametrize("name", FILES)
def test_messages_services_and_fields_are_those_of_the_proto_file(name: str) -> None:
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", (PROTO / f"{name}.proto").read_text(), flags=re.DOTALL)
    described = importlib.import_module(f"spire_hw._pb.{name}_pb2").DESCRIPTOR
    (package,) = re.findall(r"^package ([\w.]+);", text, re.MULTILINE) or [""]
    assert described.package == package
    written = set(re.findall(r"^message (\w+)", text, re.MULTILINE))
    assert set(described.message_types_by_name) == written
    assert set(described.services_by_name) == set(re.findall(r"^service (\w+)", text, re.MULTILINE))
    for service in described.services_by_name.values():
        for method in service.methods:
            assert re.search(rf"rpc {method.name}\s*\(", text)
    for message in described.message_types_by_name.values():
        for field in message.fields:
            assert re.search(rf"\b{field.name}\s*=\s*{field.number}\b", text), field.full_name
