"""Sources: random access to files and to the data sets of other packages."""

import gzip
import json

import pytest

from jaxpref.data import DataOptions, make_splits, open_source
from jaxpref.errors import InputError
from tests.data_tokenizers import CHATML, byte_tokenizer, synthetic_pairs, write_lines

RECORDS = synthetic_pairs(5)


def contents(source):
    return [source[n] for n in range(len(source))]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\n   \n"])
def test_json_lines(tmp_path, compressed, end):
    raw = b"\xef\xbb\xbf" + end.join(map(json.dumps, RECORDS)).encode()
    path = tmp_path / ("pairs.jsonl.gz" if compressed else "pairs.jsonl")
    path.write_bytes(gzip.compress(raw) if compressed else raw)
    source = open_source(path)
    assert contents(source) == RECORDS
    assert source[3] == RECORDS[3] and source[1] == RECORDS[1]
    line = 4 if end.count("\n") == 1 else 7
    assert source.location(3) == f"{path} row {line}"


def test_json_holds_a_list_or_lines(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(RECORDS, indent=2))
    source = open_source(tmp_path / "list.json")
    assert contents(source) == RECORDS
    assert source.location(2) == f"{tmp_path / 'list.json'} row 3"
    lines = open_source(write_lines(tmp_path / "lines.json", RECORDS))
    assert contents(lines) == RECORDS


def test_text_that_is_not_ascii(tmp_path):
    record = {"prompt": "où?", "chosen": "là ☃ 😀", "rejected": "ici"}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    assert contents(open_source(path)) == [record]


def test_a_file_refuses_options_it_has_no_use_for(tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", RECORDS)
    with pytest.raises(InputError, match="has no splits; leave out split 'test'"):
        open_source(f"{path}?split=test")
    with pytest.raises(InputError, match="has no splits; leave out split 'train'"):
        open_source(path, split="train")
    with pytest.raises(InputError, match="leave out data_dir 'd'"):
        open_source(path, data_dir="d")


def test_options_after_a_question_mark(tmp_path):
    with pytest.raises(InputError, match="data_dir=DIR and revision=COMMIT may follow"):
        open_source("hf:owner/name?splot=test")
    odd = write_lines(tmp_path / "odd?name.jsonl", RECORDS)
    assert len(open_source(odd)) == len(RECORDS)


def test_saved_hugging_face_sets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the hub extra")
    messages = [
        {
            "chosen": [
                {"role": "user", "content": f"q{n}"},
                {"role": "assistant", "content": "yes"},
            ],
            "rejected": [
                {"role": "user", "content": f"q{n}"},
                {"role": "assistant", "content": "no"},
            ],
            "flip": bool(n % 2),
            "annotator": n,
        }
        for n in range(4)
    ]
    table = datasets.Dataset.from_list(messages)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(test=table, train=table.select([0])).save_to_disk(
        tmp_path / "two"
    )
    assert contents(open_source(tmp_path / "one")) == messages
    assert contents(open_source(tmp_path / "two", split="test")) == messages
    assert len(open_source(f"{tmp_path / 'two'}?split=train")) == 1
    assert len(open_source(tmp_path / "two")) == 1
    with pytest.raises(InputError, match="it has no splits; leave out split 'train'"):
        open_source(tmp_path / "one", split="train")
    with pytest.raises(InputError, match="no split 'dev'; it has"):
        open_source(tmp_path / "two", split="dev")
    plan = make_splits(
        open_source(tmp_path / "one"),
        byte_tokenizer(template=CHATML),
        DataOptions(heldout_fraction=0),
    )
    assert plan.train.columns["is_flipped"].tolist() == [False, True, False, True]
    assert plan.train.annotator_names == ("0", "1", "2", "3")


def test_hub_id_that_cannot_be_loaded_is_one_line(monkeypatch, tmp_path):
    pytest.importorskip("datasets", reason="needs the hub extra")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(InputError, match="hf:owner/no-such: cannot be loaded") as error:
        open_source("owner/no-such")
    assert "\n" not in str(error.value)


def test_hub_sets_are_asked_for_by_name_config_split_and_folder(monkeypatch):
    pytest.importorskip("datasets", reason="needs the hub extra")
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return RECORDS

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = open_source("hf:o/n:cfg?split=test&data_dir=d&revision=abc")
    assert contents(source) == RECORDS and source.location(1) == "hf:o/n test row 2"
    open_source("o/n")
    assert calls == [
        (("o/n", "cfg"), {"split": "test", "data_dir": "d", "revision": "abc"}),
        (("o/n", None), {"split": "train", "data_dir": None, "revision": None}),
    ]


def test_tfds_sets_are_read_from_their_folders(monkeypatch, tmp_path):
    """By name too: TFDS is not asked for the name, so it downloads and runs nothing."""
    pytest.importorskip("tensorflow_datasets", reason="needs the tfds extra")
    pytest.importorskip("array_record", reason="needs the tfds extra")
    folder = tmp_path / "n" / "c" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "features.json").write_text("{}")
    calls = []

    class Builder:
        def __init__(self, folder):
            calls.append(folder)

        def as_data_source(self, split):
            calls.append(split)
            return RECORDS

    monkeypatch.setattr("tensorflow_datasets.builder_from_directory", Builder)
    for name in ("data_source", "builder", "load"):
        monkeypatch.delattr(f"tensorflow_datasets.{name}")
    assert contents(open_source(f"tfds:n/c:1.0.0?data_dir={tmp_path}")) == RECORDS
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert contents(open_source("tfds:n?split=test")) == RECORDS
    assert calls == [str(folder), "train", str(folder), "test"]


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A tiny set prepared as ArrayRecord, without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="needs the tfds extra")
    pytest.importorskip("array_record", reason="needs the tfds extra")
    from google import protobuf

    if int(protobuf.__version__.split(".")[0]) >= 7:
        pytest.skip("this tensorflow-datasets needs protobuf < 7")
    text = tfds.features.Text()

    class TinyPairs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # no checksum file beside this test

        def _info(self):
            message = tfds.features.Sequence({"role": text, "content": text})
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {"prompt": text, "chosen": text, "rejected": message}
                ),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for n in range(5):
                answer = [{"role": "assistant", "content": "non"}]
                yield n, {"prompt": f"où {n}?", "chosen": "là", "rejected": answer}

    folder = tmp_path_factory.mktemp("tfds")
    TinyPairs(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds(tfds_folder):
    by_name = open_source(f"tfds:tiny_pairs?data_dir={tfds_folder}")
    by_folder = open_source(tfds_folder / "tiny_pairs" / "1.0.0")
    assert contents(by_name) == contents(by_folder)
    assert {record["prompt"] for record in contents(by_name)} == {
        f"où {n}?" for n in range(5)
    }
    assert by_name[0]["chosen"] == "là"
    plan = make_splits(
        by_folder, byte_tokenizer(template=CHATML), DataOptions(heldout_fraction=0)
    )
    assert len(plan.train) == 5


def test_tfds_in_words(tfds_folder):
    for name in (
        "tfds:no_such_set_here",
        f"tfds:tiny_pairs?split=test&data_dir={tfds_folder}",
        f"{tfds_folder / 'tiny_pairs' / '1.0.0'}?split=test",
    ):
        with pytest.raises(InputError, match="cannot be opened") as error:
            open_source(name)
        assert "\n" not in str(error.value)
