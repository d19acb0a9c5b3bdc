"""Records: identity, round trip, refusals, atomic writes."""

import dataclasses
import json

import pytest

from pdrop.environment import environment
from pdrop.record import (
    Cost,
    Interval,
    RunRecord,
    RunSpec,
    Score,
    TaskResult,
    canonical_json,
    read_records,
    write_atomically,
)

SPEC = RunSpec(
    model="embedded",
    model_path="package://pdrop.embedded/model",
    revision=None,
    weights="pretrained",
    model_fingerprint="0123456789abcdef",
    method="pyramiddrop",
    method_args="{}",
    schedule="3:0.5 6:0.25 9:0.125",
    positions="compact",
    tasks=("embedded_chart", "embedded_reading"),
    limit=None,
    seed=0,
    batch_size=16,
    dtype="float32",
    attn_implementation="sdpa",
    device="cpu",
    prompt="chat",
    image_mode="crop",
    max_new_tokens=16,
    latency="quick",
    versions='{"torch":"2.15.0"}',
)


def record() -> RunRecord:
    interval = Interval("ms", 2.0, 0.5, 1.5, 2.5, [1.5, 2.0, 2.5])
    cost = Cost(2, 11.0, 144.0, [144.0, 72.0], [155.0, 83.0], 0.75, 1e9, 2e9, 0.7, 3e5, 0.8, prefill_ms=interval)
    task = TaskResult({"exact_match": Score(0.5, 2)}, 2, 100, "1", "aa", "bb", "exact_match", 1.5)
    return RunRecord(SPEC, "done", "2026-01-01T00:00:00Z", 3.0, None, {"embedded_chart": task}, cost, {"cores": 2})


def test_a_record_comes_back_as_it_was(tmp_path):
    written = record()
    written.write(tmp_path / "run")
    assert RunRecord.read(tmp_path / "run") == written
    assert list(read_records(tmp_path)) == [written]


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(RunSpec)])
def test_every_field_of_the_spec_is_part_of_the_identity(field):
    value = getattr(SPEC, field)
    other = {"tasks": ("x",), "revision": "main", "limit": 3}.get(
        field, value + 1 if isinstance(value, int) else "other"
    )
    assert dataclasses.replace(SPEC, **{field: other}).run_id != SPEC.run_id


def test_the_identity_depends_on_nothing_else():
    one, two = record(), record()
    two.status, two.environment, two.wall_s = "failed", {"cores": 64}, 99.0
    assert one.run_id == two.run_id == SPEC.run_id
    assert SPEC.folder == f"embedded-pyramiddrop-{SPEC.run_id}"


def test_equal_floats_give_equal_json():
    assert canonical_json({"b": 0.1 + 0.2, "a": (1, 2)}) == '{"a":[1,2],"b":0.3}'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(surprise=1), "surprise"),
        (lambda d: d["spec"].update(surprise=1), "surprise"),
        (lambda d: d["cost"].pop("kv_ratio"), "kv_ratio"),
        (lambda d: d["spec"].update(limit=7), "edited by hand"),
    ],
)
def test_a_file_that_is_no_such_record_is_refused_by_name(tmp_path, change, message):
    data = json.loads(record().to_json())
    change(data)
    (tmp_path / "record.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"{tmp_path}.*{message}"):
        RunRecord.read(tmp_path)


def test_nan_is_refused_not_written(tmp_path):
    broken = record()
    broken.results["embedded_chart"].scores["exact_match"].value = float("nan")
    with pytest.raises(ValueError, match=r"(?i)nan|not json compliant"):
        broken.write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_write_that_breaks_leaves_the_old_file(tmp_path):
    path = tmp_path / "record.json"
    write_atomically(path, "old")
    with pytest.raises(TypeError):
        write_atomically(path, None)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_the_environment_names_code_and_machine():
    found = environment()
    assert found["packages"]["torch"] and found["processor"] and found["cores"] >= 1
    assert set(found) >= {"git_commit", "git_dirty", "python", "time"}
