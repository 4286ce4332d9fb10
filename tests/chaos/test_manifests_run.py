"""What the rendered RayJobs start, started: their entrypoint, spec and environment on a cluster of machines.

Only sizes are set anew: there is no GPU here, and no time for a whole training.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.demo.lake import write_scene_lake
from jobs.lake.aliases import Aliases
from jobs.lake.current import read_current
from jobs.lake.labels_table import LabelsTable
from jobs.lake.models import read_checkpoint_bytes
from jobs.lake.registry import ModelRegistry
from maskrcnn_core.checkpoint import parse_checkpoint
from tests.chaos.harness import ROOT, make_images, make_source
from tests.chaos.machines import why_not
from tests.chaos.test_separate_machines import Site, open_site

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

MANIFESTS = ROOT / "cluster" / "manifests" / "kuberay" / "aws"
PHOTOS, LAKE, TRUTH = "example-photos", "example-lake", "example-truth"
BIN = Path(sys.executable).parent
LABEL_SIZES = ("pool.gpus_per_actor=0", "pool.cpus_per_actor=1", "pool.max_actors=1")
TRAIN_SIZES = (
    "scaling.use_gpu=false",
    "scaling.num_workers=1",
    "scaling.cpus_per_worker=1",
    "recipe.steps=4",
    "recipe.total_batch=2",
    "recipe.precision=fp32",
    "recipe.shorter_sides=[64]",
    "recipe.calibration_batches=0",
    "evaluate.every_steps=4",
)


def manifest(job: str, kind: str) -> dict[str, Any]:
    (found,) = (
        document
        for document in yaml.safe_load_all((MANIFESTS / f"{job}.yaml").read_text())
        if document["kind"] == kind
    )
    return dict(found)


def run(site: Site, job: str, *settings: str) -> dict[str, Any]:
    """Submit the entrypoint to the head, as KubeRay does; the ConfigMap's folder is another one here."""
    data = manifest(job, "ConfigMap")["data"]
    folder = site.head.disk / "etc"
    folder.mkdir(exist_ok=True)
    for name, text in data.items():
        (folder / name).write_text(text)
    entrypoint = manifest(job, "RayJob")["spec"]["entrypoint"].replace("/etc/masklake", "/tmp/etc").split()
    words = [str(BIN / entrypoint[0]), *entrypoint[1:]]
    for setting in settings:
        words += ["--set", setting]
    submit = [str(BIN / "ray"), "job", "submit", "--address", f"http://{site.head.address}:8265", "--"]
    return site.summary(site.head.run(*submit, *words, "--json"), prefix='{"run_id"')


def test_the_rendered_jobs_label_label_again_and_train(tmp_path: Path) -> None:
    spec = manifest("infer", "RayJob")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (head,) = spec["containers"]
    env = {entry["name"]: entry["value"] for entry in head["env"]}
    write_scene_lake(tmp_path / "scenes", range(10_000_000, 10_000_012), 1)
    with open_site(PHOTOS, env) as site:
        for name in (LAKE, TRUTH):
            site.bucket.client.create_bucket(Bucket=name)
        for image in sorted((tmp_path / "scenes" / "images").iterdir()):
            site.bucket.put(f"incoming/{image.name}", image.read_bytes())
        for name in ("train", "val"):
            truth = (tmp_path / "scenes" / "annotations.json").read_bytes()
            site.bucket.client.put_object(Bucket=TRUTH, Key=f"coco/{name}.json", Body=truth)
        lake = f"s3://{LAKE}/masklake"
        content, where = read_checkpoint_bytes("demo", site.storage)
        version = ModelRegistry(lake, site.storage).register(
            "people", content, parse_checkpoint(content, where).fingerprint
        )
        Aliases(lake, site.storage).move("champion", version, "a test", "")
        site.add("worker", cpus=3)

        labelled = run(site, "infer", *LABEL_SIZES)
        assert (labelled["status"], labelled["ok"]) == ("done", 12)
        for name, data in make_source("tar", make_images(1), num_shards=1).items():
            site.bucket.put(f"incoming/later-{name}", data)
        again = run(site, "relabel", *LABEL_SIZES)
        assert (again["status"], sum(part["images"] for part in again["passes"])) == ("up_to_date", 1)
        (current,) = read_current(LabelsTable.open(lake, site.storage)).values()
        assert current.model == str(version)
        trained = run(site, "train", *TRAIN_SIZES)
        assert (trained["steps"], trained["registered"]) == (4, "people@2")
        assert trained["ap"] is not None
