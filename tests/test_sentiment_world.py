import json

import numpy as np
import pytest

from experiments import sentiment_world as world

PROMPT = "cafe , mostly soup :"


@pytest.mark.parametrize(
    "review, reward",
    [
        # Computed by hand from the rules in the module's docstring.
        ("the food was good .", 1.0),
        ("the food was very superb .", 4.0),
        ("the food was slightly awful .", -1.0),
        ("the food was not superb .", -1.0),
        ("the food was not very awful .", 2.0),
        ("the soup was cold .", -1.0),
        ("the beer was cold .", 1.0),
        ("the beer was not warm .", 0.5),
        ("the food was good and the room was awful .", -0.5),
        ("the food was good but the room was awful .", (1 - 2 * 2) / 3),
        ("although the food was good , the room was awful .", (0.5 - 2) / 1.5),
        # The prompt asks for the soup, so its clause has double weight.
        ("the soup was good and the room was awful .", (2 * 1 - 2) / 3),
        ("the room was awful but the soup was good .", (-2 + 4 * 1) / 5),
        ("the soup was good . we hated it .", (2 * 1 - 2) / 3),
        ("the food was good . i would not return .", 0.0),
    ],
)
def test_gold_reward_of_reviews_by_hand(review, reward):
    assert world.gold_reward(PROMPT, review) == pytest.approx(reward, abs=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "good",
        "the food was good",
        "the food was .",
        "the food was good . .",
        "the food was very very good .",
        "the food was not not good .",
        "food was good .",
        "the hotel was good .",
        "the food was good , the room was awful .",
        "although the food was good and the room was awful .",
        "although the food was good .",
        "the food was good but .",
        "the food was good and the room was awful . we loved it .",
        "the food was good . we loved .",
        "the food was good . <unk>",
        "the food was good . the food was good .",
    ],
)
def test_text_outside_the_grammar_gets_the_worst_reward(text):
    assert world.gold_reward(PROMPT, text) == world.WORST


def test_the_aspect_in_the_prompt_has_double_weight():
    review = "the soup was superb and the room was awful ."
    asks_soup, asks_room = "inn , mostly soup :", "inn , mostly room :"
    assert world.gold_reward(asks_soup, review) == pytest.approx(2 / 3)
    assert world.gold_reward(asks_room, review) == pytest.approx(-2 / 3)


def test_prompts_outside_the_world_are_rejected():
    with pytest.raises(ValueError, match="not a prompt of this world"):
        world.gold_reward("tell me a joke", "the food was good .")


def test_generated_reviews_are_in_the_grammar_and_balanced():
    reviews = world.write_reviews(4000, seed=0)
    assert reviews == world.write_reviews(4000, seed=0)
    assert {prompt for prompt, _ in reviews} == set(world.all_prompts())
    assert all(world.read_review(text.split()) is not None for _, text in reviews)
    words = {word for pair in reviews for text in pair for word in text.split()}
    assert words == set(world.WORDS)
    longest = max(len(text.split()) for _, text in reviews)
    assert longest + 1 <= world.MAX_COMPLETION_TOKENS
    rewards = np.array([world.gold_reward(*pair) for pair in reviews])
    assert abs(rewards.mean()) < 5 * rewards.std() / np.sqrt(len(rewards))
    assert rewards.min() >= world.WORST and rewards.max() <= -world.WORST


def test_labels_are_bradley_terry_draws():
    count = 40_000
    for margin in (-1.0, 0.0, 0.5, 2.0):
        wins = world.prefer(np.full(count, margin), np.zeros(count), seed=3)
        expected = 1 / (1 + np.exp(-world.SHARPNESS * margin))
        error = np.sqrt(expected * (1 - expected) / count)
        assert abs(wins.mean() - expected) < 5 * error


def test_best_possible_curve_ends_at_the_closed_form_of_two_reviews():
    # One prompt, two equally likely reviews with rewards 0 and 1/4.
    curve = world.best_possible_curve(np.tile([0.0, 0.25], (1, 100)))
    assert (curve[0]["tilt"], curve[0]["kl"]) == (0, 0)
    assert curve[0]["reward"] == pytest.approx(0.125)
    p = 1 / (1 + np.exp(-world.SHARPNESS / 0.5 / 4))
    assert curve[-1]["reward"] == pytest.approx(p / 4)
    kl = p * np.log(2 * p) + (1 - p) * np.log(2 * (1 - p))
    assert curve[-1]["kl"] == pytest.approx(kl)
    kls = [point["kl"] for point in curve]
    assert kls == sorted(kls) and len(set(kls)) == len(kls)


def test_best_possible_curve_leaves_out_what_few_samples_determine():
    # Of 40 samples, 20 / (p^2 + (1 - p)^2) count: at least 30 up to this p.
    curve = world.best_possible_curve(np.tile([0.0, 4.0], (1, 20)))
    p = 0.5 + 0.5 * 3**-0.5
    assert 0.8 * p < curve[-1]["reward"] / 4 <= p


def test_every_word_is_one_token(tmp_path):
    transformers = pytest.importorskip("transformers")
    world.write_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = " ".join(world.WORDS)
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
    assert len(ids) == 1 + len(world.WORDS) == len(set(ids))
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == len(world.SPECIAL) + len(world.WORDS) <= 200
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert special == (0, 1, 2)


def test_jsonl_is_written_atomically(tmp_path):
    path = tmp_path / "pairs.jsonl"
    records = [{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2
    world.write_jsonl(path, records)
    assert [json.loads(line) for line in path.read_text().splitlines()] == records
    assert list(tmp_path.iterdir()) == [path]
