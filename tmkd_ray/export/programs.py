"""PyTorch's own program formats: they hold the network itself and need no code of ours.

Both hold programs. `torch.jit.load` and `torch.export.load` are not meant for files of unknown origin: open
only what you trust. PyTorch has deprecated TorchScript in favour of `torch.export`; it is here for programs
that still load it (C++, mobile).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tmkd_ray.export.base import EXPORTERS, RECORD_FILE, ExportedModel, Exporter, Student, unreadable
from tmkd_ray.export.record import ExportRecord, not_ours


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the deprecation of TorchScript, which this module's users have chosen knowingly."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit._trace.TracerWarning)
        yield


@EXPORTERS.register("torchscript")
class TorchScript(Exporter):
    """A traced graph; the record is the extra file `tmkd.json`."""

    description = "a traced program for torch.jit.load (deprecated by PyTorch; for C++ and mobile)"
    suffix = ".pt"
    runs_code = True

    @torch.no_grad()
    def write(self, student: Student, path: str) -> None:
        with _quiet():
            # check_trace would run it thrice more; the parity check at export does so on real images.
            traced = torch.jit.trace(  # type: ignore[no-untyped-call]
                student.network(), student.example(), check_trace=False
            )
            content = student.record.model_dump_json(exclude_none=True)
            torch.jit.save(traced, path, _extra_files={RECORD_FILE: content})

    def read(self, path: str) -> ExportedModel:
        extra = {RECORD_FILE: ""}
        try:
            with _quiet():
                network = torch.jit.load(  # type: ignore[no-untyped-call]
                    path, map_location="cpu", _extra_files=extra
                )
        except (RuntimeError, ValueError, OSError) as error:
            raise unreadable(path, "TorchScript", error) from error
        return ExportedModel(_record(extra, path), network, engine="TorchScript", network=network.eval())


@EXPORTERS.register("pt2")
class ExportedProgram(Exporter):
    """A `torch.export` program with a dynamic batch; the record is the extra file `tmkd.json`."""

    description = "a program for torch.export.load, with a dynamic batch"
    suffix = ".pt2"
    runs_code = True

    @torch.no_grad()
    def write(self, student: Student, path: str) -> None:
        program = torch.export.export(
            student.network(),
            (student.example(),),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )
        content = student.record.model_dump_json(exclude_none=True)
        torch.export.save(program, path, extra_files={RECORD_FILE: content})

    def read(self, path: str) -> ExportedModel:
        extra = {RECORD_FILE: ""}
        try:
            network = torch.export.load(path, extra_files=extra).module()
        except Exception as error:  # a broken archive makes the reader raise anything
            raise unreadable(path, "a torch.export program", error) from error
        return ExportedModel(_record(extra, path), network, engine="torch.export", network=network)


def _record(extra: dict[str, str], path: str) -> ExportRecord:
    if not extra[RECORD_FILE]:
        raise not_ours(path)
    return ExportRecord.from_json(extra[RECORD_FILE], path)
