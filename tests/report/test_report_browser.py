"""The page in a real browser."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tmkd_ray.report.html import write_page
from tmkd_ray.report.sections.base import RunPage

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")


@pytest.fixture
def chromium(tmp_path):
    """Open a page: return what is on stdout, and the messages of its console."""

    def chromium(page, *options):
        arguments = [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(
                "--enable-logging=stderr",
                "--v=0",
                "--virtual-time-budget=3000",
                f"--user-data-dir={tmp_path / 'profile'}",
            ),
            *("--disable-background-networking", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND"),
        ]
        done = subprocess.run(
            [*arguments, *options, page.as_uri()], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return chromium


@pytest.fixture
def page(make_results, make_analysis, tmp_path):
    results = make_results()
    write_page(tmp_path / "report.html", [RunPage(results, make_analysis(results))])
    return tmp_path / "report.html"


def test_a_browser_shows_the_page_and_complains_of_nothing(chromium, page):
    dom, messages = chromium(page, "--dump-dom")
    assert messages == []
    for anchor in ("results", "weights", "confusion", "calibration", "correlation", "features", "grad-cam"):
        assert f'<section id="{anchor}">' in dom
    assert dom.count("<svg") >= 20
    assert dom.count("<img") >= 12


def test_a_browser_that_complains_is_heard(chromium, tmp_path):
    wrong = tmp_path / "wrong.html"
    wrong.write_text("<!DOCTYPE html><title>x</title><script>console.error('heard')</script>")
    _, messages = chromium(wrong, "--dump-dom")
    assert any("heard" in message for message in messages)


@pytest.mark.parametrize(("theme", "is_dark"), [("light", False), ("dark", True)])
def test_the_theme_is_the_readers(chromium, page, tmp_path, theme, is_dark):
    """The screenshots are kept under TMKD_ARTIFACTS."""
    folder = Path(os.environ.get("TMKD_ARTIFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    shot = folder / f"report-{theme}.png"
    # Blink's PreferredColorScheme: 0 dark, 1 light.
    scheme = f"--blink-settings=preferredColorScheme={0 if is_dark else 1}"
    chromium(page, scheme, f"--screenshot={shot}", "--window-size=1100,2400")
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.shape == (2400, 1100)
    background = np.median(pixels[:, :8])
    assert background < 40 if is_dark else background > 240
    # Text and figures stand out against it.
    assert (np.abs(pixels.astype(int) - background) > 100).mean() > 0.01
