"""An example of every record format, and the pairs or completions that it holds.

docs/formats.md is made from these.  The expected examples are written by hand.
"""

import dataclasses
from typing import Any

from jaxpref.data import ListSource, RecordOptions
from jaxpref.data.record_source import RecordSource
from jaxpref.data.records import Example

USER = {"role": "user", "content": "2 + 2?"}
FOUR = {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Be brief."}
TEXTS = Example("2 + 2?", ("4", "5"))
CHAT = Example((USER,), (FOUR, FIVE))
HUMAN = {"from": "human", "value": "2 + 2?"}
RATED = [
    {"response": "4", "overall_score": 9},
    {"response": "5", "overall_score": 2},
]


def by(annotator, example=TEXTS):
    """The example with its annotator."""
    return dataclasses.replace(example, annotator=annotator)


@dataclasses.dataclass(frozen=True)
class Case:
    """One record of a format, and what it is read as."""

    format: str
    about: str
    record: dict[str, Any]
    expected: tuple[Example, ...] = (TEXTS,)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    sides: int = 2


CASES = (
    Case(
        "pairs",
        "TRL's standard format.",
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    ),
    Case(
        "messages",
        "TRL's conversational format. The prompt may instead be part of `chosen` and "
        "`rejected`.",
        {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]},
        (CHAT,),
    ),
    Case(
        "messages",
        "An implicit prompt: whole conversations that differ in the last answer.",
        {"chosen": [SYSTEM, USER, FOUR], "rejected": [SYSTEM, USER, FIVE]},
        (Example((SYSTEM, USER), (FOUR, FIVE)),),
    ),
    Case(
        "messages",
        "Conversations for `--loss sft`, which trains on the last answer.",
        {"messages": [USER, FOUR]},
        (Example((USER,), (FOUR,)),),
        sides=1,
    ),
    Case(
        "own_prompts",
        "Answers to different prompts, which `own_prompts` of the result has.",
        {
            "chosen_prompt": "2 + 2?",
            "chosen": "4",
            "rejected_prompt": "2 + 3?",
            "rejected": "4",
        },
        (Example("2 + 2?", ("4", "4"), own_prompts=("2 + 2?", "2 + 3?")),),
    ),
    Case(
        "implicit",
        "Texts that begin with the same words, which are the prompt. Only if no other "
        "field holds text.",
        {"chosen": "2 + 2 is 4", "rejected": "2 + 2 is 5"},
        (Example("2 + 2 is", (" 4", " 5")),),
    ),
    Case(
        "text",
        "Plain text, for `--loss sft`.",
        {"text": "2 + 2 is 4."},
        (Example("", ("2 + 2 is 4.",)),),
        sides=1,
    ),
    Case(
        "dialogues",
        "Anthropic's HH-RLHF.",
        {
            "chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4",
            "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5",
        },
        (Example("\n\nHuman: 2 + 2?\n\nAssistant:", (" 4", " 5")),),
    ),
    Case(
        "traces",
        "Answers with reasoning traces; see [traces.md](traces.md).",
        {
            "prompt": "2 + 2?",
            "chosen": {"trace": "Count.", "answer": "4"},
            "rejected": {"trace": "Guess.", "answer": "5"},
        },
        (Example("2 + 2?", ("4", "5"), traces=(("Count.",), ("Guess.",))),),
    ),
    Case(
        "ranked",
        "Two answers and their ranks; 1 is the best.",
        {"prompt": "2 + 2?", "completions": ["5", "4"], "ranking": [2, 1]},
    ),
    Case(
        "sharegpt",
        "ShareGPT, and LLaMA-Factory's pairs in that style.",
        {
            "conversations": [HUMAN],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        (CHAT,),
    ),
    Case(
        "sharegpt",
        "Demonstrations in the same style.",
        {"conversations": [HUMAN, {"from": "gpt", "value": "4"}]},
        (Example((USER,), (FOUR,)),),
        sides=1,
    ),
    Case(
        "chat",
        "The prompt is in `messages`.",
        {"messages": [USER], "chosen": FOUR, "rejected": FIVE},
        (CHAT,),
    ),
    Case(
        "conversation",
        "LMSYS-Chat-1M.",
        {"conversation": [USER, FOUR]},
        (Example((USER,), (FOUR,)),),
        sides=1,
    ),
    Case(
        "openai",
        "OpenAI's preference fine-tuning.",
        {
            "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [FOUR],
            "non_preferred_output": [FIVE],
        },
        (CHAT,),
    ),
    Case(
        "alpaca",
        "Stanford Alpaca; the input follows the instruction on a new line.",
        {"instruction": "Add.", "input": "2 + 2", "output": "4"},
        (Example("Add.\n2 + 2", ("4",)),),
        sides=1,
    ),
    Case(
        "alpaca",
        "LLaMA-Factory's pairs. An `output` of two answers, the better one first, is "
        "read as well.",
        {"instruction": "2 + 2?", "input": "", "chosen": "4", "rejected": "5"},
    ),
    Case(
        "dolly",
        "Databricks Dolly; the context follows the instruction as a new paragraph.",
        {"instruction": "Add.", "context": "2 + 2", "response": "4"},
        (Example("Add.\n\n2 + 2", ("4",)),),
        sides=1,
    ),
    Case(
        "question",
        "Questions and answers, such as GSM8K.",
        {"question": "2 + 2?", "answer": "4"},
        (Example("2 + 2?", ("4",)),),
        sides=1,
    ),
    Case(
        "response",
        "Prompts and responses.",
        {"prompt": "2 + 2?", "response": "4"},
        (Example("2 + 2?", ("4",)),),
        sides=1,
    ),
    Case(
        "orca",
        "Orca pairs of Intel, and of Argilla (with `input` instead of `question`). "
        'With a field `system`, they are conversations. Pairs with `status` "tie" are '
        "dropped.",
        {"system": "Be brief.", "question": "2 + 2?", "chosen": "4", "rejected": "5"},
        (Example((SYSTEM, USER), (FOUR, FIVE)),),
    ),
    Case(
        "ultrafeedback",
        "UltraFeedback: the best answer by `overall_score`, or else "
        "`fine-grained_score`, or the mean rating, with a random worse one. See "
        "`--pairs`. The pair has `score_chosen`, `score_rejected` and `margin`.",
        {"instruction": "2 + 2?", "completions": RATED},
    ),
    Case(
        "generations",
        "Rated answers of distilabel.",
        {"instruction": "2 + 2?", "generations": ["5", "4"], "ratings": [1, 5]},
    ),
    Case(
        "scored_lists",
        "Answers with scores, where larger is better, or `ranks`, where 1 is the best. "
        "Losses of lists read them as they are; for losses of pairs, `--pairs` says "
        "which pairs are made.",
        {"prompt": "2 + 2?", "completions": ["5", "4", "3"], "scores": [1, 2, 0]},
        options={"pairs": "all"},
        expected=(
            TEXTS,
            Example("2 + 2?", ("4", "3")),
            Example("2 + 2?", ("5", "3")),
        ),
    ),
    Case(
        "nectar",
        "Nectar's ranked lists.",
        {
            "prompt": "2 + 2?",
            "answers": [{"answer": "4", "rank": 1}, {"answer": "5", "rank": 2}],
        },
    ),
    Case(
        "finegrained",
        "Fine-grained RLHF: comparisons of four predictions, 1 if the first is better, "
        "2 if the second is, and 0 for a tie. Without `--pairs all`, a prediction's "
        "score is its number of wins minus its losses.",
        {
            "question": "2 + 2?",
            "passages": [["Sums", "Two and two is four."]],
            **{f"prediction {n}": x for n, x in enumerate("4567", start=1)},
            "preference": [1, 1, 1, 1, 1, 2],
        },
        (Example("Sums Two and two is four.\n\n2 + 2?\n", ("4", "6")),),
        options={"pairs": "best-worst"},
    ),
    Case(
        "chosen_lists",
        "RewardBench 2 and RM-Bench: several right and several wrong answers. "
        "`jaxpref evaluate` reads them as lists.",
        {"prompt": "2 + 2?", "chosen": ["4"], "rejected": ["5"]},
    ),
    Case(
        "judge_bench",
        "JudgeBench.",
        {
            "source": "livebench-math",
            "question": "2 + 2?",
            "response_A": "5",
            "response_B": "4",
            "label": "B>A",
        },
    ),
    Case(
        "llmbar",
        "LLMBar.",
        {"input": "2 + 2?", "output_1": "4", "output_2": "5", "label": 1},
    ),
    Case(
        "hhh",
        "Anthropic's HHH evaluation.",
        {"input": "2 + 2?", "targets": {"choices": ["4", "5"], "labels": [1, 0]}},
    ),
    Case(
        "prefeval",
        "PrefEval's multiple-choice questions; the first option is right. "
        "`jaxpref evaluate` reads them as lists.",
        {
            "preference": "I like short answers.",
            "question": "2 + 2?",
            "classification_task_options": ["4", "The answer is 4."],
        },
        (Example("I like short answers.\n\n2 + 2?", ("4", "The answer is 4.")),),
    ),
    Case(
        "helpsteer2_preference",
        "HelpSteer2-Preference, from -3 (the first is better) to 3. `strength` is the "
        "absolute value; 0 is a tie.",
        {
            "prompt": "2 + 2?",
            "response_1": "5",
            "response_2": "4",
            "preference_strength": 2,
        },
    ),
    Case(
        "helpsteer2_preference",
        "With the opinions of the annotators, who are not named: a pair for each, or "
        "with `--votes majority` one pair with the publisher's `preference_strength` "
        "and the share of the opinions that agree with it in `agreement`.",
        {
            "prompt": "2 + 2?",
            "response_1": "4",
            "response_2": "5",
            "preference_strength": -2,
            "all_preferences_unprocessed": [
                {"strength": -2, "statement": "The first is right."},
                {"strength": -3, "statement": "The second is wrong."},
                {"strength": 1, "statement": "The second is longer."},
            ],
        },
        (TEXTS, TEXTS, Example("2 + 2?", ("5", "4"))),
    ),
    Case(
        "multipref",
        "MultiPref: a pair for each vote, with `strength` 1 or 2.",
        {
            "text": "2 + 2?",
            "completion_a": "4",
            "completion_b": "5",
            "normal_worker_annotations": [
                {"evaluator": "w1", "overall_pref": "A-is-clearly-better"}
            ],
            "expert_worker_annotations": [
                {"evaluator": "e1", "overall_pref": "B-is-slightly-better"}
            ],
        },
        (by("w1"), by("e1", Example("2 + 2?", ("5", "4")))),
    ),
    Case(
        "community_alignment",
        "Community Alignment: the choice of one of four answers in each round, with a "
        "random other one, or with all of them.",
        {
            "annotator_id": "ann",
            "first_turn_prompt": "2 + 2?",
            "first_turn_response_a": "5<|end_of_text|>",
            "first_turn_response_b": "4<|end_of_text|>",
            "first_turn_response_c": "5",
            "first_turn_response_d": "5",
            "first_turn_preferred_response": "response_b",
        },
        (by("ann", CHAT),),
    ),
    Case(
        "arena",
        "Chatbot Arena and MT-bench, up to turn number `turn`. Ties are dropped.",
        {
            "winner": "model_b",
            "judge": "ann",
            "turn": 1,
            "conversation_a": [USER, FIVE],
            "conversation_b": [USER, FOUR],
        },
        (by("ann", CHAT),),
    ),
    Case(
        "lmarena",
        "LMArena's votes, with the turns as JSON lists.",
        {
            "prompt": '["2 + 2?"]',
            "response_a": '["4"]',
            "response_b": '["5"]',
            "winner_model_a": 1,
            "winner_model_b": 0,
            "winner_tie": 0,
        },
        (CHAT,),
    ),
    Case(
        "mt_bench",
        "Votes on MT-bench answers, grouped by question, turn and models.",
        {
            "prompt": ["2 + 2?"],
            "a": ["4"],
            "b": ["5"],
            "votes": [{"judge": "ann", "winner": "a"}],
        },
        (by("ann", CHAT),),
    ),
    Case(
        "ukp",
        "UKPConvArg1: which argument is more convincing.",
        {
            "title": "Sums",
            "stance": "Yes",
            "a1": "5",
            "a2": "4",
            "votes": [{"worker": "w1", "label": "a2"}],
        },
        (by("w1", Example("Sums\nYes\n\n", ("4", "5"))),),
    ),
    Case(
        "safe_rlhf",
        "PKU-SafeRLHF by helpfulness; `--fields better_response_id=safer_response_id` "
        "reads the safety label instead.",
        {
            "prompt": "2 + 2?",
            "response_0": "5",
            "response_1": "4",
            "better_response_id": 1,
            "safer_response_id": 0,
        },
    ),
    Case(
        "webgpt",
        "WebGPT comparisons, with `score_chosen`, `score_rejected` and `margin`.",
        {
            "question": {"full_text": "2 + 2?"},
            "answer_0": "4",
            "answer_1": "5",
            "score_0": 1.0,
            "score_1": -1.0,
        },
    ),
    Case(
        "shp",
        "Stanford Human Preferences; `labels` is 1 if the first comment is better.",
        {"history": "2 + 2?", "human_ref_A": "4", "human_ref_B": "5", "labels": 1},
    ),
    Case(
        "edits",
        "Edits by users: the edited text is preferred to the draft.",
        {"prompt": "2 + 2?", "draft": "5", "edited": "4"},
    ),
    Case(
        "argilla",
        "Exports of Argilla. A label or ranking question names the better answer.",
        {
            "fields": {"prompt": "2 + 2?", "response_1": "5", "response_2": "4"},
            "responses": {"best": [{"value": "response_2", "user_id": "ann"}]},
        },
        (by("ann"),),
    ),
    Case(
        "label_studio",
        "Exports of Label Studio with a pairwise result.",
        {
            "data": {"prompt": "2 + 2?", "text1": "4", "text2": "5"},
            "annotations": [
                {
                    "completed_by": 3,
                    "result": [
                        {
                            "type": "pairwise",
                            "to_name": "text1,text2",
                            "value": {"selected": "left"},
                        }
                    ],
                }
            ],
        },
        (by("3"),),
    ),
    Case(
        "label_studio",
        "If `to_name` names tags that are not fields of `data`, `--fields` must say "
        "which text was shown on the left.",
        {
            "data": {"prompt": "2 + 2?", "text1": "5", "text2": "4"},
            "annotations": [
                {
                    "completed_by": 3,
                    "result": [
                        {
                            "type": "pairwise",
                            "to_name": "tag1,tag2",
                            "value": {"selected": "right"},
                        }
                    ],
                }
            ],
        },
        (by("3"),),
        {"fields": ("left=data.text1", "right=data.text2")},
    ),
    Case(
        "label_studio_min",
        "JSON_MIN exports of Label Studio, with a row for each annotation. They never "
        "say which text was shown on the left, so `--fields` must.",
        {
            "prompt": "2 + 2?",
            "text1": "4",
            "text2": "5",
            "id": 7,
            "annotator": 3,
            "annotation_id": 12,
            "better": [{"selected": "left"}],
            "lead_time": 4.2,
        },
        (by("3"),),
        {"fields": ("left=text1", "right=text2")},
    ),
)


def record_of(name):
    """The first record of a format."""
    return next(case.record for case in CASES if case.format == name)


def ukp(*labels):
    """A record with these votes."""
    votes = [{"worker": f"w{n}", "label": x} for n, x in enumerate(labels)]
    return record_of("ukp") | {"votes": votes}


def views(records, sides=2, **options):
    """The records under our names."""
    source = RecordSource(
        ListSource(records, "f"), RecordOptions(**options), sides=sides
    )
    return [source[n] for n in range(len(source))]
