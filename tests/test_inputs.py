"""What commands in README, docs and RESULTS read can be made by a reader."""

import gzip
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, load_file

from benchmarks import inputs, llama2c, step
from benchmarks.step import CASES, MODEL, Options, for_a_look, prepare, with_options
from experiments import annotators, bvpo, ukp
from experiments import bvpo_solutions as solutions
from experiments import reasoning_world as world
from jaxpref.data import load_tokenizer
from jaxpref.errors import InputError
from jaxpref.plan.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "RESULTS.md"),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
    *sorted((ROOT / "experiments").glob("*.py")),
]
MADE = {f"inputs/{file}" for file, _ in inputs.MAKERS.values()}
MODULE = re.compile(r"python -m ((?:benchmarks|experiments)\.\w+)")
READ = re.compile(r"--(?:data|model|hh|ultrafeedback)[= ]([^\s`,)]+)")
THE_READERS_OWN = {
    *("MODEL", "M", "DIR", "FILE", "X", "pairs.jsonl", "heldout.jsonl"),
    *("DPO", "REF", "LARGE"),
    *("traces.jsonl", "answers.jsonl", "lists.jsonl", "documents.jsonl"),
    *("hindsight.jsonl", "prompts.jsonl", "scored.jsonl", "solutions.jsonl"),
    *("steered.jsonl", "instructed.jsonl", "weak.jsonl", "first.jsonl"),
    "hf",  # what lm-evaluation-harness calls the folder of a model
    "runs/pretrained/export",
    *("a.jsonl", "a.jsonl:0.7", "b.jsonl:0.3"),
    *("helpful.jsonl:0.5", "harmless.jsonl:0.5"),
    *("runs/data/pairs.jsonl", "runs/mine/export"),
    *("runs/general/export", "runs/attributes/export", "runs/helpful/export"),
    *("runs/linear/model", "runs/qa/model"),
    *("runs/reward/export", "runs/lora/export", "runs/audit/clean.jsonl"),
}
SIZES = {*PRESETS, "smollm-135m-2-layers"}
"""Models without weights."""
PROSE = {"and", "are", "come", "names", "or", "..."}
"""Words that follow an option in a sentence."""


def test_every_command_of_the_pages_exists():
    found = {name for page in PAGES for name in MODULE.findall(page.read_text("utf-8"))}
    assert len(found) > 15
    for name in found:
        assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), name


def test_no_command_reads_a_file_that_a_reader_cannot_have():
    """A file of the reader's own, one that `benchmarks.inputs` makes, or a hub's."""
    count = 0
    for page in PAGES:
        text = page.read_text("utf-8")
        assert "../shared" not in text, page
        for name in READ.findall(text):
            name = name.strip("\"'")
            count += name in MADE
            on_the_hub = name.count("/") == 1 and not name.startswith(("inputs/", "."))
            known = name in MADE | THE_READERS_OWN | SIZES | PROSE
            known |= name.startswith("{")  # to be filled in
            assert known or on_the_hub, f"{page}: {name}"
    assert count > 15


def test_the_quick_benchmark_reads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "write_model", lambda *_: None)
    options = for_a_look(Options(json="x", quick=True))
    for name in CASES:
        case, config, rounds = prepare(
            with_options(CASES[name], options), options, tmp_path
        )
        assert case.name == name and config.num_layers == 1
        (listed,) = rounds
        assert len(listed) == 4 and max(map(max, listed[0])) < config.vocab_size


def test_a_missing_input_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = Options(json="x")
    with pytest.raises(InputError, match="hh_rlhf.*benchmarks.inputs.*--hh"):
        prepare(CASES["hh"], options, tmp_path)
    (tmp_path / "pairs.jsonl").write_text("{}")
    options = Options(json="x", hh=str(tmp_path / "pairs.jsonl"))
    with pytest.raises(InputError, match=f"{MODEL}.*benchmarks.inputs.*--model"):
        prepare(CASES["hh"], options, tmp_path)
    for make in (
        lambda: bvpo.inputs_of(bvpo.Options(), tmp_path),
        lambda: ukp.read("inputs/ukpconvarg1_votes.jsonl.gz"),
    ):
        with pytest.raises(InputError, match="benchmarks.inputs"):
            make()


# ---- made-up data of sanity checks -------------------------------------------------


def test_the_made_up_votes_have_the_form_of_the_real_ones(tmp_path):
    ukp.write_stand_in(tmp_path / "votes.jsonl.gz")
    found = ukp.read(tmp_path / "votes.jsonl.gz")
    assert len(found.texts) == 6 and len(found.gold) == 6 * 14 * 13 / 2
    judge = annotators.make_judge(found)
    assert judge.ranked.sum() > 5
    wrong = (found.signs != found.gold[found.pairs]).mean()
    assert 0.1 < wrong < 0.3


def test_the_toy_solutions_are_right_and_wrong(tmp_path):
    options = bvpo.Options(smoke=True, out=str(tmp_path))
    path, model = bvpo.inputs_of(options, tmp_path)
    assert model is None
    for record in solutions.read_records(path, 100):
        prompt = record["prompt"].strip()
        assert len(record["chosen"]["trace"]) == 2
        assert world.gold_reward(prompt, record["chosen"]["answer"]) == 1
        assert world.gold_reward(prompt, record["rejected"]["answer"]) == 0


# ---- downloads ---------------------------------------------------------------------


def test_what_is_there_is_left_and_a_changed_download_is_refused(tmp_path, capsys):
    (tmp_path / "gsm8k_solution_pairs.jsonl.gz").write_bytes(b"mine")
    inputs.make_inputs(("gsm8k",), tmp_path, lambda url: b"")
    assert (tmp_path / "gsm8k_solution_pairs.jsonl.gz").read_bytes() == b"mine"
    with pytest.raises(InputError, match="the publisher has changed it"):
        inputs.make_inputs(("hh",), tmp_path, lambda url: b"other")
    assert not (tmp_path / "hh_rlhf_helpful_base_test.jsonl.gz").exists()
    with pytest.raises(InputError, match="hhh: no such input; expected hh, gsm8k"):
        inputs.make_inputs(("hhh",), tmp_path, lambda url: b"")


def test_solutions_are_paired(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "check", lambda *_: None)
    answer = lambda right, text: {"is_correct": right, "solution": text}
    line = {
        "question": "q",
        **dict.fromkeys(inputs.SOLVERS[1:3], answer(True, "yes")),
        inputs.SOLVERS[0]: answer(False, "no"),
        inputs.SOLVERS[3]: answer(False, "never"),
    }
    lines = "\n".join([json.dumps(line)] * 4).encode()
    inputs.make_inputs(("gsm8k",), tmp_path, lambda url: lines)
    with gzip.open(tmp_path / "gsm8k_solution_pairs.jsonl.gz", "rt") as file:
        rows = [json.loads(row) for row in file]
    assert [row["idx"] for row in rows] == [1] * 4 + [2] * 4  # not 0 and 3
    assert {(r["chosen"], r["rejected"]) for r in rows} == {
        ("yes", "no"),
        ("yes", "never"),
    }
    assert rows[0]["chosen_model"] == "6b_verification"


def rotated(x, position, pairs):
    """A head's vector, with the dimensions of each pair rotated by RoPE."""
    count = len(x) // 2
    angles = position * 10000.0 ** (-np.arange(count) / count)
    out = x.copy()
    for (a, b), angle in zip(pairs, angles):
        out[a] = x[a] * np.cos(angle) - x[b] * np.sin(angle)
        out[b] = x[a] * np.sin(angle) + x[b] * np.cos(angle)
    return out


def test_reordered_heads_give_the_same_attention():
    rng = np.random.default_rng(0)
    width, heads, size = 12, 2, 6
    queries, keys = rng.normal(size=(2, heads * size, width))
    one, two = rng.normal(size=(2, width))
    neighbors = [(2 * n, 2 * n + 1) for n in range(size // 2)]
    apart = [(n, n + size // 2) for n in range(size // 2)]

    def scores(q, k, pairs):
        q, k = (q @ one).reshape(heads, size), (k @ two).reshape(heads, size)
        return [rotated(a, 3, pairs) @ rotated(b, 1, pairs) for a, b in zip(q, k)]

    moved = [llama2c.halves(x, heads) for x in (queries, keys)]
    np.testing.assert_allclose(
        scores(*moved, apart), scores(queries, keys, neighbors), rtol=1e-12
    )


def written(sizes, tensors, pieces):
    """The two files of llama2.c."""
    weights = struct.pack("7i", *sizes) + b"".join(x.tobytes() for x in tensors)
    lines = [struct.pack("fi", score, len(p)) + p for p, score in pieces]
    return weights, struct.pack("i", 9) + b"".join(lines)


def test_a_model_of_llama2c_is_read(tmp_path):
    rng = np.random.default_rng(0)
    letters = [" ", "t", "h", "e", "th", "the", " the"]
    pieces = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
    pieces += [(f"<0x{n:02X}>".encode(), 0.0) for n in range(256)]
    scores = [-9.0] * 4 + [0.0, -1.0, -2.0]
    pieces += [(x.encode(), s) for x, s in zip(letters, scores)]
    width, inner, layers, vocab = 8, 12, 2, len(pieces)
    sizes = (width, inner, layers, 2, 1, vocab, 16)
    shapes = [(vocab, width), (layers, width), (layers, width, width)]
    shapes += [(layers, 4, width)] * 2 + [(layers, width, width), (layers, width)]
    shapes += [(layers, inner, width), (layers, width, inner), (layers, inner, width)]
    shapes += [(width,), (2 * 16 * 2,)]
    tensors = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    files = llama2c.to_files(*written(sizes, tensors, pieces))
    found = load(files["model.safetensors"])
    assert len(found) == 2 + 9 * layers
    named = lambda name: found[f"model.layers.1.{name}.weight"]
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], tensors[0])
    np.testing.assert_array_equal(named("self_attn.v_proj"), tensors[4][1])
    np.testing.assert_array_equal(named("mlp.gate_proj"), tensors[7][1])
    np.testing.assert_array_equal(named("mlp.down_proj"), tensors[8][1])
    np.testing.assert_array_equal(named("mlp.up_proj"), tensors[9][1])
    np.testing.assert_array_equal(found["model.norm.weight"], tensors[10])
    queries = named("self_attn.q_proj")
    np.testing.assert_array_equal(queries[:4], tensors[2][1][[0, 2, 1, 3]])

    inputs.write_folder(tmp_path / "model", files)
    tokenizer = load_tokenizer(tmp_path / "model")
    number = {x: 259 + n for n, x in enumerate(letters)}
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encode("the the") == [number[" the"]] * 2
    assert encode("eth") == [number[" "], number["e"], number["th"]]
    assert encode("ñ") == [number[" "], 3 + 0xC3, 3 + 0xB1]
    assert tokenizer.decode(encode("the ñ")) == "the ñ"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_the_tiny_model_is_the_published_one(stories260k):
    """Its tensors, written in llama2.c's order, are read back as they are."""
    config = json.loads((stories260k / "config.json").read_text())
    tensors = load_file(stories260k / "model.safetensors")
    vocab = json.loads((stories260k / "tokenizer.json").read_text())["model"]["vocab"]
    keys = (
        *("hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "vocab_size"),
        "max_position_embeddings",
    )
    sizes = [config[key] for key in keys]

    def neighbors(matrix, heads):
        halves = matrix.reshape(heads, 2, -1, matrix.shape[1])
        return halves.swapaxes(1, 2).reshape(matrix.shape)

    ordered = [tensors["model.embed_tokens.weight"]]
    for name in (
        *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj"),
        *("self_attn.v_proj", "self_attn.o_proj", "post_attention_layernorm"),
        *("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"),
    ):
        for layer in range(sizes[2]):
            tensor = tensors[f"model.layers.{layer}.{name}.weight"]
            heads = {"self_attn.q_proj": sizes[3], "self_attn.k_proj": sizes[4]}
            ordered.append(neighbors(tensor, heads[name]) if name in heads else tensor)
    ordered.append(tensors["model.norm.weight"])
    pieces = [
        (piece.replace("▁", " ").encode(), float(min(0, 259 - n)))
        for n, piece in enumerate(sorted(vocab, key=vocab.get))
    ]
    files = llama2c.to_files(*written(sizes, ordered, pieces))
    assert (
        files["model.safetensors"] == (stories260k / "model.safetensors").read_bytes()
    )
    for name in files.keys() - {"model.safetensors"}:
        assert json.loads(files[name]) == json.loads((stories260k / name).read_text())
