"""The teacher that lies beside the checkout scores what its source says, by `tmkd evaluate`."""

from pathlib import Path

import pytest

from tmkd_ray.cli import main

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


@pytest.mark.ray
@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data beside the checkout")
def test_resnet56_scores_66_41_percent_on_the_cifar100_test_images(ray_cluster, tmp_path, capsys):
    config = ROOT / "pipelines" / "configs" / "cifar100_resnet56_resnet8.yaml"
    checkpoint = DATA / "teachers" / "cifar100_resnet56.pth"
    overrides = [
        f"dataset.path={DATA / 'cifar100'}",
        f"teacher.visual.checkpoint={checkpoint}",
        f"output={tmp_path}",
    ]
    assert main(["evaluate", "--config", str(config), *overrides]) == 0
    table = capsys.readouterr().out
    assert "test split, 10,000 images" in table
    row = next(line for line in table.splitlines() if line.startswith("visual teacher resnet56"))
    assert row.split()[3:6] == ["861,620", "66.41", "89.09"]
