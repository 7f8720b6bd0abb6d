"""The cost model: by hand, and against published figures."""

import json
import re

import pytest

from tmkd_ray import planning
from tmkd_ray.cli import main
from tmkd_ray.config_reading import read_config
from tmkd_ray.errors import UserError
from tmkd_ray.planning import (
    Constants,
    assumptions,
    format_plan,
    make_plan,
    network_flops,
    read_constants,
    read_nodes,
    vit_flops,
)


def constants(**changes: object) -> Constants:
    """Round numbers: a core takes 1 ms an image and 2 ms a variant at any size."""
    node = {
        "machine": "m",
        "cores": 10,
        "memory_gib": 64,
        "disk_gib": 100,
        "network_gbit": 80,
        "dollars_per_hour": 1,
    }
    gpu = {**node, "gpus": 2, "gpu": "G", "dollars_per_hour": 3}
    fields = {
        "measured": {"hardware": "none", "date": "never", "software": "none", "sizes": {}},
        "core": {
            "decode_s": {"at_32": 0.001, "at_224": 0.001},
            "variant_s": {"at_32": 0.002, "at_224": 0.002},
            "write_bytes_per_s": 1e30,
            "flops": 1e9,
            "matmul_flops": 2e9,
            "step_over_forward": 3,
        },
        "ray": {"start_s": 0, "shard_s": 1e-9, "object_bytes_per_s": 1e30},
        "driver": {
            "image_s": 1e-30,
            "image_bytes": 500,
            "image_kept_bytes": 200,
            "shard_s": 1e-30,
            "shard_bytes": 1000,
            "manifest_bytes": 300,
        },
        "store": {"reads_per_s": 1e9, "writes_per_s": 1e9, "request_s": 1e-30, "source": "made up"},
        "gpus": {
            "G": {
                "float32": 1e12,
                "bfloat16": 4e12,
                "float16": 4e12,
                "utilisation": 0.25,
                "is_estimate": True,
                "source": "none",
            }
        },
        "nodes": {"head": {**node, "dollars_per_hour": 0}, "views": node, "teacher": gpu, "train": gpu},
        "prices": {
            "note": "made up",
            "dollars_per_gb_month": 0.02,
            "dollars_per_1000_writes": 0,
            "dollars_per_1000_reads": 0,
        },
    }
    return Constants.model_validate(fields | changes)


BASE = [
    *("dataset=image_folder", "dataset.path=/data", "dataset.image_size=224", "distiller=kd"),
    *("teacher.visual.model=torchvision/resnet18", "teacher.visual.checkpoint=/w.pth", "teacher.text=null"),
    *("student.model=torchvision/resnet18", "training.epochs=10", "knowledge.num_variants=4"),
]
RESNET18 = 2 * 1.8141e9
"""Operations at 224 pixels and 1000 classes, two a multiplication (torchvision's table: 1.81 GFLOPS)."""


def test_operations_of_networks_are_those_published():
    flops, width = network_flops("torchvision/resnet18", 224, 1000)
    assert flops == pytest.approx(RESNET18, rel=2e-3)
    assert width == 512
    assert network_flops("torchvision/resnet50", 224, 1000)[0] == pytest.approx(2 * 4.09e9, rel=2e-3)
    # Dosovitskiy et al. count 4.4 and 17.6 G multiplications for ViT-B/32 and ViT-B/16 at 224 pixels.
    assert vit_flops(224, 32, 768, 12) == pytest.approx(2 * 4.41e9, rel=0.01)
    assert vit_flops(224, 16, 768, 12) == pytest.approx(2 * 17.58e9, rel=0.01)


def test_a_plan_by_hand():
    plan = make_plan(read_config(None, BASE), {"views": 3, "teacher": 1, "train": 2}, 1000, 1000, constants())
    cpu, teacher, *_ = plan.knowledge
    assert cpu.per_s == pytest.approx(30 / (0.001 + 4 * 0.002))
    # Two GPUs at a quarter of 1 TFLOP/s; 4 variants × 3 views an image.
    rate = 2 * 0.25e12 / (12 * RESNET18)
    assert teacher.per_s == pytest.approx(rate, rel=2e-3)
    assert plan.bottleneck is teacher
    assert plan.knowledge_hours == pytest.approx(1000 / rate / 3600, rel=2e-3)
    ((name, hours, basis),) = plan.trainings
    assert name == "1 student, 10 epochs"
    assert hours == pytest.approx(1000 * 10 * 3 * RESNET18 / (4 * 0.25e12) / 3600, rel=2e-3)
    assert basis == "ESTIMATE: 25% of 1 TFLOP/s"
    assert plan.dollars == pytest.approx(plan.knowledge_hours * (3 * 1 + 1 * 3) + hours * 2 * 3)


def test_what_is_given_changes_what_holds_back():
    nodes = {"views": 1, "teacher": 1, "train": 1}
    slow = constants(ray={"start_s": 0, "shard_s": 100, "object_bytes_per_s": 1e30})
    assert make_plan(read_config(None, BASE), nodes, 10, 1000, slow).bottleneck.name == "Ray's shards"
    config = read_config(None, [*BASE, "knowledge.visual.precision=bfloat16"])
    fast = make_plan(config, nodes, 10, 1000, constants()).knowledge[1]
    assert fast.per_s == pytest.approx(2 * 0.25 * 4e12 / (12 * RESNET18), rel=2e-3)
    with_clip = read_config(None, [*BASE, "teacher.text.model=openai/clip-vit-base-patch32"])
    both = make_plan(with_clip, nodes, 10, 1000, constants()).knowledge[1]
    assert both.name == "visual teacher and CLIP"
    assert both.per_s == pytest.approx(2 * 0.25e12 / (12 * (RESNET18 + 2 * 4.41e9)), rel=5e-3)


def test_without_gpus_the_cores_compute_the_teachers():
    nodes = {kind: node.model_copy(update={"gpus": 0}) for kind, node in constants().nodes.items()}
    plan = make_plan(
        read_config(None, BASE),
        dict.fromkeys(("views", "teacher", "train"), 1),
        10,
        1000,
        constants(nodes=nodes),
    )
    assert plan.knowledge[1].per_s == pytest.approx(10 * 1e9 / (12 * RESNET18), rel=2e-3)
    assert plan.knowledge[1].basis == "measured"


def test_what_the_driver_and_the_object_store_take_by_hand():
    """Beside the pipeline: 18 images a shard of 64 MiB (8 variants × 3 views at 224 pixels), so 100 shards."""
    config = read_config(None, [*BASE, "knowledge.num_variants=8"])
    nodes, images = {"views": 1, "teacher": 1, "train": 2}, 1800
    free = make_plan(config, nodes, images, 1000, constants())
    driver = {**constants().driver.model_dump(), "image_s": 2.0, "shard_s": 3.0}
    store = {**constants().store.model_dump(), "request_s": 64.0}
    prices = constants().prices.model_dump() | {"dollars_per_1000_writes": 5, "dollars_per_1000_reads": 7}
    dear = make_plan(config, nodes, images, 1000, constants(driver=driver, store=store, prices=prices))
    # 32 requests at once; a record is read twice.
    alone_s = 1800 * 2 + 100 * 3 + 2 * 100 * 64 / 32
    assert dear.knowledge_hours - free.knowledge_hours == pytest.approx(alone_s / 3600)
    # A file an image, each record twice, each shard by two nodes; a file and a record a shard are written.
    requests = 5 * 200 / 1000 + 7 * (1800 + 2 * 100 + 2 * 100) / 1000
    assert dear.dollars - free.dollars == pytest.approx(alone_s / 3600 * 4 + requests)
    slow = constants(ray={"start_s": 0, "shard_s": 1e-9, "object_bytes_per_s": 1e9})
    pixels = 8 * 3 * 3 * 224**2
    seconds = 0.001 + 8 * 0.002 + pixels / 1e9
    assert make_plan(config, nodes, 10, 1000, slow).knowledge[0].per_s == pytest.approx(10 / seconds, rel=0.02)


def test_what_breaks_first_is_told():
    nodes = {"views": 1, "teacher": 1, "train": 1}
    config = read_config(None, BASE)
    assert make_plan(config, nodes, 1000, 1000, constants()).limits == []
    limits = make_plan(config, nodes, 100_000_000, 1000, constants()).limits
    # 100 M × 163 kB over 80 GiB; the list, 20 GB in three processes, over 32 GiB; 53 GB over 32 GiB; the
    # manifest of 2.7 M shards is 0.8 GB and fits.
    names = ["disks for training", "the list of images in each process", "the driver"]
    assert [limit.split(":")[0] for limit in limits] == names
    assert "16.3 TB" in limits[0]
    resident = read_config(None, [*BASE, "knowledge.loader=resident"])
    limits = make_plan(resident, nodes, 1_000_000, 1000, constants()).limits
    assert [limit.split(":")[0] for limit in limits] == ["memory for training"]
    fitted = read_config(None, [*BASE, "teacher.visual.checkpoint=null"])
    limits = make_plan(fitted, nodes, 300_000, 1000, constants()).limits
    assert [limit.split(":")[0] for limit in limits] == ["memory for the fit of the visual teacher"]
    busy = constants(store={"reads_per_s": 0.1, "writes_per_s": 1e-9, "request_s": 1e-30, "source": "made up"})
    limits = make_plan(config, nodes, 1000, 1000, busy).limits
    assert [limit.split(":")[0] for limit in limits] == ["requests to write", "requests to read"]


def test_the_constants_are_those_given_or_the_packages_and_named(tmp_path, capsys, monkeypatch):
    command = ["plan", "--nodes", "views=1,teacher=1,train=1", "--images", "100", *BASE]
    packaged = constants(measured={"hardware": "an anvil", "date": "2001-02-03", "software": "", "sizes": {}})
    monkeypatch.setattr(planning, "packaged_constants", lambda: packaged)
    assert main(command) == 0
    assert "constants of the package: measured 2001-02-03 on an anvil" in capsys.readouterr().out
    own = packaged.model_dump()
    own["measured"]["hardware"] = "a machine of mine"
    own["gpus"]["G"]["utilisation"] = 0.01
    (tmp_path / "own.json").write_text(json.dumps(own))
    assert main([*command, "--constants", str(tmp_path / "own.json")]) == 0
    given = capsys.readouterr().out
    assert "own.json: measured 2001-02-03 on a machine of mine" in given
    assert "1% of" in given
    monkeypatch.setattr(planning, "packaged_constants", lambda: None)
    assert main(command) == 2
    assert "measure them by" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["views=1", "views=1,teacher=0,train=1", "views=1,views=2", "gpu=2", "views=x"]
)
def test_nodes_that_cannot_be_read(text):
    with pytest.raises(UserError, match="--nodes"):
        read_nodes(text)


def test_constants_that_cannot_be_read(tmp_path):
    (tmp_path / "a.json").write_text('{"note": 3}')
    (tmp_path / "b.json").write_text("{")
    for name, message in (("a.json", "core: required"), ("b.json", "is not JSON"), ("c.json", "no file")):
        with pytest.raises(UserError, match=message):
            read_constants(str(tmp_path / name))


def test_what_is_not_measured_says_so():
    rest = assumptions()
    assert all(gpu.is_estimate and "assumed" in gpu.source for gpu in rest.gpus.values())
    assert "assumed" in rest.store.source
    assert re.search(r"EXAMPLE.*20\d\d", rest.prices.note)
    packaged = Constants.model_validate(constants().model_dump() | rest.model_dump())
    plan = make_plan(read_config(None, BASE), {"views": 1, "teacher": 1, "train": 1}, 10, 1000, packaged)
    text = format_plan(plan, 10, packaged, "the package")
    assert "ESTIMATE" in text
    assert "were not measured" in text
