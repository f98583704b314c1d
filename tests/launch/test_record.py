"""Records of submitted jobs, and names of jobs."""

import pytest

from launch import record
from launch.record import Record
from t5like.errors import CheckpointError, ConfigError


def test_a_written_record_is_found_by_its_run_directory(tmp_path):
    written = Record("slurm", "12", "a", str(tmp_path / "run"), "/logs/12.log", {"cluster": "c"})
    record.write(written)
    assert record.find(str(tmp_path / "run")) == written
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["launch.json"]


def test_a_job_is_found_by_its_id_without_a_record():
    assert record.find("kubernetes:ns/a-b") == Record("kubernetes", "ns/a-b")
    assert record.find("slurm:12").full_id == "slurm:12"


def test_a_bucket_gets_no_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record.write(Record("slurm", "12", "a", "gs://b/run"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["nothing", "slurm:", "pbs:12", ""])
def test_what_is_no_job_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is no job"):
        record.find(text)


DAMAGED = [
    "{",
    "[]",
    '{"backend": "slurm"}',
    '{"backend": "x", "id": "1"}',
    '{"backend": "slurm", "id": 1}',
    '{"backend": "slurm", "id": "1", "details": {"a": 1}}',
]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_record_is_refused(tmp_path, text):
    (tmp_path / "launch.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not a record"):
        record.find(str(tmp_path))
