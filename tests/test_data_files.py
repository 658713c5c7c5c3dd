"""Files of every kind, folders of them, patterns, and URLs."""

import csv
import functools
import http.server
import json
import threading

import numpy as np
import pytest

from jaxpref.data import DataOptions, examples_of, make_splits, open_source
from jaxpref.data.records import text_of
from jaxpref.errors import InputError
from tests.data_tokenizers import byte_tokenizer, synthetic_pairs, write_lines

RECORDS = synthetic_pairs(5)
ODD = [
    {"prompt": 'a "quoted", cell', "chosen": "two\nlines", "rejected": "007"},
    {"prompt": "NA", "chosen": "null", "rejected": "1e5"},
]


def contents(source):
    return [source[n] for n in range(len(source))]


def write_csv(path, records, **options):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, records[0].keys(), **options)
        writer.writeheader()
        writer.writerows(records)
    return path


def write_parquet(path, records, **options):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the hub extra")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the hub extra")
    parquet.write_table(pyarrow.Table.from_pylist(records), path, **options)
    return path


def write_arrow(path, records, *, stream):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the hub extra")
    table = pyarrow.Table.from_pylist(records)
    make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with make(str(path), table.schema) as writer:
        for batch in table.to_batches(max_chunksize=2):
            writer.write_batch(batch)
    return path


def write_zst(path, records):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the hub extra")
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write("\n".join(map(json.dumps, records)).encode())
    return path


def write_array_record(path, records):
    module = "array_record.python.array_record_module"
    package = pytest.importorskip(module, reason="needs the tfds extra")
    writer = package.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(json.dumps(record).encode())
    writer.close()
    return path


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2))
    return path


WRITERS = {
    "a.csv": write_csv,
    "a.tsv": functools.partial(write_csv, delimiter="\t"),
    "semicolons.csv": functools.partial(write_csv, delimiter=";"),
    "a.parquet": functools.partial(write_parquet, row_group_size=2),
    "a.arrow": functools.partial(write_arrow, stream=False),
    "stream.arrow": functools.partial(write_arrow, stream=True),
    "a.jsonl.zst": write_zst,
    "a.ndjson": write_lines,
    "a.array_record": write_array_record,
    "contained.json": lambda path, records: write_json(
        path, {"version": 2, "data": records}
    ),
}


@pytest.mark.parametrize("records", [RECORDS, ODD], ids=["plain", "odd"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_has_the_same_records(tmp_path, name, records):
    path = tmp_path / name
    WRITERS[name](path, records)
    source = open_source(path)
    assert contents(source) == records
    # Random access after reading in order, and back.
    assert source[len(records) - 1] == records[-1] and source[0] == records[0]
    row = 3 if name.endswith((".csv", ".tsv")) else 2  # the header is row 1
    assert source.location(1) == f"{path} row {row}"


def test_cells_with_messages_are_read_as_json(tmp_path):
    turns = [{"role": "user", "content": "q"}]
    record = {"prompt": json.dumps(turns), "chosen": '[{"a": 1}]', "rejected": "[{"}
    (found,) = contents(open_source(write_csv(tmp_path / "a.csv", [record])))
    assert found == record | {"prompt": turns}
    printed = record | {"prompt": str(turns)}
    path = write_csv(tmp_path / "b.csv", [printed])
    with pytest.raises(InputError, match="row 2: field 'prompt' holds messages as Py"):
        open_source(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1\n", "row 2: 1 cells, but the header has 2"),
        ("a,b\n1,2\n\n3,4\n", "row 3: the row is empty"),
        ("a,a\n1,2\n", "row 1: two columns are named 'a'"),
        ('a,b\n1,"x" y\n', "line 2: not valid CSV"),
        ('a,b\n1,"x\n', "not valid CSV"),
        ("a,b\n", "holds no records"),
        ("", "holds no records"),
    ],
)
def test_wrong_csv_files(tmp_path, text, message):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        open_source(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.zst", "a.csv"])
def test_damaged_files(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path, RECORDS)
    path.write_bytes(b"\xff" * 100 + path.read_bytes()[:100])
    with pytest.raises(InputError, match=f"{name}:? ") as error:
        contents(open_source(path))
    assert "\n" not in str(error.value)


def test_a_json_record_is_not_taken_for_a_container(tmp_path):
    record = {"prompt": "q", "answers": [{"text": "a"}], "data": "x"}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(record))
    assert contents(open_source(path)) == [record]


def test_folders_and_patterns(tmp_path):
    for name, part in (("b", RECORDS[3:]), ("a", RECORDS[:3])):
        write_lines(tmp_path / f"{name}.jsonl", part)
    (tmp_path / "README.md").write_text("# Data")
    for name in (tmp_path, tmp_path / "*.jsonl", tmp_path / "[ab].jsonl"):
        source = open_source(name)
        assert contents(source) == RECORDS
        assert source.location(4) == f"{tmp_path / 'b.jsonl'} row 2"
    with pytest.raises(InputError, match="no file matches"):
        open_source(tmp_path / "*.csv")
    with pytest.raises(InputError, match="have no splits; leave out split 'test'"):
        open_source(f"{tmp_path}?split=test")
    write_csv(tmp_path / "c.csv", RECORDS)
    with pytest.raises(InputError, match=r"several kinds \(.csv, .jsonl\); give a pat"):
        open_source(tmp_path)


def test_a_folder_with_splits_in_its_names(tmp_path):
    (tmp_path / "data").mkdir()
    for name, part in (
        ("train-00000-of-00002", RECORDS[:2]),
        ("train-00001-of-00002", RECORDS[2:4]),
        ("test-00000-of-00001", RECORDS[4:]),
    ):
        write_parquet(tmp_path / "data" / f"{name}.parquet", part)
    assert contents(open_source(tmp_path)) == RECORDS[:4]
    assert contents(open_source(f"{tmp_path}?split=test")) == RECORDS[4:]
    with pytest.raises(InputError, match="no split 'dev'; it has test, train"):
        open_source(tmp_path, split="dev")
    write_parquet(tmp_path / "data" / "more.parquet", RECORDS)
    with pytest.raises(InputError, match="and more.parquet has none; give a pattern"):
        open_source(tmp_path)


def test_urls_in_memory():
    fsspec = pytest.importorskip("fsspec", reason="needs the hub extra")
    files = fsspec.filesystem("memory")
    for name, part in (("b", RECORDS[3:]), ("a", RECORDS[:3])):
        text = "\n".join(map(json.dumps, part))
        files.pipe(f"/jaxpref/{name}.jsonl", text.encode())
    source = open_source("memory://jaxpref/*.jsonl")
    assert contents(source) == RECORDS
    assert source.location(3) == "memory:///jaxpref/b.jsonl row 1"
    with pytest.raises(InputError, match="memory://jaxpref/c.jsonl: cannot be read"):
        open_source("memory://jaxpref/c.jsonl")
    with pytest.raises(InputError, match="no file matches"):
        open_source("memory://jaxpref/*.csv")
    with pytest.raises(InputError, match="nosuch://a.jsonl: cannot be read"):
        open_source("nosuch://a.jsonl")


def test_urls_of_a_server(tmp_path):
    pytest.importorskip("aiohttp", reason="needs the hub extra")
    write_parquet(tmp_path / "pairs.parquet", RECORDS)
    handler = functools.partial(_Silent, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        assert contents(open_source(f"{base}/pairs.parquet?token=1")) == RECORDS
        with pytest.raises(InputError, match="/none.jsonl: cannot be read"):
            open_source(f"{base}/none.jsonl")
        server.shutdown()


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        """Prints nothing."""


def test_a_csv_file_gives_the_pairs_of_the_json_file(tmp_path):
    """Numbers and booleans of a CSV file are texts, and are read as what they mean."""
    rows = [
        record | {"annotator": n % 2, "flip": bool(n % 2)}
        for n, record in enumerate(RECORDS)
    ]
    options = DataOptions(heldout_fraction=0)
    plans = [
        make_splits(open_source(path), byte_tokenizer(), options).train
        for path in (
            write_lines(tmp_path / "a.jsonl", rows),
            write_csv(tmp_path / "a.csv", rows),
        )
    ]
    assert plans[0].digest() == plans[1].digest()
    assert np.flatnonzero(plans[1].columns["is_flipped"]).tolist() == [1, 3]
    wrong = [rows[0] | {"flip": "perhaps"}]
    with pytest.raises(InputError, match="row 2: field 'flip' must be true or false"):
        make_splits(
            open_source(write_csv(tmp_path / "b.csv", wrong)), byte_tokenizer(), options
        )


CHOICES = {
    "lmarena": {
        "prompt": '["q"]', "response_a": '["bad"]', "response_b": '["good"]',
        "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0,
    },
    "safe_rlhf": {
        "prompt": "q", "response_0": "bad", "response_1": "good",
        "better_response_id": 1,
    },
    "shp": {"history": "q", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0},
    "helpsteer2_preference": {
        "prompt": "q", "response_1": "bad", "response_2": "good",
        "preference_strength": 2,
    },
    "webgpt": {
        "question": "q", "answer_0": "bad", "answer_1": "good",
        "score_0": -0.5, "score_1": 0.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_numbers_of_other_formats_in_csv_files(tmp_path, name):
    record = CHOICES[name]
    path = write_csv(tmp_path / "a.csv", [record])
    (found,) = examples_of(contents(open_source(str(path))))
    (expected,) = examples_of([record])
    assert found == expected and text_of(found.completions[0]) == "good"
