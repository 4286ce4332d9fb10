from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.demo.tour import run_demo
from jobs.infer.progress import JsonWatcher


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_demo_reaches_its_mask_ap_on_scenes_it_was_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, evaluation = run_demo(tmp_path, JsonWatcher(), num_scenes=160)
    assert (summary.ok, summary.failed) == (160, 0)
    assert (evaluation.images, evaluation.unlabelled) == (160, 0)
    assert evaluation.segm["AP"] >= 0.75
    shown = capsys.readouterr().out
    assert f"{evaluation.segm['AP']:.3f}" in shown
    with Image.open(tmp_path / "overlays.png") as sheet:
        assert sheet.size == (4 * 320, 3 * 320)
        assert np.asarray(sheet).std() > 20
