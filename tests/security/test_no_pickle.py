"""Nothing that is read from storage is run: no pickle, no marshal, no eval, no YAML tags, no shell.

Ray's own transport between the processes of one cluster is pickle, and outside of this: who can speak to it
has the cluster's token and may run code anyway (SECURITY.md).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("jobs", "schemas", "maskrcnn_core", "cluster")

# Where one of these stands, and why it may.
ALLOWED = {
    ("jobs/infer/read.py", "import pickle"): "tasks the driver made, inside the Arrow table it gives Ray",
    ("maskrcnn_core/restricted_pickle.py", "import pickletools"): "takes opcodes apart, runs none",
    ("schemas/spec_file.py", "yaml.load"): "with a SafeLoader that takes even less",
}

_MODULES = {
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "jsonpickle",
    "marshal",
    "pickle",
    "pickletools",
    "shelve",
}
_BUILTINS = {"eval", "exec", "compile", "__import__"}
_CALLS = {
    "os.popen",
    "os.system",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "yaml.full_load",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
}


def dangers(source: str) -> Iterator[str]:
    """What of the kind stands in a module's source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or "", *(f"{node.module}.{name}" for name in modules)]
            for module in modules:
                if set(module.split(".")) & _MODULES:
                    yield f"import {module}"
        elif isinstance(node, ast.Call):
            yield from _dangers_of_call(node)


def _dangers_of_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if name in _BUILTINS or name in _CALLS or name.rpartition(".")[2] in ("read_pickle", "to_pickle"):
        yield name
    if name == "torch.load" and options.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if options.get("allow_pickle", "False") != "False":
        yield f"{name} with allow_pickle"
    if options.get("shell", "False") != "False":
        yield f"{name} with shell"


def test_nothing_in_the_source_runs_what_it_reads() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), danger)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for danger in dangers(path.read_text())
    }
    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    ("source", "danger"),
    [
        ("import pickle as p", "import pickle"),
        ("from pickle import loads", "import pickle"),
        ("from ray import cloudpickle", "import ray.cloudpickle"),
        ("import torch\ntorch.load(f)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(f, weights_only=False)", "torch.load without weights_only=True"),
        ("np.load(f, allow_pickle=True)", "np.load with allow_pickle"),
        ("yaml.load(text)", "yaml.load"),
        ("eval(text)", "eval"),
        ("subprocess.run(line, shell=True)", "subprocess.run with shell"),
        ("pd.read_pickle(uri)", "pd.read_pickle"),
    ],
)
def test_each_of_them_would_be_found(source: str, danger: str) -> None:
    assert danger in set(dangers(source))


def test_harmless_source_passes() -> None:
    assert not list(
        dangers("import json\nmodel.eval()\ntorch.load(f, weights_only=True)\nnp.load(f)\nre.compile('a')")
    )
