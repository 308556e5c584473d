"""ORCA's messages (gRFC A51): the load report of a server, and the request for it.

They are in a descriptor pool of their own, because another package in the process may register the same files.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, duration_pb2, message_factory

SERVICE = "xds.service.orca.v3.OpenRcaService"

_Field = descriptor_pb2.FieldDescriptorProto


def _messages() -> tuple[Any, Any]:
    """The classes of the report and of the request, with the fields that are used here and ORCA's field numbers."""
    report = descriptor_pb2.FileDescriptorProto(
        name="xds/data/orca/v3/orca_load_report.proto", package="xds.data.orca.v3", syntax="proto3"
    )
    message = report.message_type.add(name="OrcaLoadReport")
    for name, number in (("cpu_utilization", 1), ("rps_fractional", 6), ("eps", 7), ("application_utilization", 9)):
        message.field.add(name=name, number=number, type=_Field.TYPE_DOUBLE, label=_Field.LABEL_OPTIONAL)
    service = descriptor_pb2.FileDescriptorProto(
        name="xds/service/orca/v3/orca.proto",
        package="xds.service.orca.v3",
        syntax="proto3",
        dependency=["google/protobuf/duration.proto"],
    )
    request = service.message_type.add(name="OrcaLoadReportRequest")
    interval = request.field.add(name="report_interval", number=1, label=_Field.LABEL_OPTIONAL)
    interval.type, interval.type_name = _Field.TYPE_MESSAGE, ".google.protobuf.Duration"
    pool = descriptor_pool.DescriptorPool()
    for file in (duration_pb2.DESCRIPTOR.serialized_pb, report.SerializeToString(), service.SerializeToString()):
        pool.AddSerializedFile(file)
    return (
        message_factory.GetMessageClass(pool.FindMessageTypeByName("xds.data.orca.v3.OrcaLoadReport")),
        message_factory.GetMessageClass(pool.FindMessageTypeByName("xds.service.orca.v3.OrcaLoadReportRequest")),
    )


OrcaLoadReport, OrcaLoadReportRequest = _messages()
