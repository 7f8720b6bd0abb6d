"""`tmkd benchmark`: how fast students are beside their teacher, in PyTorch and ONNX Runtime."""

import argparse
import json
import os
import platform
import tempfile
from typing import TYPE_CHECKING, Any

from tmkd_ray.commands.base import COMMANDS, Command
from tmkd_ray.errors import UserError

if TYPE_CHECKING:
    from tmkd_ray.export import ExportRecord, Student
    from tmkd_ray.export.latency import Contestant, Speed, Spread

ENGINES = ("pytorch", "onnxruntime")


@COMMANDS.register("benchmark")
class Benchmark(Command):
    description = "measure latency and throughput of students and teacher, side by side"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "models", nargs="+", metavar="MODEL", help="exported files, or runs' folders (their student)"
        )
        parser.add_argument("--teacher", metavar="RUN", help="a run's folder: its visual teacher takes part")
        parser.add_argument("--method", help="of the runs' students; default: the config's `distiller`")
        parser.add_argument("--seed", type=int, help="of the runs' students; default: the lowest")
        parser.add_argument(
            "--batch", type=int, default=64, help="images at once for the throughput; default: 64"
        )
        parser.add_argument(
            "--rounds", type=int, default=15, help="medians and quartiles are over so many; default: 15"
        )
        parser.add_argument("--threads", type=int, help="of PyTorch and ONNX Runtime; default: PyTorch's own")
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of PyTorch")
        parser.add_argument("--engine", choices=ENGINES, help="only this one; default: both")
        parser.add_argument("--json", metavar="FILE", help="write the figures as JSON, too")

    def __call__(self, options: argparse.Namespace) -> int:
        import torch

        from tmkd_ray import storage
        from tmkd_ray.export.latency import measure_speeds
        from tmkd_ray.progress import Rate

        for name in ("batch", "rounds", "threads"):
            value = getattr(options, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} is at least 1, not {value}")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch finds no GPU here")
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        with tempfile.TemporaryDirectory(prefix="tmkd-") as folder:
            contestants = _contestants(options, folder)
            speeds = measure_speeds(
                contestants,
                options.batch,
                options.rounds,
                lambda rounds: Rate("benchmark", len(rounds), "rounds").over(rounds),
            )
        print(format_speeds(speeds, torch.get_num_threads(), options.rounds))
        if options.json is not None:
            content = {
                "hardware": hardware(options.device),
                "threads": torch.get_num_threads(),
                "batch_size": options.batch,
                "rounds": options.rounds,
                "models": [_fields(speed) for speed in speeds],
            }
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            storage.write_bytes(storage.absolute(options.json), text.encode())
            print(f"\n{options.json}")
        return 0


def _contestants(options: argparse.Namespace, folder: str) -> "list[Contestant]":
    """Open every model in each engine that runs it; graphs are written into `folder`."""
    from tmkd_ray import storage
    from tmkd_ray.export import Student, load_exported
    from tmkd_ray.export.base import StudentNetwork
    from tmkd_ray.export.latency import Contestant
    from tmkd_ray.export.student import find_student
    from tmkd_ray.export.teacher import find_teacher
    from tmkd_ray.progress import say

    contestants: list[Contestant] = []
    for path in options.models:
        say(f"benchmark: opening {path}")
        if storage.exists(storage.join(storage.absolute(path), "config.yaml")):
            found = find_student(path, options.method, options.seed)
            name = (
                f"{found.student.record.method} seed {found.student.record.seed}: {found.student.record.model}"
            )
            contestants += _of_student(found.student, name, options, folder)
            continue
        exported = load_exported(path)
        name = os.path.basename(path.rstrip("/"))
        if isinstance(exported.network, StudentNetwork):
            contestants += _of_student(Student(exported.network.model, exported.record), name, options, folder)
            continue
        is_onnx = exported.engine == "ONNX Runtime"
        if options.engine is None or (options.engine == "onnxruntime") == is_onnx:
            flops = _flops(exported.record)
            contestants.append(Contestant(name, exported.engine, exported.run, exported.record, flops=flops))
    if options.teacher is not None:
        say(f"benchmark: opening the teacher of {options.teacher}")
        teacher = find_teacher(options.teacher)
        contestants += _of_student(teacher, f"teacher: {teacher.record.model}", options, folder)
    if not contestants:
        raise UserError(f"--engine {options.engine} runs none of these files")
    return contestants


def _flops(record: "ExportRecord") -> int | None:
    """Count what the record's network computes; None where its name alone does not build it."""
    from tmkd_ray.export.latency import count_flops
    from tmkd_ray.models import build_model

    if record.model.startswith("transformers/"):
        return None
    return count_flops(build_model(record.model, record.task()).eval(), record.image_size)


def _of_student(student: "Student", name: str, options: argparse.Namespace, folder: str) -> "list[Contestant]":
    """Return a network in PyTorch and, on CPUs, in ONNX Runtime."""
    import torch

    from tmkd_ray.export import EXPORTERS
    from tmkd_ray.export.latency import Contestant, count_flops

    record, contestants = student.record, []
    network = student.network()
    flops = count_flops(network, record.image_size)
    if options.engine != "onnxruntime":
        if options.device == "cuda":
            on_gpu = student.network().to("cuda")

            def run_on_gpu(images: torch.Tensor) -> None:
                on_gpu(images)
                torch.cuda.synchronize()

            contestants.append(Contestant(name, "PyTorch, GPU", run_on_gpu, record, "cuda", flops))
        else:
            contestants.append(Contestant(name, "PyTorch", network, record, flops=flops))
    if options.engine != "pytorch" and options.device == "cpu":
        onnx_format = EXPORTERS.get("onnx")()
        onnx_format.check(record)
        path = os.path.join(folder, f"{len(os.listdir(folder))}.onnx")
        onnx_format.write(student, path)
        contestants.append(Contestant(name, "ONNX Runtime", onnx_format.read(path).run, record, flops=flops))
    return contestants


def format_speeds(speeds: "list[Speed]", threads: int, rounds: int) -> str:
    """Return a Markdown table, and how to read it."""
    lines = [
        f"| network | run by | parameters | MFLOPs | latency, ms | images/s, batch {speeds[0].batch_size} "
        "| accuracy, % | accuracy/ms |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    splits = set()
    for speed in speeds:
        record, flops = speed.contestant.record, speed.contestant.flops
        known = record.accuracy()
        if known is not None:
            splits.add(known[1])
        cells = [
            speed.contestant.name.replace("|", "\\|"),
            speed.contestant.engine,
            f"{record.parameters:,}",
            "–" if flops is None else f"{flops / 1e6:,.1f}",
            _spread(speed.latency_ms, 3),
            _spread(speed.images_per_second, 0),
            "–" if known is None else f"{100 * known[0]:.2f}" + ("" if known[1] == "test" else " (validation)"),
            "–" if speed.accuracy_per_ms is None else f"{speed.accuracy_per_ms:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Median (quartiles) of {rounds} interleaved rounds, {threads} threads, {hardware('cpu')}. Latency: "
        "one image. FLOPs: a multiply-add counts as two."
        + (f" Accuracy: on {' or '.join(sorted(splits))} images, as the run measured it." if splits else ""),
    ]
    return "\n".join(lines)


def _spread(spread: "Spread", digits: int) -> str:
    return f"{spread.median:,.{digits}f} ({spread.lower:,.{digits}f}–{spread.upper:,.{digits}f})"


def _fields(speed: "Speed") -> dict[str, Any]:
    record = speed.contestant.record
    known = record.accuracy()
    return {
        "name": speed.contestant.name,
        "engine": speed.contestant.engine,
        "model": record.model,
        "precision": record.precision,
        "parameters": record.parameters,
        "flops": speed.contestant.flops,
        "latency_ms": vars(speed.latency_ms),
        "images_per_second": vars(speed.images_per_second),
        "accuracy": None if known is None else known[0],
        "accuracy_split": None if known is None else known[1],
        "accuracy_percent_per_ms": speed.accuracy_per_ms,
    }


def hardware(device: str) -> str:
    """Return the processor, the cores this process may use, and the GPU if it takes part."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        processor = names[0] if names else processor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    told = f"{processor}, {cores} cores"
    if device == "cuda":
        import torch

        told = f"{torch.cuda.get_device_name()}; {told}"
    return told
