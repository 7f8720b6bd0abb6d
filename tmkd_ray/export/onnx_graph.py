"""ONNX: the network as a graph that ONNX Runtime and others run; the record is the model's metadata_props."""

import warnings

import torch
from torch import Tensor

from tmkd_ray.export.base import (
    EXPORTERS,
    ExportedModel,
    Exporter,
    Student,
    require_packages,
    unreadable,
)
from tmkd_ray.export.record import ExportRecord

INPUT_NAME = "images"


@EXPORTERS.register("onnx")
class Onnx(Exporter):
    """Input `images`, float32 [batch, 3, H, W], normalised; output `logits` (an encoder's: `feature`)."""

    description = "a graph for ONNX Runtime and others, with a dynamic batch and metadata"
    suffix = ".onnx"
    tolerance = 1e-4  # another library's convolutions, which sum in another order

    def check(self, record: ExportRecord) -> None:
        require_packages("--format onnx", "onnx", "onnxscript", "onnxruntime")

    @torch.no_grad()
    def write(self, student: Student, path: str) -> None:
        require_packages("--format onnx", "onnx", "onnxscript")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own calls into onnxscript
            program = torch.onnx.export(
                student.network(),
                (student.example(),),
                input_names=[INPUT_NAME],
                output_names=[student.record.output_name],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        program.model.metadata_props.update(student.record.to_metadata())
        program.save(path)

    def read(self, path: str) -> ExportedModel:
        require_packages("running an ONNX model", "onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        # As many threads as PyTorch takes, so that both are measured alike.
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base
            raise unreadable(path, "ONNX", error) from error
        record = ExportRecord.from_metadata(session.get_modelmeta().custom_metadata_map, path)

        def run(images_BCHW: Tensor) -> Tensor:
            (output,) = session.run(None, {INPUT_NAME: images_BCHW.numpy()})
            return torch.from_numpy(output)

        return ExportedModel(record, run, engine="ONNX Runtime")
