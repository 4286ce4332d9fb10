import contextlib
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import UsageError
from schemas.labels import ErrorKind
from schemas.spec_loader import json_schema, load_spec, parse_spec
from schemas.specs import InferSpec, PoolSpec

URIS = {"source.uri": "photos/", "model.uri": "demo", "lake.uri": "lake/"}


def from_overrides(*overrides: str) -> InferSpec:
    return load_spec(InferSpec, None, overrides, **URIS)


def problem(*overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        from_overrides(*overrides)
    return str(caught.value)


def problem_in(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_spec(InferSpec, str(path), (), **URIS)
    return str(caught.value).replace(str(path), "job.yaml")


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    return tmp_path / "job.yaml"


def test_the_design_s_spec_file_is_taken_as_it_stands(spec_file: Path) -> None:
    spec_file.write_text("""
source:   {uri: s3://bucket/images/, format: auto, image_column: image, id_column: null, include: "*"}
model:    {uri: demo, score_threshold: 0.05, nms_threshold: 0.5, mask_threshold: 0.5, max_detections: 100,
           min_size_px: 800, max_size_px: 1333}
lake:     {uri: s3://bucket/lake}   # the tables
unit:     {max_bytes: 64MB, max_images: auto}
pool:     {min_actors: 1, max_actors: null, gpus_per_actor: auto, cpus_per_actor: auto, batch_size: 16,
           precision: auto}
commit:   {every_s: 60, every_images: 100000}
failures: {budget: 1%, retry: []}
storage:  {endpoint_url: null, region: null, anonymous: false}
""")
    spec = load_spec(InferSpec, str(spec_file))
    assert spec.source.uri == "s3://bucket/images/"
    assert spec.unit.max_bytes == 64_000_000
    assert spec.failures.budget == 0.01
    assert spec.pool == PoolSpec()


def test_three_uris_are_enough_and_thresholds_are_left_to_the_checkpoint() -> None:
    spec = load_spec(InferSpec, None, **URIS)
    assert (spec.source.uri, spec.model.uri, spec.lake.uri) == ("photos/", "demo", "lake/")
    assert spec.model.score_threshold is None
    assert spec.unit.max_images == "auto"


def test_overrides_lie_over_the_file_and_flags_over_both(spec_file: Path) -> None:
    spec_file.write_text("source: {uri: a, include: '*.png'}\nmodel: {uri: a}\nlake: {uri: a}\npool:\n")
    sets = ["source.uri=b", "model.uri=b", "pool.batch_size=4"]
    spec = load_spec(InferSpec, str(spec_file), sets, **{"source.uri": "c", "lake.uri": None})
    assert (spec.source.uri, spec.model.uri, spec.lake.uri) == ("c", "b", "a")
    assert (spec.source.include, spec.pool.batch_size) == ("*.png", 4)


def test_override_values_are_read_as_yaml_scalars() -> None:
    spec = from_overrides(
        "source.include=*.jpg",
        "source.id_column=null",
        "model.score_threshold=1e-3",
        "unit.max_bytes=1.5 MiB",
        "failures.budget=2.5%",
        "failures.retry=[io, missing]",
        "storage.anonymous=true",
        'storage.region="7"',
        "pool.gpus_per_actor=0.25",
        "commit.every_s=5",
    )
    assert spec.source.include == "*.jpg"
    assert spec.source.id_column is None
    assert spec.model.score_threshold == 0.001
    assert spec.unit.max_bytes == 1_572_864
    assert spec.failures.budget == 0.025
    assert spec.failures.retry == (ErrorKind.IO, ErrorKind.MISSING)
    assert spec.storage.anonymous
    assert spec.storage.region == "7"
    assert spec.pool.gpus_per_actor == 0.25
    assert spec.commit.every_s == 5


@pytest.mark.parametrize(
    "glob", ["*", "*.jpg", "=", "<<", "&", "!", "2026-01-31", "1%", "a: b", "# x", "a=b"]
)
def test_an_override_needs_no_quotes_for_a_string(glob: str) -> None:
    assert from_overrides(f"source.include={glob}").source.include == glob


def test_every_missing_uri_is_named_with_its_flag() -> None:
    with pytest.raises(UsageError) as caught:
        load_spec(InferSpec, None)
    assert str(caught.value) == (
        "spec: source.uri is not set, wanted a path or a URI: write it in the spec or give --source; "
        "model.uri is not set, wanted a path or a URI: write it in the spec or give --model; "
        "lake.uri is not set, wanted a path or a URI: write it in the spec or give --lake"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pool: {batchsize: 3}", "pool.batchsize is not a known key (did you mean pool.batch_size?)"),
        ("modle: {uri: x}", "modle is not a known key (did you mean model?)"),
        ("batch_size: 3", "batch_size is not a known key (did you mean pool.batch_size?)"),
        ("lake: {format: tar}", "lake.format is not a known key (did you mean source.format?)"),
        ("commit: {x: 1}", "commit.x is not a known key (commit has every_s, every_images, compact)"),
        ("zzz: 1", "zzz is not a known key"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_right_name(
    spec_file: Path, text: str, message: str
) -> None:
    assert problem_in(spec_file, text) == f"job.yaml: {message}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pool.batch_size=0", "pool.batch_size is 0, wanted a whole number, 1 or more"),
        ("pool.batch_size=true", "pool.batch_size is true, wanted a whole number, 1 or more"),
        ("pool.batch_size=1.5", "pool.batch_size is 1.5, wanted a whole number, 1 or more"),
        ("pool.batch_size=null", "pool.batch_size is null, wanted a whole number, 1 or more"),
        ("pool.max_actors=many", "pool.max_actors is 'many', wanted a whole number, 1 or more, or null"),
        ("pool.cpus_per_actor=0", "pool.cpus_per_actor is 0, wanted a number, more than 0, or auto"),
        ("pool.precision=fp8", "pool.precision is 'fp8', wanted one of auto, fp32, bf16, fp16"),
        ("model.nms_threshold=2", "model.nms_threshold is 2, wanted a number from 0 to 1, or null"),
        ("model.nms_threshold=.nan", "model.nms_threshold is nan, wanted a number from 0 to 1, or null"),
        ("unit.max_bytes=64XB", "unit.max_bytes is '64XB', wanted a size such as 64MB, 64MiB or 67108864"),
        ("unit.max_bytes=0", "unit.max_bytes is 0, wanted a size such as 64MB, 64MiB or 67108864"),
        ("unit.max_images=all", "unit.max_images is 'all', wanted a whole number, 1 or more, or auto"),
        (
            "failures.budget=120%",
            "failures.budget is 1.2, wanted a share such as 1% or 0.01, or a number of images such as 500",
        ),
        (
            "failures.retry_only=true",
            "failures: retry_only is true and retry is empty: name the kinds of failure",
        ),
        ("commit.every_s=.inf", "commit.every_s is inf, wanted seconds, more than 0"),
        ("storage.region=7", "storage.region is 7, wanted a string (quote a number), or null"),
        ("source.format=zip", "source.format is 'zip', wanted one of auto, tar, parquet, files, list"),
        (
            "storage.endpoint_url=x:1",
            "storage.endpoint_url is no endpoint, wanted http://HOST:PORT or https://HOST",
        ),
        ("commit=3", "commit is of type int, wanted a section with the keys every_s, every_images, compact"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_got_and_wanted(override: str, message: str) -> None:
    assert problem(override) == f"spec: {message}"


def test_a_wrong_member_of_a_list_is_named_by_its_place() -> None:
    assert problem("failures.retry=[io, missng]").startswith(
        "spec: failures.retry[1] is 'missng', wanted a list of"
    )


def test_all_problems_of_a_spec_stand_in_one_line() -> None:
    message = problem("pool.batch_size=0", "pol.batch_size=3", "failures.budget=x")
    assert message.count("; ") == 2
    assert all(
        path in message for path in ("pool.batch_size is 0", "pol is not a known key", "failures.budget is")
    )


def test_settings_that_contradict_each_other_are_refused() -> None:
    assert (
        problem("pool.min_actors=3", "pool.max_actors=2")
        == "spec: pool: min_actors 3 is more than max_actors 2"
    )
    assert "min_size_px 900 is more than max_size_px 800" in problem(
        "model.min_size_px=900", "model.max_size_px=800"
    )


@pytest.mark.parametrize(
    "override",
    [
        "source.uri=s3://AKIAKEY:hunter2@bucket/images",
        "source.uri=s3://AKIAKEY:hun/ter2@bucket/images",
        "lake.uri=s3://AKIAKEY@bucket/lake",
        "storage.endpoint_url=https://AKIAKEY:hunter2@host:9000",
    ],
)
def test_credentials_in_a_uri_are_refused_and_never_repeated(override: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_spec(InferSpec, None, [override], **{"model.uri": "demo"})
    assert "holds credentials" in str(caught.value)
    assert "AKIAKEY" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "source.uri=https://bucket.s3.amazonaws.com/1?X-Amz-Credential=AKIAKEY&X-Amz-Signature=x",
        "source.uri=s3://bucket/x?X-Amz-Security-Token=AKIAKEY",
        "model.uri=https://storage.googleapis.com/b/o?GoogleAccessId=AKIAKEY",
        "lake.uri=https://account.blob.core.windows.net/c?sv=1&sig=AKIAKEY",
        "storage.endpoint_url=https://host/?sig=AKIAKEY",
    ],
)
def test_a_signed_url_is_refused_and_never_repeated(override: str) -> None:
    with pytest.raises(UsageError, match="holds a signature") as caught:
        load_spec(InferSpec, None, [override], **{k: v for k, v in URIS.items() if k not in override})
    assert "AKIAKEY" not in str(caught.value)


@pytest.mark.parametrize("url", ["https://host/?a=b", "https://host#x", "https://host?"])
def test_an_endpoint_has_no_query_and_no_fragment(url: str) -> None:
    with pytest.raises(
        UsageError, match=r"storage\.endpoint_url has more behind the host than an endpoint has"
    ):
        from_overrides(f"storage.endpoint_url={url}")


@pytest.mark.parametrize(
    "text",
    [
        "source: s3://AKIAKEY:s@bucket",
        "source: {uri: [s3://AKIAKEY:s@bucket]}",
        "AKIA: s3://AKIAKEY:s@bucket",
    ],
)
def test_a_uri_in_the_wrong_place_is_not_repeated_either(spec_file: Path, text: str) -> None:
    spec_file.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_spec(InferSpec, str(spec_file))
    assert "AKIAKEY" not in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["a b/c", "me@home/photos", "s3://b/me@home/x:y", "memory://x", "gs://b", "alias:best"]
)
def test_an_at_sign_or_a_colon_in_a_path_is_no_credential(uri: str) -> None:
    assert load_spec(InferSpec, None, **{**URIS, "source.uri": uri}).source.uri == uri


@pytest.mark.parametrize("url", ["http://127.0.0.1:7480", "https://host", "http://[::1]:7480/"])
def test_an_endpoint_may_have_a_port(url: str) -> None:
    assert from_overrides(f"storage.endpoint_url={url}").storage.endpoint_url == url


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pool: {a: 1, a: 2}", "job.yaml, line 1, column 14: key 'a' stands there twice"),
        ("pool: &p {}\nunit: *p", "job.yaml, line 2, column 7: aliases (*name) are not taken"),
        ("pool: {3: 4}", "job.yaml, line 1, column 8: '3' is not a key of any spec"),
        ("- 1", "job.yaml is not a mapping of sections"),
        ("pool: {", "job.yaml, line 1, column 8:"),
        ("pool: " + "[" * 5000, "job.yaml is not a spec: it is nested too deeply"),
        ("\0", "job.yaml is not YAML: unacceptable character"),
        ("commit: {every_s: 2026-13-45}", "job.yaml is not YAML: month must be in 1..12"),
        ("#" * (2**20 + 1), "job.yaml is larger than 1 MiB"),
        ("pool: {batch_size: 0x" + "f" * 9000 + "}", "pool.batch_size is a number of more than 64 bits"),
        ("? [1]\n: 2", "job.yaml, line 1, column 3:"),
        ("pool: {batch_size: " + "9" * 5000 + "}", "job.yaml is not YAML: Exceeds the limit (4300 digits)"),
    ],
)
def test_a_file_that_is_no_plain_yaml_is_refused_in_one_line(
    spec_file: Path, text: str, message: str
) -> None:
    assert message in problem_in(spec_file, text)


def test_an_empty_file_is_an_empty_spec(spec_file: Path) -> None:
    spec_file.write_text("# nothing yet\n")
    assert load_spec(InferSpec, str(spec_file), (), **URIS) == from_overrides()


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"cannot read the spec file .*none\.yaml: No such file or directory"
    ):
        load_spec(InferSpec, str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("override", ["pool.batch_size", "=3", "a..b=3", ".a=3", ""])
def test_an_override_of_another_form_is_refused(override: str) -> None:
    assert "is not of the form a.b=value" in problem(override)


@settings(max_examples=300)
@given(st.one_of(st.text(), st.text("*&!<=[]{}'\"#%0x_.e-: ", max_size=6)))
def test_no_override_value_escapes_as_anything_but_a_usage_error(text: str) -> None:
    for key in ("pool.batch_size", "unit.max_bytes", "failures.retry", "source.include", "pool"):
        with contextlib.suppress(UsageError):
            from_overrides(f"{key}={text}")


def test_a_stored_spec_reads_back_as_it_was() -> None:
    spec = from_overrides("failures.retry=[io]", "unit.max_bytes=1GB", "pool.gpus_per_actor=1")
    assert parse_spec(InferSpec, json.loads(spec.model_dump_json()), "runs/r1/spec.json") == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_a_spec_cannot_be_changed() -> None:
    pool = from_overrides().pool
    with pytest.raises(ValueError, match="frozen"):
        setattr(pool, "batch_size", 3)  # noqa: B010  # mypy would refuse the plain assignment


def test_json_schema_describes_every_section() -> None:
    schema = json_schema("infer")
    assert schema["required"] == ["source", "model", "lake"]
    assert schema["additionalProperties"] is False
    unit = schema["$defs"]["UnitSpec"]["properties"]
    assert {member["type"] for member in unit["max_bytes"]["anyOf"]} == {"integer", "string"}


def test_an_unknown_spec_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no spec 'infr' \(did you mean infer\?\); the specs are: infer"):
        json_schema("infr")
